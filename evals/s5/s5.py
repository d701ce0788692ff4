"""Word problems of finite groups (Merrill et al., arXiv:2404.08819): the product of all elements read so far.

S5, the permutations of five things, cannot be tracked by a network of constant depth unless TC0 = NC1; nor can A5, its
even permutations. Z60, as large as A5 but commutative, can.
"""

from dataclasses import dataclass
from functools import cache
from itertools import accumulate, permutations

import numpy as np

from zoo.tasks import MAX_LENGTH, Example, TaskOptions, option


@dataclass(frozen=True)
class Options(TaskOptions):
    group: str = option("s5", among=("s3", "a4", "s4", "a5", "s5", "z2", "z60"))
    """Symmetric, alternating or cyclic, and its degree."""
    length: int = option(32, 1, MAX_LENGTH)
    """Elements of an example."""


def draw(rng: np.random.Generator, options: Options) -> Example:
    names, table = _group(options.group)
    elements = rng.integers(len(names), size=options.length).tolist()
    products = accumulate(elements, lambda product, element: table[product][element])
    return Example([names[i] for i in elements], [names[i] for i in products], names)


def vocabulary(options: Options) -> list[str]:
    return _group(options.group)[0]


@cache
def _group(name: str) -> tuple[list[str], list[list[int]]]:
    """The names of a group's elements, and `table[a][b]`, the element that is a and then b.

    A permutation of 1 to n is named by what it puts in each place: after 231 the thing that was second comes first.
    """
    kind, degree = name[0], int(name[1:])
    if kind == "z":
        return [str(i) for i in range(degree)], [[(a + b) % degree for b in range(degree)] for a in range(degree)]
    elements = [p for p in permutations(range(degree)) if kind == "s" or _is_even(p)]
    index = {element: i for i, element in enumerate(elements)}
    table = [[index[tuple(a[i] for i in b)] for b in elements] for a in elements]
    return ["".join(str(i + 1) for i in element) for element in elements], table


def _is_even(permutation: tuple[int, ...]) -> bool:
    inversions = sum(a > b for i, a in enumerate(permutation) for b in permutation[i:])
    return inversions % 2 == 0
