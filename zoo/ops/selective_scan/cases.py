"""Inputs that the selective scan is tested on."""

# ruff: noqa: N806
# A, B and C are capitals in the field.

from zoo.ops.selective_scan import selective_scan
from zoo.ops.testing import Case, Draw, Inputs


def _draw(draw: Draw, t: int, d: int, n: int) -> Inputs:
    d, n = draw.size(d), draw.size(n)
    A = -draw.uniform(d, n, low=0.5, high=16.0)
    return {
        "x": draw.normal(3, t, d),
        "step": -draw.log_decay(3, t, d).clamp(min=-480.0) / 16,  # step A goes from 0 down to -480, a decay of 0
        "A": A,
        "B": draw.normal(3, t, n),
        "C": draw.normal(3, t, n),
        "state": draw.normal(3, d, n),
    }


CASES = [
    Case(
        f"d{d} n{n}", selective_scan, lambda draw, t, d=d, n=n: _draw(draw, t, d, n), sequences=("x", "step", "B", "C")
    )
    for d, n in ((37, 16), (133, 3))
]
