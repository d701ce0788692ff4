"""The delta rule beside Qwen3-Next's chunks; on a GPU beside flash-linear-attention."""

import inspect
from dataclasses import replace

from torch import Tensor
from transformers.models.qwen3_next import modeling_qwen3_next

from zoo.bench.workload import FORWARD, GPU_FORMS, Contender, Inputs, Workload, optional
from zoo.ops.delta_rule import delta_rule, gated_delta_rule
from zoo.ops.testing import Draw

_qwen_chunks = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
_qwen_steps = inspect.unwrap(modeling_qwen3_next.torch_recurrent_gated_delta_rule)
_chunk_gated_delta_rule = optional("fla.ops.gated_delta_rule:chunk_gated_delta_rule")
_chunk_rwkv7 = optional("fla.ops.rwkv7:chunk_rwkv7")


def _draw_gated(draw: Draw, b: int, t: int, h: int, d: int, e: int) -> Inputs:
    return {
        "q": draw.unit(b, t, h, d),
        "k": draw.unit(b, t, h, d),
        "v": draw.normal(b, t, h, e),
        "beta": draw.uniform(b, t, h),
        "log_decay": draw.uniform(b, t, h, low=-1.0, high=-0.01),
        "state": draw.normal(b, h, d, e),
    }


def _draw_dplr(draw: Draw, b: int, t: int, h: int, d: int, e: int) -> Inputs:
    """As in RWKV-7, whose log-decays are no less than -exp(-1/2)."""
    inputs = _draw_gated(draw, b, t, h, d, e)
    removed = draw.unit(b, t, h, d)
    log_decay = draw.uniform(b, t, h, d, low=-0.6, high=0.0)
    rest = {name: inputs[name] for name in ("q", "k", "v", "state")}
    return {**rest, "a": -removed, "b": removed * inputs["beta"][..., None], "log_decay": log_decay}


def _run_gated(**inputs: Tensor) -> Tensor:
    return gated_delta_rule(**inputs)[0]


def _run_dplr(**inputs: Tensor) -> Tensor:
    return delta_rule(**inputs)[0]


def _prepare_qwen(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor) -> Inputs:
    """It scales queries itself."""
    query = q * q.shape[-1] ** 0.5
    return {"query": query, "key": k, "value": v, "beta": beta, "g": log_decay, "initial_state": state}


def _run_fla_gated(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    return _chunk_gated_delta_rule(q=q, k=k, v=v, g=log_decay, beta=beta, scale=1.0, initial_state=state)[0]


def _run_fla_rwkv7(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    return _chunk_rwkv7(r=q, w=log_decay, k=k, v=v, a=a, b=b, scale=1.0, initial_state=state)[0]


_GATED = Workload(
    op="delta_rule",
    variant="gated",
    sizes={"b": 4, "t": 1024, "h": 8, "d": 64, "e": 64},
    draw=_draw_gated,
    run=_run_gated,
    flops=lambda b, t, h, d, e: 6 * b * t * h * d * e,  # S is read by k, written, read by q
    peers=(Contender("transformers", lambda **x: _qwen_chunks(**x)[0], _prepare_qwen),),
)
_DPLR = replace(
    _GATED,
    variant="dplr",
    draw=_draw_dplr,
    run=_run_dplr,
    flops=lambda b, t, h, d, e: 8 * b * t * h * d * e,  # and written twice
    peers=(),
)
_DECODE = replace(
    _GATED,
    variant="gated decode",
    sizes={"b": 1, "t": 1, "h": 8, "d": 64, "e": 64},
    passes=(FORWARD,),
    peers=(Contender("transformers", lambda **x: _qwen_steps(**x)[0], _prepare_qwen),),
)
ON_CPU = [_GATED, _DPLR, _DECODE]

_ON_GPU = {"sizes": {"b": 8, "t": 4096, "h": 16, "d": 64, "e": 64}, "forms": GPU_FORMS}
ON_GPU = [
    replace(_GATED, **_ON_GPU, peers=(Contender("fla", _run_fla_gated, package="fla"),)),
    replace(_DPLR, **_ON_GPU, peers=(Contender("fla", _run_fla_rwkv7, package="fla"),)),
]
