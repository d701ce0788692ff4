"""Decayed linear attention: a matrix state per head that decays, is written to, and is read by the query.

    S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T          y_t = S_t^T q_t

Retention of RetNet (Sun et al., 2023, arXiv:2307.08621, eq. 1-3) with a decay fixed per head; linear attention
(Katharopoulos et al., 2020, arXiv:2006.16236) with decay 1. The chunkwise form is eq. 7 of the RetNet paper.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from zoo.ops.decay_attention.chunked import decay_attention_chunked
from zoo.ops.decay_attention.reference import decay_attention_reference
from zoo.ops.dispatch import choose

BACKENDS = {"reference": decay_attention_reference, "chunked": decay_attention_chunked}


def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a batch of sequences; differentiable in every floating input, `state` included.

    Args:
        q, k: queries and keys, (b t h d). Any scale is the caller's.
        v: values, (b t h e).
        log_decay: natural log of the decay, at most 0, broadcastable to (b t h).
        state: S before the first token, (b h d e), in float32 (float64 for float64 inputs).
        mask: (b t), False at padding: there the decay is 1, nothing is written and the output is 0. None: no padding.
        segments: (b t) ids of the documents packed in a row; a token reads only what its own document wrote. The first
            document of a row continues `state`. None: one document a row.

    Returns:
        The outputs, (b t h e) in the dtype of `v`, and S after the last token, (b h d e).

    Raises:
        ValueError: if the shapes do not agree.
    """
    b, t, h, d = q.shape
    e = v.shape[-1]
    if k.shape != q.shape or v.shape[:3] != q.shape[:3] or state.shape != (b, h, d, e):
        raise ValueError(
            f"decay_attention wants q and k (b t h d), v (b t h e), state (b h d e); got q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}, v {tuple(v.shape)}, state {tuple(state.shape)}"
        )
    dtype = state.dtype
    log_decay = log_decay.to(dtype)
    log_decay = log_decay.reshape((1,) * (3 - log_decay.dim()) + log_decay.shape).expand(-1, t, h)
    if mask is not None:
        padding = ~mask[..., None]
        log_decay = log_decay.masked_fill(padding, 0.0)
        q, k, v = (x.masked_fill(padding[..., None], 0.0) for x in (q, k, v))
    run = BACKENDS[choose("decay_attention", BACKENDS, q.device).backend]
    with _no_autocast(q.device.type):  # products of the state stay in the state's precision
        y, state = run(q.to(dtype), k.to(dtype), v.to(dtype), log_decay, state, segments)
    return y.to(v.dtype), state


def _no_autocast(device_type: str) -> AbstractContextManager:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a recurrent state for activations of `dtype`: float32, or float64 where the activations are."""
    return torch.promote_types(dtype, torch.float32)
