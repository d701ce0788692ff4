"""The selective scan beside Mamba's loop in transformers; on a GPU beside mamba-ssm."""

import inspect
from dataclasses import replace

from torch import Tensor
from transformers.models.mamba import modeling_mamba

from zoo.bench.workload import FORWARD, GPU_FORMS, PASSES, Contender, Inputs, Workload, optional
from zoo.ops.selective_scan import selective_scan
from zoo.ops.testing import Draw

_mamba_scan = inspect.unwrap(modeling_mamba.mamba_selective_scan)  # its PyTorch, whatever is installed
_mamba_step = inspect.unwrap(modeling_mamba.mamba_selective_state_update)
_selective_scan_fn = optional("mamba_ssm.ops.selective_scan_interface:selective_scan_fn")


def _draw(draw: Draw, b: int, t: int, d: int, n: int) -> Inputs:
    return {
        "x": draw.normal(b, t, d),
        "step": draw.uniform(b, t, d, low=0.001, high=0.1),
        "A": -draw.uniform(d, n, low=1.0, high=16.0),
        "B": draw.normal(b, t, n),
        "C": draw.normal(b, t, n),
        "state": 0 * draw.normal(b, d, n),  # Mamba's own scan has no other
    }


def _run(**inputs: Tensor) -> Tensor:
    return selective_scan(**inputs)[0]


def _prepare_transformers(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Inputs:  # noqa: N803
    return {"hidden_states": x.mT, "dt": step.mT, "A": A, "B": B.mT, "C": C.mT}


def _prepare_step(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Inputs:  # noqa: N803
    token = {"hidden_states": x, "dt": step, "B": B, "C": C}
    return {**{name: value.squeeze(1) for name, value in token.items()}, "A": A, "state": state}


def _prepare_mamba_ssm(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Inputs:  # noqa: N803
    return {"u": x.mT, "delta": step.mT, "A": A, "B": B.mT, "C": C.mT}


_MAIN = Workload(
    op="selective_scan",
    sizes={"b": 4, "t": 256, "d": 1024, "n": 16},
    draw=_draw,
    run=_run,
    precise=("A", "state"),
    peers=(Contender("transformers", lambda **x: _mamba_scan(**x), _prepare_transformers, lambda y: y.mT),),
)
_LONG = replace(
    _MAIN,
    variant="long",
    sizes={**_MAIN.sizes, "t": 1024},
    forms={"native": PASSES},
    peers=(),
    peak_memory=True,
)
_DECODE = replace(
    _MAIN,
    variant="decode",
    sizes={"b": 1, "t": 1, "d": 1024, "n": 16},
    passes=(FORWARD,),
    peers=(Contender("transformers", lambda **x: _mamba_step(**x), _prepare_step, lambda y: y[:, None]),),
)
ON_CPU = [_MAIN, _LONG, _DECODE]

_MAMBA_SSM = Contender(
    *("mamba_ssm", lambda **x: _selective_scan_fn(**x), _prepare_mamba_ssm, lambda y: y.mT), package="mamba_ssm"
)
ON_GPU = [replace(_MAIN, sizes={"b": 8, "t": 2048, "d": 2048, "n": 16}, forms=GPU_FORMS, peers=(_MAMBA_SSM,))]
