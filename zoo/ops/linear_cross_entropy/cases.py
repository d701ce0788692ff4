"""Inputs that the linear cross-entropy is tested on."""

from torch import Tensor

from zoo.ops.linear_cross_entropy import linear_cross_entropy
from zoo.ops.packing import segment_starts
from zoo.ops.testing import Case, Draw, Inputs

IGNORED = -7


def _run(mask: Tensor | None = None, segments: Tensor | None = None, **inputs) -> Tensor:
    """Padding and documents are labels here: neither padding nor a document's first token is predicted."""
    labels = inputs["labels"]
    if mask is not None:
        labels = labels.masked_fill(~mask, IGNORED)
    if segments is not None:
        labels = labels.masked_fill(segment_starts(segments, mask, inputs["hidden"]), IGNORED)
    return linear_cross_entropy(**inputs | {"labels": labels}, ignore_index=IGNORED)


def _head(draw: Draw, t: int) -> Inputs:
    d, v = draw.size(13), draw.size(50)
    labels = (draw.uniform(3, t) * v).long()
    return {"hidden": draw.normal(3, t, d), "weight": draw.normal(v, d) / d**0.5, "labels": labels}


def _head_with_bias(draw: Draw, t: int) -> Inputs:
    inputs = _head(draw, t)
    return inputs | {"bias": draw.normal(len(inputs["weight"]))}


CASES = [
    Case("head", _run, _head, sequences=(), splits=False),
    Case("bias, z loss", _run, _head_with_bias, sequences=(), options={"z_loss": 0.1, "num_items": 7}, splits=False),
    Case("soft cap", _run, _head_with_bias, sequences=(), options={"soft_cap": 1.5, "z_loss": 0.1}, splits=False),
]
