"""Decayed linear attention: a matrix state per head that decays, is written to, and is read by the query.

    S_t = diag(exp log_decay_t) S_{t-1} + k_t v_t^T          y_t = S_t^T q_t

with a decay per head (retention: Sun et al., 2023, arXiv:2307.08621, eq. 6; Mamba-2: Dao and Gu, 2024,
arXiv:2405.21060) or per key channel (GLA: Yang et al., 2023, arXiv:2312.06635). RWKV-5 and 6 (Peng et al., 2024,
arXiv:2404.05892) read before they write, and weigh the token itself by a bonus:

    y_t = (S_{t-1} + diag(bonus) k_t v_t^T)^T q_t

Linear attention (Katharopoulos et al., 2020, arXiv:2006.16236) and the mLSTM (Beck et al., 2024, arXiv:2405.04517)
divide by a normaliser, the same recurrence on the keys alone.

Letters: b batch, t tokens, h heads, d key width, e value width.
"""

import torch
from torch import Tensor

from zoo.ops.checks import check_dtypes, check_shapes, is_plain_call, once_per_look
from zoo.ops.decay_attention import native
from zoo.ops.decay_attention.chunked import decay_attention_chunked
from zoo.ops.decay_attention.reference import decay_attention_reference, normalized_decay_attention_reference
from zoo.ops.dispatch import choose
from zoo.ops.op import Op, compute_dtype
from zoo.ops.packing import fill_padding, segment_starts


def _empty_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    bonus: Tensor | None,
    normalizer: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (b t h e), the last S (b h d e), q·n (b t h) and the last n (b h d); the last two empty without a normaliser.

    `log_decay` is (b t h) or (b t h d), `normalizer` n before the first token; `starts` (b t) empties the state before
    a token is read or written.
    """
    vector = log_decay.dim() == 4
    shapes = {
        "q": "b t h d",
        "k": "b t h d",
        "v": "b t h e",
        "log_decay": "b t h d" if vector else "b t h",
        "state": "b h d e",
        "bonus": "h d",
        "normalizer": "b h d",
        "starts": "b t",
    }
    tensors = (q, k, v, log_decay, state, bonus, normalizer, starts)
    check_shapes("decay_attention", shapes, **dict(zip(shapes, tensors, strict=True)))
    y, end = v.new_empty(v.shape), state.new_empty(state.shape)
    if normalizer is None:
        return y, end, state.new_empty(0), state.new_empty(0)
    if vector or bonus is not None:
        raise ValueError("decay_attention: a normalizer goes with one decay a head and without a bonus")
    return y, end, state.new_empty(log_decay.shape), normalizer.new_empty(normalizer.shape)


OP = Op(
    "decay_attention",
    _empty_outputs,
    reference=decay_attention_reference,
    chunked=decay_attention_chunked,
    states=("state", "normalizer"),
    kernels=("native", "triton"),
)


def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    bonus: Tensor | None = None,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a batch of sequences; differentiable in every floating input, `state` included.

    Args:
        q, k: queries and keys, (b t h d). Any scale is the caller's.
        v: values, (b t h e).
        log_decay: natural logarithm of the decay, at most 0, -inf allowed. Its number of dimensions says what it is:
            (h) or (b t h), one for a head, constant or for each token; (h d) or (b t h d), one for a key channel.
        state: S before the first token, (b h d e), in float32 (float64 where the inputs are).
        mask: (b t), False at padding: there the decay is 1, nothing is written and the output is 0. None: no padding.
        segments: (b t) ids of the documents packed in a row; each starts from a state of 0, but the row's first, which
            continues `state`. None: one document a row. A NaN or an infinity in one may reach the others.
        bonus: (h d), makes the read one before the write, with the token itself weighed so (RWKV-5, RWKV-6). None:
            the read comes after the write.
        kernels: which form runs (`zoo.ops.dispatch`).

    Returns:
        The outputs, (b t h e) in the dtype of `v`, and S after the last token, (b h d e), in that of the state.

    Raises:
        ValueError: if the shapes do not agree, or the form asked for cannot run.
    """
    q, k, v, log_decay, starts = _prepare(q, k, v, log_decay, mask, segments)
    if starts is not None and bonus is None:  # a read before the write would not see this decay
        log_decay, starts = _reset(log_decay, starts), None
    y, state, _, _ = OP(q, k, v, log_decay, state, bonus, None, starts, kernels=kernels)
    return y.to(v.dtype), state


