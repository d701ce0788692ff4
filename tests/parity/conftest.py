"""What the comparisons with other implementations share."""

from collections.abc import Callable, Mapping

import pytest


@pytest.fixture(scope="session")
def renamer() -> Callable[[Mapping[str, str]], Callable[[str], str]]:
    """Makes a function that rewrites a parameter's name part by part: `a.b.weight` by {"b": "c"} is `a.c.weight`."""
    return lambda names: lambda name: ".".join(names.get(part, part) for part in name.split("."))
