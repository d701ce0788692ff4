"""One way to say that a name is unknown: the culprit, the nearest valid names, in one line."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for `name`, which is no `kind`; it suggests the nearest of `known`, or lists a hundred of them."""
    known = list(known)
    near = get_close_matches(name, known, n=3, cutoff=0.6)
    names = ", ".join(known[:100]) + (f" and {len(known) - 100} more" if len(known) > 100 else "")
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {names or 'none'}"
    return ValueError(f"unknown {kind} {name!r}; {hint}")
