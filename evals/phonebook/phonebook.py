"""Phone-book lookup (Jelassi et al., arXiv:2402.01032): names with numbers, then one of the names again."""

from dataclasses import dataclass
from itertools import product

import numpy as np

from zoo.tasks import MAX_LENGTH, Example, TaskOptions, option
from zoo.tasks.prose import DIGITS

_FIRST = ("Al Be Ca Da El Fa Ge Ha Jo Ka Li Ma No Pe Ro Sa", "bin dra fred la mon na rick vin")
_LAST = (
    "Ash Black Cole Dun East Fair Gold Hart Ing Lang Mead North Oak Stan West Win",
    "berg by field ford land man ton well",
)
"""Beginnings and ends of names."""
_QUERY = "Now look up"


def _names(parts: tuple[str, str]) -> list[str]:
    return [first + last for first, last in product(*(part.split() for part in parts))]


_PEOPLE = [[first, last, ":"] for first, last in product(_names(_FIRST), _names(_LAST))]


@dataclass(frozen=True)
class Options(TaskOptions):
    length: int = option(256, 16, MAX_LENGTH)
    """Words of an example at most; there are as many entries as fit."""
    digits: int = option(7, 1, 10)
    """Digits of a number, each a word."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.entries <= len(_PEOPLE):
            raise ValueError(
                f"length={self.length} with digits={self.digits} is {self.entries} entries, not 1 to {len(_PEOPLE)}"
            )

    @property
    def entries(self) -> int:
        query = len(_QUERY.split()) + 3 + self.digits - 1
        return (self.length - query) // (3 + self.digits)


def draw(rng: np.random.Generator, options: Options) -> Example:
    people = [_PEOPLE[i] for i in rng.choice(len(_PEOPLE), options.entries, replace=False).tolist()]
    numbers = [[DIGITS[i] for i in row] for row in rng.integers(10, size=(options.entries, options.digits)).tolist()]
    words = [word for person, number in zip(people, numbers, strict=True) for word in (*person, *number)]
    asked = int(rng.integers(options.entries))
    return Example.with_answer([*words, *_QUERY.split(), *people[asked]], numbers[asked])


def vocabulary(options: Options) -> list[str]:
    """The same whatever the options are."""
    return [*_names(_FIRST), *_names(_LAST), *DIGITS, *_QUERY.split(), ":"]
