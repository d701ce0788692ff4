"""Linear cross-entropy from the logits of all tokens.

Letters: n tokens, d features, v words of the vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.linear_cross_entropy.labels import check_labels
from zoo.ops.op import compute_dtype
from zoo.ops.precision import without_autocast


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    z_loss: float,
    soft_cap: float | None,
) -> Tensor:
    """hidden (n d), weight (v d), bias (v), labels (n) -> the sum of the tokens' losses."""
    check_labels(labels, ignore_index, len(weight))
    dtype = compute_dtype(hidden, weight)
    counted = labels != ignore_index
    hidden = hidden.masked_fill(~counted[:, None], 0.0)  # not to be read, not even in a gradient
    with without_autocast(hidden.device.type):
        logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        loss = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
        normaliser = torch.logsumexp(logits, dim=-1)
        return (loss + z_loss * normaliser.square() * counted).sum()
