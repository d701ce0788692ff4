"""Decayed linear attention beside Mamba-2's chunks and xLSTM's; on a GPU beside flash-linear-attention.

Mamba-2 writes `step` x and decays by exp(step A): with A = -1 its step is minus our log-decay, and its x our v over it.
"""

import functools
import importlib
import inspect
import sys
from dataclasses import replace
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor
from transformers.models.mamba2 import modeling_mamba2

from zoo.bench.workload import FORWARD, GPU_FORMS, Contender, Inputs, Workload, optional
from zoo.ops.decay_attention import decay_attention, normalized_decay_attention
from zoo.ops.testing import Draw

_CHUNK = 64

_mamba2_chunk_scan = inspect.unwrap(modeling_mamba2.mamba2_chunk_scan)  # its PyTorch, whatever is installed
_mamba2_step = inspect.unwrap(modeling_mamba2.mamba2_selective_state_update)
_chunk_simple_gla = optional("fla.ops.simple_gla:chunk_simple_gla")
_chunk_gla = optional("fla.ops.gla:chunk_gla")


@functools.cache
def transformers_xlstm() -> ModuleType:
    """A copy of transformers' `modeling_xlstm` with its own code, which gives way to the authors' package if there."""
    package = "transformers.models.xlstm"
    loaded = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(package)}
    with mock.patch("transformers.utils.is_xlstm_available", return_value=False):
        module = importlib.import_module(f"{package}.modeling_xlstm")
    sys.modules.update(loaded)
    return module


def _draw(draw: Draw, b: int, t: int, h: int, d: int, e: int) -> Inputs:
    return {
        "q": draw.unit(b, t, h, d),
        "k": draw.unit(b, t, h, d),
        "v": draw.normal(b, t, h, e),
        "log_decay": draw.uniform(b, t, h, low=-1.0, high=-0.01),
        "state": draw.normal(b, h, d, e),
    }


def _draw_vector(draw: Draw, b: int, t: int, h: int, d: int, e: int) -> Inputs:
    log_decay = draw.uniform(b, t, h, d, low=-1.0, high=-0.01)
    return {**_draw(draw, b, t, h, d, e), "log_decay": log_decay}


def _draw_normalized(draw: Draw, b: int, t: int, h: int, d: int, e: int) -> Inputs:
    inputs = _draw(draw, b, t, h, d, e)
    zeros = torch.zeros(b, h, dtype=torch.float64)
    start = {"state": 0 * inputs["state"], "normalizer": zeros[..., None].expand(b, h, d), "maximum": zeros}
    return {**inputs, "log_input": draw.normal(b, t, h), **start}


def _flops(b: int, t: int, h: int, d: int, e: int) -> float:
    return 4 * b * t * h * d * e  # a write and a read of S


def _run(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, kernels: str) -> Tensor:
    return decay_attention(q, k, v, log_decay, state, kernels=kernels)[0]


def _run_normalized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    log_input: Tensor,
    state: Tensor,
    normalizer: Tensor,
    maximum: Tensor,
    kernels: str,
) -> Tensor:
    state = (state, normalizer, maximum)
    return normalized_decay_attention(q, k, v, log_decay, log_input, state, kernels=kernels)[0]


