"""Which form of an op runs: the choice has a name and a reason, and is never changed silently.

An op's package lists its forms in `BACKENDS`, a mapping from a name in `NAMES` to a function. `choose` picks the
fastest that runs on the device; the forms there are so far run on any. `ZOO_KERNELS=reference` in the environment, or
`use_backend("reference")` around a call, asks for one form by name; an op that lacks it raises.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from zoo.errors import unknown_name

NAMES = ("auto", "reference", "chunked")

_FASTEST_FIRST = ("chunked", "reference")


class Choice(NamedTuple):
    """One form of an op, and why it was taken."""

    backend: str
    reason: str


def _checked(name: str) -> str:
    if name not in NAMES:
        raise unknown_name("kernel backend", name, NAMES)
    return name


_requested = os.environ.get("ZOO_KERNELS", "auto")  # checked where it is used: importing the zoo shall not fail


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op in the given form inside the block, in all threads of the process.

    Raises:
        ValueError: on an unknown name here, or at an op that has no such form.
    """
    global _requested
    before, _requested = _requested, _checked(name)
    try:
        yield
    finally:
        _requested = before


def choose(op: str, backends: Mapping[str, object], device: torch.device | str) -> Choice:
    """Pick the form of `op` for tensors on `device`.

    Raises:
        ValueError: if a form was asked for by name and `op` has none of that name.
    """
    if _checked(_requested) != "auto":
        if _requested not in backends:
            raise ValueError(f"{op} has no {_requested!r} backend; it has {', '.join(backends)}")
        return Choice(_requested, "asked for by name")
    for name in _FASTEST_FIRST:
        if name in backends:
            return Choice(name, f"the fastest form of {op} there is for {torch.device(device).type}")
    raise AssertionError(f"{op} lists no backend")
