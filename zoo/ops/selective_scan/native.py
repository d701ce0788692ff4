"""The selective scan in C++ (`native.cpp`): float32, float64."""

# ruff: noqa: N803, N806
# A, B and C are capitals in the field.

from torch import Tensor

from zoo.ops.native import call


def forward(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, end = x.new_empty(x.shape), state.new_empty(state.shape)
    call(
        *("selective_scan", "selective_scan_forward", x.dtype, *x.shape, A.shape[1]),
        *(x, step, A, B, C, state, starts, y, end),
    )
    return y, end


def backward(grads: list[Tensor], outputs: list[Tensor], *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, starts = inputs
    x, A = tensors[0], tensors[2]
    found = [z.new_empty(z.shape) for z in tensors]
    call(
        *("selective_scan", "selective_scan_backward", x.dtype, *x.shape, A.shape[1]),
        *(*tensors, starts, *grads, *found),
    )
    return *found, None
