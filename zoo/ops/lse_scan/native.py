"""The log-sum-exp scan in C++ (`native.cpp`): float32, float64."""

import torch
from torch import Tensor

from zoo.ops.native import call


def forward(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    num: Tensor,
    den: Tensor,
    maximum: Tensor,
    bonus: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = [torch.empty_like(x) for x in (v, num, den, maximum)]
    call(
        *("lse_scan", "lse_scan_forward", k.dtype, *k.shape, log_decay.dim() == 3),
        *(k, v, log_decay, num, den, maximum, bonus, starts, *outputs),
    )
    return tuple(outputs)


def backward(grads: list[Tensor], outputs: list[Tensor], *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    k, v, log_decay, num, den, maximum, bonus, _ = inputs
    found = [None if x is None else torch.empty_like(x) for x in (k, v, log_decay, num, den, bonus)]
    call(
        *("lse_scan", "lse_scan_backward", k.dtype, *k.shape, log_decay.dim() == 3),
        *(*inputs, *grads[:3], *found),
    )
    *found, grad_bonus = found
    return *found, torch.zeros_like(maximum), grad_bonus, None