def _prepare_mamba2(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Inputs:
    step = -log_decay
    rate = -torch.ones_like(step[0, 0])
    return {"C": q, "B": k, "hidden_states": v / step[..., None], "dt": step, "A": rate, "initial_states": state.mT}


def _run_mamba2(**inputs: Tensor) -> Tensor:
    return _mamba2_chunk_scan(**inputs, chunk_size=_CHUNK)


def _prepare_mamba2_step(**inputs: Tensor) -> Inputs:
    x = _prepare_mamba2(**inputs)
    token = {name: x[name].squeeze(1) for name in ("C", "B", "hidden_states")}
    e, d = x["initial_states"].shape[-2:]
    step = x["dt"].squeeze(1)[..., None].expand(-1, -1, e)
    rate = x["A"][:, None, None].expand(-1, e, d)  # as its layer hands them over
    return {**token, "dt": step, "A": rate, "state": x["initial_states"]}


def _prepare_xlstm(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_input: Tensor, state: Tensor, **start: Tensor
) -> Inputs:
    """Time behind heads; xLSTM scales q and takes the sigmoid of the forget gate itself."""
    gate = log_decay - (-torch.expm1(log_decay)).log()
    return {
        "query": (q * q.shape[-1] ** 0.5).transpose(1, 2),
        "key": k.transpose(1, 2),
        "value": v.transpose(1, 2),
        "igate": log_input.transpose(1, 2),
        "fgate": gate.transpose(1, 2),
        "c_initial": state,
        "n_initial": start["normalizer"],
        "m_initial": start["maximum"][..., None],
    }


def _run_xlstm(**inputs: Tensor) -> Tensor:
    return transformers_xlstm().mlstm_chunkwise_native_autograd(**inputs, chunk_size=_CHUNK)


def _run_xlstm_step(**inputs: Tensor) -> Tensor:
    return transformers_xlstm().mlstm_recurrent_step_native(**inputs)[0]


def _prepare_xlstm_step(**inputs: Tensor) -> Inputs:
    x = _prepare_xlstm(**inputs)
    token = {name: x[name].squeeze(2) for name in ("query", "key", "value")}
    names = {"cstate": "c_initial", "nstate": "n_initial", "mstate": "m_initial"}
    return {**token, "igate": x["igate"], "fgate": x["fgate"], **{name: x[of] for name, of in names.items()}}


def _run_simple_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    return _chunk_simple_gla(q=q, k=k, v=v, g=log_decay, scale=1.0, initial_state=state)[0]


def _run_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    return _chunk_gla(q=q, k=k, v=v, g=log_decay, scale=1.0, initial_state=state)[0]


_MAIN = Workload(
    op="decay_attention",
    sizes={"b": 4, "t": 1024, "h": 8, "d": 64, "e": 64},
    draw=_draw,
    run=_run,
    flops=_flops,
    peers=(Contender("transformers", _run_mamba2, _prepare_mamba2),),
)
_VECTOR = replace(_MAIN, variant="vector", draw=_draw_vector, peers=())
_NORMALIZED = replace(
    _MAIN,
    variant="normalized",
    draw=_draw_normalized,
    run=_run_normalized,
    fixed=("state", "normalizer", "maximum"),
    peers=(Contender("transformers", _run_xlstm, _prepare_xlstm, lambda y: y.transpose(1, 2)),),
)
_TOKEN = {"b": 1, "t": 1, "h": 8, "d": 64, "e": 64}
_DECODE = replace(
    _MAIN,
    variant="decode",
    sizes=_TOKEN,
    passes=(FORWARD,),
    peers=(Contender("transformers", lambda **x: _mamba2_step(**x), _prepare_mamba2_step, lambda y: y[:, None]),),
)
_NORMALIZED_DECODE = replace(
    _NORMALIZED,
    variant="normalized decode",
    sizes=_TOKEN,
    passes=(FORWARD,),
    peers=(Contender("transformers", _run_xlstm_step, _prepare_xlstm_step, lambda y: y[:, None]),),
)
ON_CPU = [
    _MAIN,
    replace(_MAIN, sizes={**_MAIN.sizes, "d": 128}),
    _VECTOR,
    _NORMALIZED,
    _DECODE,
    _NORMALIZED_DECODE,
]

_ON_GPU = {"sizes": {"b": 8, "t": 4096, "h": 16, "d": 128, "e": 128}, "forms": GPU_FORMS}
ON_GPU = [
    replace(_MAIN, **_ON_GPU, peers=(Contender("fla", _run_simple_gla, package="fla"),)),
    replace(_VECTOR, **_ON_GPU, peers=(Contender("fla", _run_gla, package="fla"),)),
]
