"""The weights of a memory: one matrix a layer, kept as one row of numbers a head.

Letters: d key, e value, f hidden units, w all the weights of one memory.
"""

import torch
from torch import Tensor


def join_layers(layers: tuple[Tensor, ...]) -> Tensor:
    """Matrices (... in out) -> (... w), layer by layer, each row by row."""
    return torch.cat([layer.flatten(-2) for layer in layers], dim=-1)


def split_layers(weights: Tensor, d: int, e: int, hidden: int) -> list[Tensor]:
    """(... w) -> its matrices: (... d e) where `hidden` is 0, (... d f) and (... f e) where it is f."""
    shapes = [(d, hidden), (hidden, e)] if hidden else [(d, e)]
    parts = weights.split([rows * columns for rows, columns in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]
