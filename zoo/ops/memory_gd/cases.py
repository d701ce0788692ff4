"""Inputs that the neural memory is tested on."""

import itertools

import torch

from zoo.ops.memory_gd import MemoryState, memory_gd
from zoo.ops.memory_gd.layers import join_layers
from zoo.ops.testing import Case, Draw, Inputs

SEQUENCES = ("q", "k", "v", "step", "momentum", "decay")


def _inputs(draw: Draw, t: int, *sizes: int) -> Inputs:
    """Sizes of the keys, of the hidden layer if there is one, and of the values."""
    initial = tuple(draw.normal(2, *shape) / shape[0] ** 0.5 for shape in itertools.pairwise(sizes))
    weights, surprise, anchor = (0.3 * draw.normal(3, *join_layers(initial).shape) for _ in range(3))
    return {
        "q": draw.unit(3, t, 2, sizes[0]),
        "k": draw.unit(3, t, 2, sizes[0]),
        "v": draw.normal(3, t, 2, sizes[-1]),
        "step": draw.gate(3, t, 2, high=0.2),
        "momentum": draw.gate(3, t, 2).pow(0.5),
        "decay": draw.gate(3, t, 2).pow(2),
        "state": MemoryState(weights, surprise, anchor, torch.tensor([0, 1, 3])),
        "initial": initial,
    }


def _linear(draw: Draw, t: int) -> Inputs:
    return _inputs(draw, t, draw.size(5), draw.size(6))


def _two_layers(draw: Draw, t: int) -> Inputs:
    return _inputs(draw, t, draw.size(5), draw.size(7), draw.size(6))


def _start(draw: Draw, t: int) -> Inputs:
    return _two_layers(draw, t) | {"state": None}


CASES = [
    Case("linear", memory_gd, _linear, SEQUENCES, {"chunk_size": 4}),
    Case("two layers", memory_gd, _two_layers, SEQUENCES, {"chunk_size": 16}),
    Case("start of a sequence", memory_gd, _start, SEQUENCES, {"chunk_size": 16}),
    Case("long chunks", memory_gd, _start, SEQUENCES, {"chunk_size": 70}),
]
