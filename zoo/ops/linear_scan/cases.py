"""Inputs that the linear scan is tested on."""

import torch

from zoo.ops.linear_scan import linear_scan
from zoo.ops.testing import Case, Draw, Inputs


def _real(draw: Draw, t: int) -> Inputs:
    d = draw.size(37)
    return {"a": draw.log_decay(3, t, d).exp(), "b": draw.normal(3, t, d), "state": draw.normal(3, d)}


def _complex(draw: Draw, t: int) -> Inputs:
    d = draw.size(5)
    a = torch.polar(draw.log_decay(3, t, d).exp(), draw.uniform(3, t, d, high=6.3))
    b, state = (torch.complex(draw.normal(*shape), draw.normal(*shape)) for shape in ((3, t, d), (3, d)))
    return {"a": a, "b": b, "state": state}


CASES = [
    Case("real", linear_scan, _real, sequences=("a", "b")),
    Case("complex", linear_scan, _complex, sequences=("a", "b")),
]