def normalized_decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    log_input: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    floor: float = 1.0,
    eps: float = 1e-6,
    kernels: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The mLSTM's attention (arXiv:2405.04517, eq. 19-27): gated writes, and outputs divided by a normaliser.

        m_t = max(log_decay_t + m_{t-1}, log_input_t)
        S_t = exp(log_decay_t + m_{t-1} - m_t) S_{t-1} + exp(log_input_t - m_t) k_t v_t^T, n_t likewise with k_t alone
        y_t = S_t^T q_t / (max(|n_t·q_t|, floor exp(-m_t)) + eps)

    exp(m) is the unit that S and n are kept in. But for eps the outputs do not depend on it, so it carries no gradient.
    Linear attention with its normaliser is log_decay = log_input = 0, m = 0 and floor = 0.

    Args:
        q, k: queries and keys, (b t h d). Any scale is the caller's.
        v: values, (b t h e).
        log_decay: logarithm of the forget gate, (h) or (b t h), at most 0, -inf allowed.
        log_input: logarithm of the input gate, (b t h), -inf allowed.
        state: S (b h d e), n (b h d) and m (b h) before the first token, in float32 (float64 where the inputs are).
            A new sequence has zeros; m may also be -inf.
        mask: (b t), False at padding: the state stays as it is there and the output is 0. None: no padding.
        segments: (b t) ids of the documents packed in a row; each starts from a state of 0, but the row's first, which
            continues `state`. None: one document a row. A NaN or an infinity in one may reach the others.
        floor: the least normaliser, in units of 1.
        eps: added to the normaliser, in units of exp(m).
        kernels: which form runs (`zoo.ops.dispatch`).

    Returns:
        The outputs, (b t h e) in the dtype of `v`, and the state after the last token, in the dtypes of `state`.

    Raises:
        ValueError: if the shapes do not agree, `log_decay` has a key dimension, or the form asked for cannot run.
    """
    if log_decay.dim() not in (1, 3):
        raise ValueError(f"normalized_decay_attention: log_decay has shape {tuple(log_decay.shape)}, wanted (b t h)")
    q, k, v, log_decay, starts = _prepare(q, k, v, log_decay, mask, segments)
    (log_input,) = fill_padding(mask, -torch.inf, log_input)
    matrix, normalizer, maximum = state
    tensors = (q, k, v, log_decay, log_input, matrix, normalizer, maximum)
    dtype = _check_normalized(*tensors)
    form = choose(OP.name, OP.forms, q.device, dtype, kernels).backend
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    # In decoding the operations below cost more than the op: there C++ does them too.
    is_step = q.shape[1] == 1 and starts is None and form == "native" and is_plain_call(tensors) and not needs_gradient
    if form == "reference" or is_step:
        *inputs, matrix, normalizer, maximum = (x.to(dtype) for x in tensors)
        state = matrix, normalizer, maximum
        if is_step:
            y, state = native.normalized_step(*inputs, state, floor, eps)
        else:
            y, state = normalized_decay_attention_reference(*inputs, *state, starts, floor, eps)
        return y.to(v.dtype), state

    with torch.no_grad():
        before, m = _running_maximum(log_decay, log_input, maximum, starts)
    if starts is not None:
        log_decay = _reset(log_decay, starts)
    unit = m.clamp(min=-1e30)  # -inf less -inf is no number
    log_decay = (log_decay + (before - unit)).to(matrix.dtype)
    gated_k = (log_input - unit).exp().to(matrix.dtype)[..., None] * k
    k = gated_k.to(k.dtype) if form == "triton" else gated_k  # its products want one dtype
    y, matrix, q_n, normalizer = OP(q, k, v, log_decay, matrix, None, normalizer, None, kernels=kernels)
    least = (floor * (-m).exp()).to(q_n.dtype) if floor else torch.zeros_like(q_n)
    y = y / (torch.maximum(q_n.abs(), least) + eps)[..., None]
    return y.to(v.dtype), (matrix, normalizer, m[:, -1].to(maximum.dtype))


@once_per_look
def _check_normalized(*tensors: Tensor) -> torch.dtype:
    """Raise ValueError where the inputs do not agree; the dtype of the state."""
    shapes = {"q": "b t h d", "k": "b t h d", "v": "b t h e", "log_decay": "b t h", "log_input": "b t h"}
    shapes |= {"S": "b h d e", "n": "b h d", "m": "b h"}
    named = dict(zip(shapes, tensors, strict=True))
    check_shapes("normalized_decay_attention", shapes, **named)
    check_dtypes("normalized_decay_attention", **named)
    return compute_dtype(*tensors)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, mask: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, ...]:
    """q, k, v with zeros at padding, log_decay (b t h) or (b t h d) with zeros there, and where documents start."""
    if log_decay.dim() <= 2:
        log_decay = log_decay.expand(*q.shape[:2], *log_decay.shape)
    q, k, v, log_decay = fill_padding(mask, 0.0, q, k, v, log_decay)
    return q, k, v, log_decay, segment_starts(segments, mask, q)


def _reset(log_decay: Tensor, starts: Tensor) -> Tensor:
    """(b t h) or (b t h d), -inf at starts."""
    return log_decay.masked_fill(starts.reshape(*starts.shape, *[1] * (log_decay.dim() - 2)), -torch.inf)


def _running_maximum(
    log_decay: Tensor, log_input: Tensor, maximum: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """m before and at each token, (b t h): log_decay, log_input (b t h), m before the first (b h), starts (b t).

    Two steps of m -> max(a + m, i) are one of the same kind, so they are joined by doubling. The result is rounded as
    the state will be, and given in more digits, so that the differences of neighbours are exact.
    """
    if log_decay.shape[1] == 1 and starts is None:
        before = maximum[:, None]
        return before, torch.maximum(log_decay + before, log_input).to(maximum.dtype)
    wide = torch.float32 if maximum.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    a, i = log_decay.to(wide), log_input.to(wide)
    if starts is not None:  # a new sequence begins with m = 0
        i = torch.where(starts[..., None], torch.maximum(a, i), i)
        a = _reset(a, starts)
    reach = 1
    while reach < a.shape[1]:
        i = torch.cat([i[:, :reach], torch.maximum(a[:, reach:] + i[:, :-reach], i[:, reach:])], dim=1)
        a = torch.cat([a[:, :reach], a[:, reach:] + a[:, :-reach]], dim=1)
        reach *= 2
    m = torch.maximum(a + maximum[:, None], i).to(maximum.dtype).to(wide)
    return torch.cat([maximum[:, None], m[:, :-1]], dim=1), m
