"""Parity of a string of bits, asked for at every position; lengths as in xLSTM (arXiv:2405.04517)."""

from dataclasses import dataclass

import numpy as np

from zoo.tasks import MAX_LENGTH, Example, TaskOptions, option

_PARITIES = ["even", "odd"]


@dataclass(frozen=True)
class Options(TaskOptions):
    min_length: int = option(3, 1, MAX_LENGTH)
    """Bits of the shortest example."""
    length: int = option(40, 1, MAX_LENGTH)
    """Bits of the longest; every length between the two is as likely."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_length > self.length:
            raise ValueError(f"min_length={self.min_length} is above length={self.length}")


def draw(rng: np.random.Generator, options: Options) -> Example:
    bits = rng.integers(2, size=rng.integers(options.min_length, options.length + 1))
    targets = [_PARITIES[i] for i in (bits.cumsum() % 2).tolist()]
    return Example([str(bit) for bit in bits.tolist()], targets, _PARITIES)


def vocabulary(options: Options) -> list[str]:
    return ["0", "1", *_PARITIES]
