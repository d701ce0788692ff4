"""Induction heads (Mamba, arXiv:2312.00752): a marker comes twice in random words; what followed it follows again."""

from dataclasses import dataclass

import numpy as np

from zoo.tasks import MAX_LENGTH, Example, TaskOptions, option

MARKER = "here"


@dataclass(frozen=True)
class Options(TaskOptions):
    length: int = option(256, 3, MAX_LENGTH)
    """Words of an example, both markers included."""
    tokens: int = option(16, 2, 4096)
    """Words to draw from, the marker not included."""


def draw(rng: np.random.Generator, options: Options) -> Example:
    tokens = _tokens(options)
    words = [tokens[i] for i in rng.integers(options.tokens, size=options.length).tolist()]
    first = int(rng.integers(options.length - 2))
    words[first] = words[-1] = MARKER
    return Example.with_answer(words, [words[first + 1]], tokens)


def vocabulary(options: Options) -> list[str]:
    return [*_tokens(options), MARKER]


def _tokens(options: Options) -> list[str]:
    return [f"t{i}" for i in range(options.tokens)]
