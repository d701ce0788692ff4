"""The linear scan in C++ (`native.cpp`): float32, float64, complex64, complex128."""

from torch import Tensor

from zoo.ops.native import call


def forward(a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    h, end = b.new_empty(b.shape), state.new_empty(state.shape)
    call("linear_scan", "linear_scan_forward", b.dtype, *b.shape, a, b, state, h, end)
    return h, end


def backward(grads: list[Tensor], outputs: list[Tensor], a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    grad_a, grad_b, grad_state = a.new_empty(a.shape), b.new_empty(b.shape), state.new_empty(state.shape)
    call(
        *("linear_scan", "linear_scan_backward", b.dtype, *b.shape),
        *(a, state, outputs[0], *grads, grad_a, grad_b, grad_state),
    )
    return grad_a, grad_b, grad_state
