"""Inputs that the short convolution is tested on."""

from zoo.ops.short_conv import short_conv
from zoo.ops.testing import Case, Draw, Inputs


def _draw(draw: Draw, t: int, width: int, has_bias: bool) -> Inputs:
    d, width = draw.size(37), draw.size(width)
    return {
        "x": draw.normal(3, t, d),
        "weight": draw.normal(d, width),
        "bias": draw.normal(d) if has_bias else None,
        "state": draw.normal(3, width - 1, d),
    }


CASES = [
    Case(
        f"w{width}{'' if has_bias else ' no bias'}",
        short_conv,
        lambda draw, t, width=width, has_bias=has_bias: _draw(draw, t, width, has_bias),
        sequences=("x",),
    )
    for width, has_bias in ((4, True), (4, False), (1, True), (7, True))
]
