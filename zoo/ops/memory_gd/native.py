"""The neural memory in C++ (`native.cpp`): float32 and float64, memories of any number of layers."""

import torch
from torch import Tensor

from zoo.ops.native import call


def forward(*inputs: Tensor | int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v, weights = inputs[2], inputs[6]
    outputs = tuple(torch.empty_like(x) for x in (v, weights, weights, weights))
    call("memory_gd", "memory_gd_forward", v.dtype, *_arguments(*inputs), *outputs)
    return outputs


def backward(grads: list[Tensor], outputs: list[Tensor], *inputs: Tensor | int | None) -> tuple[Tensor | None, ...]:
    found = [None if x is None else torch.empty_like(x) for x in inputs[:10]]
    call("memory_gd", "memory_gd_backward", inputs[2].dtype, *_arguments(*inputs), *grads, *found)
    return *found, None, None, None


def _arguments(*inputs: Tensor | int | None) -> tuple[Tensor | int | None, ...]:
    """b, t, h, d, e, the number of weights of a memory, the two options, and the tensors."""
    *tensors, hidden, width = inputs
    q, _, v, *_ = tensors
    return *q.shape, v.shape[-1], tensors[6].shape[-1], hidden, width, *tensors
