"""The linear scan beside RecurrentGemma's loop, and on a GPU beside HGRN's kernel in flash-linear-attention."""

from dataclasses import replace

from torch import Tensor
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

from zoo.bench.workload import FORWARD, GPU_FORMS, Contender, Inputs, Workload, optional
from zoo.ops.linear_scan import linear_scan
from zoo.ops.testing import Draw


def _draw(draw: Draw, b: int, t: int, d: int) -> Inputs:
    return {"a": draw.uniform(b, t, d, low=0.1), "b": draw.normal(b, t, d), "state": draw.normal(b, d)}


def _run(a: Tensor, b: Tensor, state: Tensor, kernels: str) -> Tensor:
    return linear_scan(a, b, state, kernels=kernels)[0]


def _prepare_transformers(a: Tensor, b: Tensor, state: Tensor) -> Inputs:
    return {"recurrent_gate": a, "hidden_states": b, "recurrent_states": state, "reset": a[..., :1].isnan()}


def _run_transformers(**inputs: Tensor) -> Tensor:
    return RecurrentGemmaRglru._rnn_scan(None, **inputs)[0]  # it reads nothing of its module


_chunk_hgrn = optional("fla.ops.hgrn:chunk_hgrn")


def _run_fla(x: Tensor, g: Tensor, state: Tensor) -> Tensor:
    return _chunk_hgrn(x=x, g=g, initial_state=state)[0]


_MAIN = Workload(
    op="linear_scan",
    sizes={"b": 4, "t": 1024, "d": 512},
    draw=_draw,
    run=_run,
    precise=("a", "state"),
    peers=(Contender("transformers", _run_transformers, _prepare_transformers),),
)
ON_CPU = [_MAIN, replace(_MAIN, variant="decode", sizes={"b": 1, "t": 1, "d": 512}, passes=(FORWARD,))]

_FLA = Contender("fla", _run_fla, lambda a, b, state: {"x": b, "g": a.log(), "state": state}, package="fla")
ON_GPU = [replace(_MAIN, sizes={"b": 8, "t": 4096, "d": 2560}, forms=GPU_FORMS, peers=(_FLA,))]
