"""In-context recall (MAD, arXiv:2403.17844): pairs over and over; when a key comes again its value is asked for.

With noise, single words that mean nothing stand between pairs; fuzzy, keys and values are of one or several words.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from zoo.tasks import MAX_LENGTH, Example, TaskOptions, option

_DRAWN = 64
"""Pairs that are drawn at once."""


@dataclass(frozen=True)
class Options(TaskOptions):
    length: int = option(128, 8, MAX_LENGTH)
    """Words of an example at most; the last one belongs to a key, or a value, that was there before."""
    tokens: int = option(8, 2, 4096)
    """Different words that keys are made of, and as many for values and for noise."""
    noise: float = option(0.0, 0.0, 0.9)
    """How likely a word of noise stands where a pair could begin."""
    motif: int = option(1, 1, 8)
    """Words of the longest keys and values; any number from 1 is as likely."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 4 * self.motif:
            raise ValueError(f"motif={self.motif} takes {4 * self.motif} words to come twice, length={self.length}")


def draw(rng: np.random.Generator, options: Options) -> Example:
    while True:
        words: list[str] = []
        targets: list[str | None] = []
        memory: dict[tuple[str, ...], list[str]] = {}
        complete = 0
        for key, value in _units(rng, options):
            known = key in memory
            value = memory.setdefault(key, value) if value else []
            if len(words) + len(key) + len(value) > options.length + known:
                break
            words += [*key, *value]
            targets += [None] * (len(key) - 1) + value + [None] if known else [None] * (len(key) + len(value))
            if known:
                complete = len(words) - 1
        if complete:
            return Example(words[:complete], targets[:complete])


def vocabulary(options: Options) -> list[str]:
    return [f"{kind}{i}" for kind in "kvn" for i in range(options.tokens)]


def _units(rng: np.random.Generator, options: Options) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Pairs of key and value without end; noise has no value."""
    keys, values, noise = ([f"{kind}{i}" for i in range(options.tokens)] for kind in "kvn")
    while True:
        noisy = (rng.random(_DRAWN) < options.noise).tolist()
        lengths = rng.integers(1, options.motif + 1, size=(_DRAWN, 2)).tolist()
        tokens = rng.integers(options.tokens, size=(_DRAWN, 2, options.motif)).tolist()
        for is_noise, (of_key, of_value), (key, value) in zip(noisy, lengths, tokens, strict=True):
            if is_noise:
                yield (noise[key[0]],), []
            else:
                yield tuple([keys[i] for i in key[:of_key]]), [values[i] for i in value[:of_value]]
