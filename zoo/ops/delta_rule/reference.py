"""The delta rule one token at a time, as the papers write it (arXiv:2503.14456; arXiv:2412.06464, eq. 10)."""

import torch
from torch import Tensor


def delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q, k, a, b (b t h d), v (b t h e), log_decay (b t h) or (b t h d), state (b h d e), beta (b t h), starts (b t)
    -> y (b t h e), state."""
    decay = log_decay.exp()
    if decay.dim() == 3:
        decay = decay[..., None]
    tokens = ([None] * q.shape[1] if x is None else x.unbind(1) for x in (q, k, v, decay, a, b, beta, starts))
    outputs = []
    for q_t, k_t, v_t, decay_t, a_t, b_t, beta_t, starts_t in zip(*tokens, strict=True):
        if starts_t is not None:
            state = state.masked_fill(starts_t[:, None, None, None], 0.0)
        decayed = decay_t[..., None] * state
        if beta_t is None:
            state = decayed + _outer(b_t, _read(state, a_t)) + _outer(k_t, v_t)
        else:
            state = decayed + _outer(k_t, beta_t[..., None] * (v_t - _read(decayed, k_t)))
        outputs.append(_read(state, q_t))
    return torch.stack(outputs, dim=1), state


def _read(state: Tensor, key: Tensor) -> Tensor:
    """What the state (b h d e) holds at a key (b h d): (b h e)."""
    return (key[..., None, :] @ state).squeeze(-2)


def _outer(key: Tensor, value: Tensor) -> Tensor:
    """(b h d), (b h e) -> (b h d e)"""
    return key[..., :, None] * value[..., None, :]
