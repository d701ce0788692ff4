"""The short convolution beside `conv1d` as Mamba calls it."""

import inspect
from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F
from transformers.models.mamba import modeling_mamba

from zoo.bench.workload import FORWARD, GPU_FORMS, Contender, Inputs, Workload
from zoo.ops.short_conv import short_conv
from zoo.ops.testing import Draw

_conv = inspect.unwrap(modeling_mamba.causal_conv1d_fn)  # its PyTorch, whatever is installed
_conv_step = inspect.unwrap(modeling_mamba.causal_conv1d_update)


def _draw(draw: Draw, b: int, t: int, d: int, w: int) -> Inputs:
    return {
        "x": draw.normal(b, t, d),
        "weight": draw.normal(d, w),
        "bias": draw.normal(d),
        "state": 0 * draw.normal(b, w - 1, d),  # Mamba's own has no other
    }


def _run(**inputs: Tensor) -> Tensor:
    return short_conv(**inputs)[0]


def _prepare_transformers(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Inputs:
    return {"hidden_states": x.mT, "weight": weight, "bias": bias}


def _prepare_step(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Inputs:
    """Its cache has room for the token itself."""
    return {**_prepare_transformers(x, weight, bias, state), "conv_state": F.pad(state.mT, (1, 0))}


_MAIN = Workload(
    op="short_conv",
    sizes={"b": 4, "t": 1024, "d": 1024, "w": 4},
    draw=_draw,
    run=_run,
    peers=(Contender("transformers", lambda **x: _conv(**x), _prepare_transformers, lambda y: y.mT),),
)
_DECODE = replace(
    _MAIN,
    variant="decode",
    sizes={"b": 1, "t": 1, "d": 1024, "w": 4},
    passes=(FORWARD,),
    peers=(Contender("transformers", lambda **x: _conv_step(**x), _prepare_step, lambda y: y.mT),),
)
ON_CPU = [_MAIN, _DECODE]
ON_GPU = [replace(_MAIN, sizes={"b": 8, "t": 4096, "d": 4096, "w": 4}, forms=GPU_FORMS, peers=())]
