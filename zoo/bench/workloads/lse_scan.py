"""The log-sum-exp scan as in RWKV-4, beside its loop in transformers."""

from dataclasses import replace

import torch
from torch import Tensor
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from zoo.bench.workload import FORWARD, GPU_FORMS, Contender, Inputs, Workload
from zoo.ops.lse_scan import lse_scan
from zoo.ops.testing import Draw


def _draw(draw: Draw, b: int, t: int, d: int) -> Inputs:
    zeros = torch.zeros(b, d, dtype=torch.float64)
    return {
        "k": draw.normal(b, t, d),
        "v": draw.normal(b, t, d),
        "log_decay": draw.uniform(d, low=-1.0, high=-0.01),
        "bonus": draw.normal(d),
        "num": zeros,
        "den": zeros,
        "maximum": zeros - 1e38,
    }


def _run(num: Tensor, den: Tensor, maximum: Tensor, kernels: str, **inputs: Tensor) -> Tensor:
    return lse_scan(**inputs, state=(num, den, maximum), kernels=kernels)[0]


def _prepare_transformers(k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, **state: Tensor) -> Inputs:
    return {"key": k, "value": v, "time_decay": (-log_decay).log(), "time_first": bonus, **state}


def _run_transformers(num: Tensor, den: Tensor, maximum: Tensor, **inputs: Tensor) -> Tensor:
    return rwkv_linear_attention_cpu(**inputs, state=(num, den, maximum))[0]


_MAIN = Workload(
    op="lse_scan",
    sizes={"b": 4, "t": 1024, "d": 512},
    draw=_draw,
    run=_run,
    fixed=("num", "den", "maximum"),
    precise=("num", "den", "maximum", "log_decay", "bonus"),
    peers=(Contender("transformers", _run_transformers, _prepare_transformers),),
)
ON_CPU = [_MAIN, replace(_MAIN, variant="decode", sizes={"b": 1, "t": 1, "d": 512}, passes=(FORWARD,))]
ON_GPU = [replace(_MAIN, sizes={"b": 8, "t": 4096, "d": 2048}, forms=GPU_FORMS, peers=())]
