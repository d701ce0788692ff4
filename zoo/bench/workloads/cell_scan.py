"""Recurrent cells; the classical ones, input weights included, beside PyTorch's own."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.bench.workload import FORWARD, GPU_FORMS, Contender, Inputs, Workload
from zoo.ops.cell_scan import cell_scan
from zoo.ops.cell_scan.reference import CELLS
from zoo.ops.testing import Draw

_TORCH_CELLS = {"lstm": torch.lstm, "gru": torch.gru}


def _draw(cell: str, draw: Draw, b: int, t: int, h: int, d: int) -> Inputs:
    width = CELLS[cell].gates * d
    return {
        "x": draw.normal(b, t, h, width),
        "recurrent": draw.normal(h, d, width) / d**0.5,
        "state": 0 * draw.normal(b, CELLS[cell].states, h, d),
    }


def _draw_from_inputs(cell: str, draw: Draw, b: int, t: int, d: int) -> Inputs:
    inputs = _draw(cell, draw, b, t, 1, d)
    weight = draw.normal(CELLS[cell].gates * d, d) / d**0.5
    return {"x": draw.normal(b, t, d), "weight": weight, "recurrent": inputs["recurrent"], "state": inputs["state"]}


def _run(cell: str, x: Tensor, recurrent: Tensor, state: Tensor, kernels: str) -> Tensor:
    return cell_scan(cell, x, recurrent, None, state.unbind(1), kernels=kernels)[0]


def _run_from_inputs(cell: str, x: Tensor, weight: Tensor, recurrent: Tensor, state: Tensor, kernels: str) -> Tensor:
    return _run(cell, F.linear(x, weight)[:, :, None], recurrent, state, kernels)[:, :, 0]


def _prepare_torch(x: Tensor, weight: Tensor, recurrent: Tensor, state: Tensor) -> Inputs:
    """PyTorch keeps recurrent weights the other way round, and the layer before the batch in its state."""
    return {"x": x, "weight": weight, "recurrent": recurrent[0].mT, "state": state.movedim(0, 2)}


def _run_torch(cell: str, x: Tensor, weight: Tensor, recurrent: Tensor, state: Tensor) -> Tensor:
    start = state.unbind(0) if len(state) > 1 else state[0]
    options = {"has_biases": False, "num_layers": 1, "dropout": 0.0, "bidirectional": False, "batch_first": True}
    return _TORCH_CELLS[cell](x, start, (weight, recurrent), train=torch.is_grad_enabled(), **options)[0]


def _workload(cell: str) -> Workload:
    return Workload(
        op="cell_scan",
        variant=cell,
        sizes={"b": 4, "t": 256, "h": 8, "d": 64},
        draw=lambda draw, **sizes: _draw(cell, draw, **sizes),
        run=lambda **inputs: _run(cell, **inputs),
        flops=lambda b, t, h, d: 2 * CELLS[cell].gates * b * t * h * d * d,
    )


def _workload_from_inputs(cell: str) -> Workload:
    return Workload(
        op="cell_scan",
        variant=f"{cell} from inputs",
        sizes={"b": 4, "t": 256, "d": 512},
        draw=lambda draw, **sizes: _draw_from_inputs(cell, draw, **sizes),
        run=lambda **inputs: _run_from_inputs(cell, **inputs),
        flops=lambda b, t, d: 4 * CELLS[cell].gates * b * t * d * d,
        peers=(Contender("torch", lambda **inputs: _run_torch(cell, **inputs), _prepare_torch),),
    )


_SLSTM = _workload("slstm")
ON_CPU = [
    _SLSTM,
    *(_workload(cell) for cell in _TORCH_CELLS),
    *(_workload_from_inputs(cell) for cell in _TORCH_CELLS),
    replace(_SLSTM, variant="slstm decode", sizes={**_SLSTM.sizes, "b": 1, "t": 1}, passes=(FORWARD,)),
]
ON_GPU = [replace(_SLSTM, sizes={"b": 64, "t": 1024, "h": 4, "d": 128}, forms=GPU_FORMS)]
