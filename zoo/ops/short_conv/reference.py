"""The short convolution one token at a time."""

import torch
from torch import Tensor


def short_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x (b t d), weight (d w), bias (d), state (b w-1 d), starts (b t) -> y (b t d), state."""
    outputs = []
    for t, x_t in enumerate(x.unbind(1)):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None], 0.0)
        window = torch.cat([state, x_t[:, None]], dim=1)
        y_t = (window * weight.T).sum(1)
        outputs.append(y_t if bias is None else y_t + bias)
        state = window[:, 1:]
    return torch.stack(outputs, dim=1), state
