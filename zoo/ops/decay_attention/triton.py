"""Decayed linear attention in Triton, in chunks: one state a chunk, then all chunks at once.

A walk along the chunks keeps the state before each (`triton_carry.py`); what a chunk reads comes from that state and
from the chunk itself (`triton_scalar.py` for one decay a head, `triton_vector.py` for one a key channel). The gradients
of keys and values are reads too: of the gradient of the state, on a walk from the last token to the first. An exponent
is always a sum of the log-decays between a write and a read, never a difference of two sums: none is positive, none is
lost to rounding, and -inf is as good as any.

Letters: b batch, t tokens, h heads, d key width, e value width.
"""

import torch
from torch import Tensor

from zoo.ops.decay_attention.triton_scalar import backward_scalar, forward_scalar
from zoo.ops.decay_attention.triton_vector import backward_vector, forward_vector


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    bonus: Tensor | None,
    normalizer: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if normalizer is not None:  # it is one more value, always 1
        wide, e = _append(v, v.new_ones(v.shape[:-1])), v.shape[-1]
        y, end = _forward(q, k, wide, log_decay, _append(state, normalizer), None, starts, state.dtype)
        return tuple(x.contiguous() for x in (y[..., :e].to(v.dtype), end[..., :e], y[..., e], end[..., e]))
    y, end = _forward(q, k, v, log_decay, state, bonus, starts, v.dtype)
    return y, end, state.new_empty(0), state.new_empty(0)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    bonus: Tensor | None,
    starts: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y in the given dtype, and the last state."""
    end = torch.empty_like(state)
    reads, log_decay = _reset(q, log_decay, bonus, starts)
    reads, writes, written = _in_one_dtype(reads, k, v)
    if bonus is None:
        y = torch.empty_like(v, dtype=dtype)
        run = forward_scalar if log_decay.dim() == 3 else forward_vector
        run(reads, writes, written, log_decay, state, y, end)
    else:
        y = torch.empty_like(v, dtype=torch.float32)
        forward_vector(reads, writes, written, _per_key(log_decay, q), state, y, end, shift=1)
        y = y.addcmul_(_read_itself(q, k, bonus), v).to(dtype)
    return y, end


def backward(
    grads: list[Tensor],
    outputs: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    bonus: Tensor | None,
    normalizer: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor | None, ...]:
    if normalizer is not None:
        v, e = _append(v, v.new_ones(v.shape[:-1])), v.shape[-1]
        grads = [_append(grads[0], grads[2]), _append(grads[1], grads[3])]
        found = backward(grads, [], q, k, v, log_decay, _append(state, normalizer), None, None, starts)
        grad_q, grad_k, grad_v, grad_log_decay, grad_state = found[:5]
        grad_v, grad_state, grad_normalizer = grad_v[..., :e], grad_state[..., :e], grad_state[..., e]
        found = grad_q, grad_k, grad_v, grad_log_decay, grad_state, None, grad_normalizer, None
        return tuple(x if x is None else x.contiguous() for x in found)

    grad_y, grad_end = grads[:2]
    reads, log_decay = _reset(q, log_decay, bonus, starts)
    grad_y, reads, writes, written = _in_one_dtype(grad_y, reads, k, v)
    if bonus is None:
        found = tuple(torch.empty_like(x) for x in (q, k, v, log_decay, state))
        run = backward_scalar if log_decay.dim() == 3 else backward_vector
        run(grad_y, grad_end, reads, writes, written, log_decay, state, found)
        return *found, None, None, None

    per_key = _per_key(log_decay, q)
    found = tuple(torch.empty_like(x, dtype=torch.float32) for x in (q, k, v, per_key, state))
    backward_vector(grad_y, grad_end, reads, writes, written, per_key, state, found, shift=1)
    grad_q, grad_k, grad_v, grad_log_decay, grad_state = found
    if starts is not None:
        grad_q = grad_q.masked_fill_(starts[..., None, None], 0.0)
    grad_weight = (grad_y.float() * v).sum(-1, keepdim=True)
    grad_bonus = (grad_weight * q * k).sum((0, 1))
    grad_q = grad_q.addcmul_(grad_weight, bonus * k)
    grad_k = grad_k.addcmul_(grad_weight, bonus * q)
    grad_v = grad_v.addcmul_(_read_itself(q, k, bonus), grad_y)
    if log_decay.dim() == 3:
        grad_log_decay = grad_log_decay.sum(-1)
    found = grad_q, grad_k, grad_v, grad_log_decay, grad_state, grad_bonus
    return *(x.to(y.dtype) for x, y in zip(found, (q, k, v, log_decay, state, bonus), strict=True)), None, None


def ahead_of_time() -> dict[str, tuple[Tensor | None, ...]]:
    """Inputs of the main sizes, by name."""

    def inputs(d: int, e: int, decay: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor | None, ...]:
        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        b, t, h = 8, 4096, 2048 // e
        keys, float32 = empty(b, t, h, d), torch.float32
        by_head = decay in ("scalar", "normalized")
        log_decay = empty(b, t, h, dtype=float32) if by_head else empty(b, t, h, d, dtype=float32)
        state, bonus = empty(b, h, d, e, dtype=float32), empty(h, d, dtype=float32) if decay == "bonus" else None
        normalizer = empty(b, h, d, dtype=float32) if decay == "normalized" else None
        return keys, keys, empty(b, t, h, e), log_decay, state, bonus, normalizer, None

    return {
        "scalar d64 e64 bfloat16": inputs(64, 64, "scalar"),  # RetNet, Mamba-2
        "scalar d128 e64 bfloat16": inputs(128, 64, "scalar"),  # Mamba-2
        "scalar d128 e128 bfloat16": inputs(128, 128, "scalar"),
        "scalar d64 e64 float32": inputs(64, 64, "scalar", torch.float32),
        "normalized d64 e64 bfloat16": inputs(64, 64, "normalized"),
        "normalized d256 e512 bfloat16": inputs(256, 512, "normalized"),  # xLSTM-7B
        "vector d64 e64 bfloat16": inputs(64, 64, "vector"),
        "vector d128 e128 bfloat16": inputs(128, 128, "vector"),  # GLA
        "vector d64 e64 float32": inputs(64, 64, "vector", torch.float32),
        "bonus d64 e64 bfloat16": inputs(64, 64, "bonus"),  # RWKV-5, RWKV-6
    }


def _append(x: Tensor, column: Tensor) -> Tensor:
    """x (... e) and a column (...) -> (... e'), zeros at the end: e' is a multiple of 16, so that rows stay aligned."""
    zeros = x.new_zeros(*x.shape[:-1], -(x.shape[-1] + 1) % 16)
    return torch.cat([x, column[..., None].to(x.dtype), zeros], dim=-1)


def _reset(q: Tensor, log_decay: Tensor, bonus: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Decays of 0 where a document starts, and, where reads come before the decay, queries of 0."""
    if starts is None:
        return q, log_decay
    if bonus is not None:
        q = q.masked_fill(starts[..., None, None], 0.0)
    return q, log_decay.masked_fill(starts.reshape(*starts.shape, *[1] * (log_decay.dim() - 2)), -torch.inf)


def _per_key(log_decay: Tensor, q: Tensor) -> Tensor:
    """(b t h) or (b t h d) -> (b t h d)."""
    return log_decay if log_decay.dim() == 4 else log_decay[..., None].expand(q.shape).contiguous()


def _read_itself(q: Tensor, k: Tensor, bonus: Tensor) -> Tensor:
    """q_t diag(bonus) k_t, (b t h 1)."""
    return (q.float() * bonus * k).sum(-1, keepdim=True)


def _in_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """Products want it."""
    dtype = tensors[0].dtype
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in tensors]
