"""The short convolution in C++ (`native.cpp`): float32, float64."""

import torch
from torch import Tensor

from zoo.ops.native import call


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, end = torch.empty_like(x), torch.empty_like(state)
    call(
        *("short_conv", "short_conv_forward", x.dtype, *x.shape, weight.shape[1]),
        *(x, weight, bias, state, starts, y, end),
    )
    return y, end


def backward(
    grads: list[Tensor],
    outputs: list[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor | None, ...]:
    found = [None if z is None else torch.empty_like(z) for z in (x, weight, bias, state)]
    call(
        *("short_conv", "short_conv_backward", x.dtype, *x.shape, weight.shape[1]),
        *(x, weight, state, starts, *grads, *found),
    )
    return *found, None
