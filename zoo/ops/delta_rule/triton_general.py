"""The general delta rule in Triton, one token at a time:

    S_t = diag(decay_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T          y_t = S_t^T q_t

A program owns a head and a block of values and keeps its part of S, (d e), in registers. Backward, with the gradient D
of S_t, which is that of S_{t+1} handed back plus q_t dy_t^T,

    dk = D v    dv = D^T k    db = D (S_{t-1}^T a)    da = S_{t-1} (D^T b)    d(log decay) = decay (D * S_{t-1}) 1

and diag(decay) D + a (D^T b)^T is handed back. The states it needs are computed again, from checkpoints.

Letters: b batch, t tokens, h heads, d keys, e values, n checkpoints.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.gpu import launch, next_power_of_2
from zoo.ops.tiles import load_float32, load_rows, matrix_rows, store_rows


def forward_general(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    starts: Tensor | None,
    y: Tensor | None,
    end: Tensor | None,
    checkpoints: Tensor | None = None,
    every: int = 1,
) -> None:
    """Fill y (b t h e), the last state (b h d e), and the states before each `every` tokens (b h n d e).

    With beta in the place of a and b it is the gated form.
    """
    rows, t, h, d = k.shape
    e, keys = v.shape[3], next_power_of_2(d)
    block = max(1, min(next_power_of_2(e), 1024 // keys))
    launch(
        *(_walk_forward, (rows * h, triton.cdiv(e, block))),
        *(q, k, v, log_decay, state, a, b, beta, starts, y, end, checkpoints, every, t, h, d, e),
        VECTOR=log_decay.dim() == 4,
        KEYS=keys,
        BLOCK=block,
        warps=max(1, keys * block // 1024),
    )


def backward_general(
    grad_y: Tensor,
    grad_end: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    a: Tensor,
    b: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, log_decay, state, a and b."""
    rows, t, h, d = k.shape
    e, keys = v.shape[3], next_power_of_2(d)
    block = max(1, min(next_power_of_2(e), 4096 // keys))
    blocks = triton.cdiv(e, block)
    every = next_power_of_2(math.isqrt(t))  # as many checkpoints as states between two of them
    checkpoints = state.new_empty(rows, h, triton.cdiv(t, every), d, e, dtype=torch.float32)
    forward_general(q, k, v, log_decay, state, a, b, None, starts, None, None, checkpoints, every)

    inputs = (q, k, log_decay, a, b)
    # each block of values has its part of these gradients
    parts = [x.new_empty(blocks, *x.shape, dtype=torch.float32 if blocks > 1 else x.dtype) for x in inputs]
    grad_v, grad_state = torch.empty_like(v), torch.empty_like(state)
    launch(
        *(_walk_backward, (rows * h, blocks)),
        *(q, k, v, log_decay, a, b, starts, grad_y, grad_end, checkpoints),
        *(state.new_empty(rows, h, blocks, every, keys, block, dtype=torch.float32), *parts, grad_v, grad_state),
        *(q.numel(), log_decay.numel(), every, t, h, d, e),
        VECTOR=log_decay.dim() == 4,
        KEYS=keys,
        BLOCK=block,
        warps=max(1, keys * block // 512),
    )
    sums = [part.sum(0).to(x.dtype) if blocks > 1 else part[0] for part, x in zip(parts, inputs, strict=True)]
    grad_q, grad_k, grad_log_decay, grad_a, grad_b = sums
    return grad_q, grad_k, grad_v, grad_log_decay, grad_state, grad_a, grad_b


@triton.jit
def _load_keys(k, log_decay, a, b, beta, index, key, d, VECTOR: tl.constexpr):
    """k, the decay, a and b (d) of a token; the gated form is the general one with a = -decay k and b = beta k."""
    at, inside = index * d + key, key < d
    write = load_float32(k + at, inside)
    if VECTOR:
        keep = tl.exp(load_float32(log_decay + at, inside))
    else:
        keep = tl.exp(tl.load(log_decay + index).to(tl.float32)) + tl.zeros_like(write)
    if beta is None:
        read, change = load_float32(a + at, inside), load_float32(b + at, inside)
    else:
        read = -keep * write
        write *= tl.load(beta + index).to(tl.float32)
        change = write
    return write, keep, read, change


@triton.jit
def _reset(state, starts, token):
    """The state (d e) before a token, 0 where a document starts; `token` is counted through all rows."""
    if starts is not None:
        state = tl.where(tl.load(starts + token) != 0, 0.0, state)
    return state


@triton.jit
def _advance(carry, k, v, log_decay, a, b, beta, starts, token, head, key, value, h, d, e, VECTOR: tl.constexpr):
    """From the state (d e) before a token to that behind it."""
    index = token * h + head
    carry = _reset(carry, starts, token)
    write, keep, read, change = _load_keys(k, log_decay, a, b, beta, index, key, d, VECTOR)
    written = load_float32(v + index * e + value, value < e)
    found = tl.sum(read[:, None] * carry, 0)
    return keep[:, None] * carry + change[:, None] * found[None, :] + write[:, None] * written[None, :]


@triton.jit
def _walk_forward(
    q,
    k,
    v,
    log_decay,
    state,
    a,
    b,
    beta,
    starts,
    y,
    end,
    checkpoints,
    every,
    t,
    h,
    d,
    e,
    VECTOR: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From the first token to the last."""
    program = tl.program_id(0).to(tl.int64)
    row, head = program // h, program % h
    key, value = tl.arange(0, KEYS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    carry = load_rows(state, matrix_rows(program, key, d), value, e).to(tl.float32)
    for i in tl.range(0, t, num_stages=3):
        if checkpoints is not None and i % every == 0:
            store_rows(checkpoints, matrix_rows(program * tl.cdiv(t, every) + i // every, key, d), value, e, carry)
        token = row * t + i
        carry = _advance(carry, k, v, log_decay, a, b, beta, starts, token, head, key, value, h, d, e, VECTOR)
        if y is not None:
            index = token * h + head
            query = load_float32(q + index * d + key, key < d)
            tl.store(y + index * e + value, tl.sum(query[:, None] * carry, 0), mask=value < e)
    if end is not None:
        store_rows(end, matrix_rows(program, key, d), value, e, carry)


@triton.jit
def _walk_backward(
    q,
    k,
    v,
    log_decay,
    a,
    b,
    starts,
    grad_y,
    grad_end,
    checkpoints,
    scratch,
    grad_q,
    grad_k,
    grad_log_decay,
    grad_a,
    grad_b,
    grad_v,
    grad_state,
    part,
    decay_part,
    every,
    t,
    h,
    d,
    e,
    VECTOR: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From the last token to the first, with the states behind a checkpoint computed again into `scratch`."""
    program, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, head, n = program // h, program % h, tl.cdiv(t, every)
    key, column = tl.arange(0, KEYS), tl.arange(0, BLOCK)
    value = tl.program_id(1) * BLOCK + column
    saved = scratch + (program * tl.num_programs(1) + block) * every * (KEYS * BLOCK)
    saved += key[:, None] * BLOCK + column[None, :]
    grad = load_rows(grad_end, matrix_rows(program, key, d), value, e).to(tl.float32)
    for step in range(n):
        first = (n - 1 - step) * every
        count = min(every, t - first)
        carry = load_rows(checkpoints, matrix_rows(program * n + n - 1 - step, key, d), value, e)
        tl.debug_barrier()
        for i in tl.range(0, count, num_stages=2):
            tl.store(saved + i * (KEYS * BLOCK), carry)
            token = row * t + first + i
            carry = _advance(carry, k, v, log_decay, a, b, None, starts, token, head, key, value, h, d, e, VECTOR)
        tl.debug_barrier()
        for i in tl.range(0, count, num_stages=2):
            last = count - 1 - i
            token = row * t + first + last
            index = token * h + head
            write, keep, read, change = _load_keys(k, log_decay, a, b, None, index, key, d, VECTOR)
            query = load_float32(q + index * d + key, key < d)
            written = load_float32(v + index * e + value, value < e)
            grad_read = load_float32(grad_y + index * e + value, value < e)
            grad += query[:, None] * grad_read[None, :]
            at = block * part + index * d + key
            tl.store(grad_q + at, tl.sum(carry * grad_read[None, :], 1), mask=key < d)
            tl.store(grad_k + at, tl.sum(grad * written[None, :], 1), mask=key < d)
            tl.store(grad_v + index * e + value, tl.sum(grad * write[:, None], 0), mask=value < e)
            carry = tl.load(saved + last * (KEYS * BLOCK))
            before = _reset(carry, starts, token)
            found = tl.sum(read[:, None] * before, 0)
            grad_found = tl.sum(grad * change[:, None], 0)
            tl.store(grad_b + at, tl.sum(grad * found[None, :], 1), mask=key < d)
            tl.store(grad_a + at, tl.sum(before * grad_found[None, :], 1), mask=key < d)
            grad_decay = tl.sum(grad * before, 1) * keep
            if VECTOR:
                tl.store(grad_log_decay + at, grad_decay, mask=key < d)
            else:
                tl.store(grad_log_decay + block * decay_part + index, tl.sum(grad_decay, 0))
            grad = _reset(keep[:, None] * grad + read[:, None] * grad_found[None, :], starts, token)
    store_rows(grad_state, matrix_rows(program, key, d), value, e, grad)
