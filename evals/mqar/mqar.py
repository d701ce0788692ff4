"""Multi-query associative recall (Zoology, arXiv:2312.04927): key-value pairs, then the keys again at random distances.

The layout is that of the authors' generator: all pairs stand in front; behind them each key returns once, at an even
offset drawn from a power law, and random words fill the rest. After a key its value is asked for; the word that
follows is filler, so no answer stands in the text.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from zoo.tasks import MAX_LENGTH, Example, TaskOptions, option

_POWER = 0.01
"""Exponent of the distances between a pair and its query; 1 would be uniform."""


@dataclass(frozen=True)
class Options(TaskOptions):
    length: int = option(64, 4, MAX_LENGTH)
    """Words of an example."""
    pairs: int = option(4, 1, MAX_LENGTH // 4)
    """Key-value pairs, and queries."""
    vocabulary_size: int = option(8192, 4, 2 * MAX_LENGTH)
    """Words there are; the first half are keys, the second values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if 4 * self.pairs > self.length:
            raise ValueError(f"pairs={self.pairs} and their queries take {4 * self.pairs} words, length={self.length}")
        if 2 * self.pairs > self.vocabulary_size:
            raise ValueError(
                f"pairs={self.pairs} need as many keys and values, vocabulary_size={self.vocabulary_size} has "
                f"{self.vocabulary_size // 2} of each"
            )


def draw(rng: np.random.Generator, options: Options) -> Example:
    names, half, pairs = _names(options.vocabulary_size), options.vocabulary_size // 2, options.pairs
    keys = rng.choice(half, pairs, replace=False)
    values = half + rng.choice(options.vocabulary_size - half, pairs, replace=False)
    words = rng.integers(options.vocabulary_size, size=options.length)
    words[0 : 2 * pairs : 2], words[1 : 2 * pairs : 2] = keys, values
    distances = np.arange(1, (options.length - 2 * pairs) // 2 + 1) ** (_POWER - 1)
    queries = 2 * pairs + 2 * rng.choice(len(distances), pairs, replace=False, p=distances / distances.sum())
    words[queries] = keys
    targets: list[str | None] = [None] * options.length
    for query, value in zip(queries.tolist(), values.tolist(), strict=True):
        targets[query] = names[value]
    return Example([names[word] for word in words.tolist()], targets)


def vocabulary(options: Options) -> list[str]:
    return list(_names(options.vocabulary_size))


@cache
def _names(vocabulary_size: int) -> tuple[str, ...]:
    half = vocabulary_size // 2
    return (*(f"k{i}" for i in range(half)), *(f"v{i}" for i in range(vocabulary_size - half)))
