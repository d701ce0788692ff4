"""The delta rule in C++ (`native.cpp`): float32 and float64."""

import torch
from torch import Tensor

from zoo.ops.native import call


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y, end = torch.empty_like(v), torch.empty_like(state)
    inputs = (q, k, v, log_decay, state, a, b, beta, starts)
    call("delta_rule", "delta_rule_forward", v.dtype, *_sizes(q, v, log_decay), *inputs, y, end)
    return y, end


def backward(grads: list[Tensor], outputs: list[Tensor], *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    q, _, v, log_decay, *_ = inputs
    *differentiable, _ = inputs
    found = [None if x is None else torch.empty_like(x) for x in differentiable]
    call("delta_rule", "delta_rule_backward", v.dtype, *_sizes(q, v, log_decay), *inputs, *grads, *found)
    return *found, None


def _sizes(q: Tensor, v: Tensor, log_decay: Tensor) -> tuple[int, ...]:
    """b, t, h, d, e and the number of decays of a head."""
    return *q.shape, v.shape[-1], log_decay.shape[3] if log_decay.dim() == 4 else 1
