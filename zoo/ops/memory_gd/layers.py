"""The weights of a memory: one matrix a layer, kept as one row of numbers a head.

Letters: d key, e value, f hidden units, w all the weights of one memory.
"""

import torch
from torch import Tensor


def join_layers(layers: tuple[Tensor, ...]) -> Tensor:
    """Matrices (... in out) -> (... w), layer by layer, each row by row."""
    return torch.cat([layer.flatten(-2) for layer in layers], dim=-1)


def split_layers(weights: Tensor, d: int, e: int, hidden: int) -> list[Tensor]:
    """(... w) -> its matrices: (... d e) where `hidden` is 0, (... d f), (... f f) ..., (... f e) where it is f.

    Raises:
        ValueError: if the weights do not fill such matrices.
    """
    shapes = [(d, hidden), (hidden, e)] if hidden else [(d, e)]
    between = weights.shape[-1] - sum(rows * columns for rows, columns in shapes)
    if between < 0 or between % (hidden**2 or between + 1):
        raise ValueError(f"memory_gd: {weights.shape[-1]} weights fill no layers from {d} to {e}, {hidden} between")
    if between:
        shapes[1:1] = [(hidden, hidden)] * (between // hidden**2)
    parts = weights.split([rows * columns for rows, columns in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]
