"""The neural memory of two layers; the loop takes a gradient for each token."""

from dataclasses import replace

from torch import Tensor

from zoo.bench.workload import GPU_FORMS, Inputs, Workload
from zoo.ops.memory_gd import memory_gd
from zoo.ops.testing import Draw

_CHUNK = 64


def _draw(draw: Draw, b: int, t: int, h: int, d: int, e: int, f: int) -> Inputs:
    return {
        "q": draw.unit(b, t, h, d),
        "k": draw.unit(b, t, h, d),
        "v": draw.normal(b, t, h, e),
        "step": draw.uniform(b, t, h, high=0.2),
        "momentum": draw.uniform(b, t, h, high=0.9),
        "decay": draw.uniform(b, t, h, high=0.1),
        "first": draw.normal(h, d, f) / d**0.5,
        "second": draw.normal(h, f, e) / f**0.5,
    }


def _run(first: Tensor, second: Tensor, kernels: str, **inputs: Tensor) -> Tensor:
    return memory_gd(**inputs, state=None, initial=(first, second), chunk_size=_CHUNK, kernels=kernels)[0]


def _flops(b: int, t: int, h: int, d: int, e: int, f: int) -> float:
    return 2 * b * t * h * f * (3 * d + 4 * e)  # q and k through both layers, an error back, a write to both


_MAIN = Workload(
    op="memory_gd",
    sizes={"b": 2, "t": 512, "h": 1, "d": 64, "e": 64, "f": 128},
    draw=_draw,
    run=_run,
    fixed=(),
    precise=("first", "second"),
    flops=_flops,
)
ON_CPU = [_MAIN]
ON_GPU = [replace(_MAIN, sizes={"b": 8, "t": 4096, "h": 8, "d": 64, "e": 64, "f": 128}, forms=GPU_FORMS)]
