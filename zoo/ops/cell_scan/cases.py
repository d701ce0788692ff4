"""Inputs that the cell scan is tested on."""

import functools

import torch
from torch import Tensor

from zoo.ops.cell_scan import cell_scan
from zoo.ops.cell_scan.reference import CELLS
from zoo.ops.op import compute_dtype
from zoo.ops.testing import Case, Draw, Inputs


def _inputs(cell: str, draw: Draw, t: int) -> Inputs:
    h, d = draw.size(2), draw.size(19)
    width = CELLS[cell].gates * d
    return {
        "x": 2 * draw.normal(3, t, h, width) + 40 * (draw.uniform(3, t, h, width) < 0.1) * draw.normal(3, t, h, width),
        "recurrent": draw.normal(h, d, width) / d**0.5,
        "bias": draw.normal(h, width),
        "state": tuple(draw.normal(3, h, d) for _ in range(CELLS[cell].states)),
    }


def _without_bias(cell: str, draw: Draw, t: int) -> Inputs:
    return _inputs(cell, draw, t) | {"bias": None}


def _slstm_inputs(draw: Draw, t: int) -> Inputs:
    """Gates from next to nothing to far beyond what exp holds."""
    inputs = _inputs("slstm", draw, t)
    h, c, n, m = inputs["state"]
    gates, others = inputs["x"].chunk(2, dim=-1)
    gates = draw.uniform(*gates.shape, low=-60.0, high=60.0)
    return inputs | {"x": torch.cat([gates, others], dim=-1), "state": (h, c, n.abs() + 0.5, m)}


def _slstm_from_nothing(draw: Draw, t: int) -> Inputs:
    return _slstm_inputs(draw, t) | {"bias": None, "state": None}


def _slstm(x: Tensor, state: tuple[Tensor, ...] | None, **others) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The sLSTM with the gauge of its last state fixed: n = 1, unless it is 0. No state is one of zeros."""
    if state is None:
        *_, h, gates = x.shape
        state = (x.new_zeros(len(x), h, gates // CELLS["slstm"].gates, dtype=compute_dtype(x)),) * CELLS["slstm"].states
    y, (h, c, n, m) = cell_scan("slstm", x, state=state, **others)
    size = torch.where(n > 0, n, 1.0).detach()
    return y, (h, c / size, n / size, m.detach() + size.log())


CASES = [
    *(
        Case(name, functools.partial(cell_scan, cell), functools.partial(draw, cell), sequences=("x",))
        for cell in ("lstm", "gru")
        for name, draw in ((cell, _inputs), (f"{cell} without bias", _without_bias))
    ),
    Case("slstm", _slstm, _slstm_inputs, sequences=("x",), gauge=True),
    Case("slstm from nothing", _slstm, _slstm_from_nothing, sequences=("x",), gauge=True),
]
