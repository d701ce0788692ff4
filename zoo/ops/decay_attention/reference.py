"""Decayed linear attention one token at a time, as the papers write it.

Letters: b batch, t tokens, h heads, d key width, e value width.
"""

import torch
from torch import Tensor


def decay_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    bonus: Tensor | None,
    normalizer: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """arXiv:2307.08621, eq. 6; with a bonus arXiv:2404.05892. The arguments are those of the op."""
    decays = log_decay.exp() if log_decay.dim() == 4 else log_decay.exp()[..., None]  # b t h d|1
    n, outputs, q_n = normalizer, [], []
    for t, (q_t, k_t, v_t, decay) in enumerate(zip(*(x.unbind(1) for x in (q, k, v, decays)), strict=True)):
        if starts is not None:
            state, n = _empty_at(starts[:, t], state, n)
        write = k_t[..., :, None] * v_t[..., None, :]
        read = state if bonus is None else state + bonus[..., None] * write
        state = decay[..., None] * state + write
        read = state if bonus is None else read
        outputs.append((q_t[..., :, None] * read).sum(-2))
        if n is not None:
            n = decay * n + k_t
            q_n.append((q_t * n).sum(-1))
    if n is None:
        return torch.stack(outputs, dim=1), state, v.new_empty(0), state.new_empty(0)
    return torch.stack(outputs, dim=1), state, torch.stack(q_n, dim=1), n


def normalized_decay_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    log_input: Tensor,
    state: Tensor,
    normalizer: Tensor,
    maximum: Tensor,
    starts: Tensor | None,
    floor: float,
    eps: float,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """arXiv:2405.04517, eq. 19-27, stabilised as in its eq. 15-17. The arguments are those of the public function."""
    n, m, outputs = normalizer, maximum.detach(), []
    sequences = (x.unbind(1) for x in (q, k, v, log_decay, log_input))
    for t, (q_t, k_t, v_t, log_decay_t, log_input_t) in enumerate(zip(*sequences, strict=True)):
        if starts is not None:
            state, n, m = _empty_at(starts[:, t], state, n, m)
        before, m = m, torch.maximum(log_decay_t + m, log_input_t).detach()
        unit = m.clamp(min=-1e30)  # -inf less -inf is no number
        decay = (log_decay_t + before - unit).exp()[..., None]
        k_t = (log_input_t - unit).exp()[..., None] * k_t
        state = decay[..., None] * state + k_t[..., :, None] * v_t[..., None, :]
        n = decay * n + k_t
        normal = (n * q_t).sum(-1).abs()
        if floor:
            normal = torch.maximum(normal, floor * (-m).exp())
        outputs.append((q_t[..., :, None] * state).sum(-2) / (normal + eps)[..., None])
    return torch.stack(outputs, dim=1), (state, n, m)


def _empty_at(start: Tensor, *states: Tensor | None) -> list[Tensor | None]:
    """States (b ...) of zeros where `start` (b) is True."""
    return [x if x is None else x.masked_fill(start.reshape(-1, *[1] * (x.dim() - 1)), 0.0) for x in states]
