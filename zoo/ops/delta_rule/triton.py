"""The delta rule in Triton: the gated form in chunks, in products of tiles; the general form one token at a time.

Letters: b batch, t tokens, h heads, d keys, e values.
"""

import torch
from torch import Tensor

from zoo.ops.delta_rule.triton_gated import forward_gated
from zoo.ops.delta_rule.triton_gated_backward import backward_gated
from zoo.ops.delta_rule.triton_general import backward_general, forward_general


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
    if beta is None or q.shape[1] == 1:
        forward_general(q, k, v, log_decay, state, a, b, beta, starts, y, end)
    else:
        forward_gated(q, k, v, log_decay, state, beta, starts, y, end)
    return y, end


def backward(
    grads: list[Tensor],
    outputs: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor | None, ...]:
    if beta is None:
        return *backward_general(*grads, q, k, v, log_decay, state, a, b, starts), None, None
    *found, grad_beta = backward_gated(*grads, q, k, v, log_decay, state, beta, starts)
    return *found, None, None, grad_beta, None


def ahead_of_time() -> dict[str, tuple[Tensor | None, ...]]:
    """Inputs of the main sizes, by name."""

    def inputs(d: int, gated: bool) -> tuple[Tensor | None, ...]:
        q = torch.empty(8, 4096, 16, d, dtype=torch.bfloat16, device="meta")
        state = torch.empty(8, 16, d, d, device="meta")
        log_decay = torch.empty(q.shape[:3] if gated else q.shape, device="meta")
        a, beta = (None, torch.empty(q.shape[:3], dtype=q.dtype, device="meta")) if gated else (q, None)
        return q, q, q, log_decay, state, a, a, beta, None

    return {
        "gated d64 bfloat16": inputs(64, gated=True),
        "gated d128 bfloat16": inputs(128, gated=True),
        "general d64 bfloat16": inputs(64, gated=False),
    }
