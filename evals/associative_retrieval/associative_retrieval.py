"""Associative retrieval (ARMT, arXiv:2407.04841): pairs of key and value, then a key, whose last value is asked for.

`remember` gives every key once, `rewrite` binds keys anew again and again, so old values must be forgotten.
"""

from dataclasses import dataclass

import numpy as np

from zoo.tasks import MAX_LENGTH, Example, TaskOptions, option

_QUERY = "?"


@dataclass(frozen=True)
class Options(TaskOptions):
    mode: str = option("remember", among=("remember", "rewrite"))
    """Whether a key comes once, or may come again with another value."""
    pairs: int = option(50, 1, (MAX_LENGTH - 2) // 2)
    """Pairs; an example is two words a pair and two more."""
    keys: int = option(64, 1, MAX_LENGTH)
    """Different keys."""
    values: int = option(64, 2, MAX_LENGTH)
    """Different values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "remember" and self.pairs > self.keys:
            raise ValueError(f"pairs={self.pairs} of which no key comes twice need as many, keys={self.keys}")


def draw(rng: np.random.Generator, options: Options) -> Example:
    keys = rng.choice(options.keys, options.pairs, replace=options.mode == "rewrite").tolist()
    values = rng.integers(options.values, size=options.pairs).tolist()
    memory = dict(zip(keys, values, strict=True))
    asked = list(memory)[rng.integers(len(memory))]
    words = [word for key, value in zip(keys, values, strict=True) for word in (f"k{key}", f"v{value}")]
    return Example.with_answer([*words, _QUERY, f"k{asked}"], [f"v{memory[asked]}"])


def vocabulary(options: Options) -> list[str]:
    return [*(f"k{i}" for i in range(options.keys)), *(f"v{i}" for i in range(options.values)), _QUERY]
