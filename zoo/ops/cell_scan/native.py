"""The cell scan in C++ (`native.cpp`): float32 and float64."""

import torch
from torch import Tensor

from zoo.ops.native import call


def forward(
    x: Tensor,
    recurrent: Tensor,
    bias: Tensor | None,
    state: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    cell: str,
) -> tuple[Tensor, Tensor]:
    b, t, h, _ = x.shape
    d = recurrent.shape[1]
    y, end = x.new_empty(b, t, h, d), torch.empty_like(state)
    call("cell_scan", f"{cell}_forward", x.dtype, b, t, h, d, x, recurrent, bias, state, mask, starts, y, end)
    return y, end


def backward(
    grads: list[Tensor],
    outputs: list[Tensor],
    x: Tensor,
    recurrent: Tensor,
    bias: Tensor | None,
    state: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    cell: str,
) -> tuple[Tensor | None, ...]:
    grad_x, grad_recurrent, grad_state = (torch.empty_like(part) for part in (x, recurrent, state))
    grad_bias = None if bias is None else torch.empty_like(bias)
    call(
        *("cell_scan", f"{cell}_backward", x.dtype, *outputs[0].shape, x, recurrent, bias, state, mask, starts),
        *(outputs[0], *grads, grad_x, grad_recurrent, grad_bias, grad_state),
    )
    return grad_x, grad_recurrent, grad_bias, grad_state, None, None
