"""Decayed linear attention one token at a time, as the paper writes it (arXiv:2307.08621, eq. 6)."""

import torch
from torch import Tensor


def decay_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q, k (b t h d), v (b t h e), log_decay (b|1 t h), state (b h d e), segments (b t) -> y (b t h e), state."""
    decay = log_decay.exp()
    if segments is not None:
        starts = torch.diff(segments, dim=1, prepend=segments[:, :1]) != 0
        decay = decay.masked_fill(starts[..., None], 0.0)
    outputs = []
    for q_t, k_t, v_t, decay_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), decay.unbind(1), strict=True):
        state = decay_t[..., None, None] * state + k_t[..., :, None] * v_t[..., None, :]
        outputs.append((q_t[..., None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1), state
