"""Selective copying (Mamba, arXiv:2312.00752): a few words scattered in noise are written down again in order."""

from dataclasses import dataclass

import numpy as np

from zoo.tasks import MAX_LENGTH, Example, TaskOptions, option

NOISE, COPY = ".", "copy"


@dataclass(frozen=True)
class Options(TaskOptions):
    length: int = option(256, 3, MAX_LENGTH)
    """Words of an example: noise and words to copy, the order to copy, and all of the copy but its last word."""
    items: int = option(16, 1, 4096)
    """Words to copy."""
    tokens: int = option(16, 2, 4096)
    """Different words that there are to copy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 2 * self.items:
            raise ValueError(f"items={self.items} and their copy take {2 * self.items} words, length={self.length}")


def draw(rng: np.random.Generator, options: Options) -> Example:
    tokens = _tokens(options)
    items = [tokens[i] for i in rng.integers(options.tokens, size=options.items).tolist()]
    words = [NOISE] * (options.length - options.items) + [COPY]
    places = np.sort(rng.choice(len(words) - 1, options.items, replace=False))
    for place, item in zip(places.tolist(), items, strict=True):
        words[place] = item
    return Example.with_answer(words, items)


def vocabulary(options: Options) -> list[str]:
    return [*_tokens(options), NOISE, COPY]


def _tokens(options: Options) -> list[str]:
    return [f"t{i}" for i in range(options.tokens)]
