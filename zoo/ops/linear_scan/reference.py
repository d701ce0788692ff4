"""The linear scan one token at a time (arXiv:2402.19427, eq. 4)."""

import torch
from torch import Tensor


def linear_scan_reference(a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """a, b (b t d), state (b d) -> h (b t d), state."""
    outputs = []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
        state = a_t * state + b_t
        outputs.append(state)
    return torch.stack(outputs, dim=1), state
