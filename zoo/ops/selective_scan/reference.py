"""The selective scan one token at a time (arXiv:2312.00752, eq. 2 and algorithm 2)."""

# ruff: noqa: N803, N806
# A, B and C are capitals in the field.

import torch
from torch import Tensor


def selective_scan_reference(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x, step (b t d), A (d n), B, C (b t n), state (b d n), starts (b t) -> y (b t d), state."""
    starts = [None] * x.shape[1] if starts is None else starts.unbind(1)
    outputs = []
    for x_t, step_t, B_t, C_t, start_t in zip(*(z.unbind(1) for z in (x, step, B, C)), starts, strict=True):
        if start_t is not None:
            state = state.masked_fill(start_t[:, None, None], 0.0)
        decay = (step_t[..., None] * A).exp()
        state = decay * state + (step_t * x_t)[..., None] * B_t[:, None]
        outputs.append((state * C_t[:, None]).sum(-1))
    return torch.stack(outputs, dim=1), state
