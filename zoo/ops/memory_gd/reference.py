"""The neural memory one token at a time, as the paper writes it (arXiv:2501.00663, eq. 8-15).

Letters: b batch, t token, h head, d key, e value, w all the weights of a memory, n chunk.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.memory_gd.layers import split_layers


def memory_gd_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    momentum: Tensor,
    decay: Tensor,
    weights: Tensor,
    surprise: Tensor,
    anchor: Tensor,
    initial: Tensor | None,
    real: Tensor | None,
    refresh: Tensor | None,
    reset: Tensor | None,
    hidden: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k (b t h d), v (b t h e), step, momentum, decay (b t h), weights, surprise, anchor (b h w), initial (h w),
    real (b t), refresh, reset (b n) -> y (b t h e), weights, surprise, anchor."""
    d, e = k.shape[-1], v.shape[-1]

    def read(weights: Tensor, x: Tensor) -> Tensor:
        first, *others = split_layers(weights, d, e, hidden)
        x = x[..., None, :] @ first
        for layer in others:
            x = F.silu(x) @ layer
        return x.squeeze(-2)

    def loss(weights: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (read(weights, k) - v).square().sum()  # over rows and heads too: their memories are apart

    outputs = []
    for t, (q_t, k_t, v_t, step_t, momentum_t, decay_t) in enumerate(
        zip(*(x.unbind(1) for x in (q, k, v, step, momentum, decay)), strict=True)
    ):
        if t % width == 0:
            chunk = t // width
            if reset is not None:
                weights = torch.where(reset[:, chunk, None, None], initial, weights)
                surprise = surprise.masked_fill(reset[:, chunk, None, None], 0.0)
            anchor = weights if refresh is None else torch.where(refresh[:, chunk, None, None], weights, anchor)
        gradient = torch.func.grad(loss)(anchor, k_t, v_t)
        surprised = momentum_t[..., None] * surprise - step_t[..., None] * gradient
        learned = (1 - decay_t)[..., None] * weights + surprised
        if real is not None:
            surprised = torch.where(real[:, t, None, None], surprised, surprise)
            learned = torch.where(real[:, t, None, None], learned, weights)
        surprise, weights = surprised, learned
        outputs.append(read(weights, q_t))
    return torch.stack(outputs, dim=1), weights, surprise, anchor
