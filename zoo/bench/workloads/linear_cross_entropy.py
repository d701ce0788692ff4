"""The head and its loss beside transformers' loss, which has the logits of all tokens at once."""

from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from zoo.bench.workload import GPU_FORMS, Contender, Inputs, Workload
from zoo.ops.linear_cross_entropy import linear_cross_entropy
from zoo.ops.testing import Draw


def _draw(draw: Draw, n: int, d: int, v: int) -> Inputs:
    labels = draw.uniform(n, high=v).long()
    return {"hidden": draw.normal(n, d), "weight": draw.normal(v, d) / d**0.5, "labels": labels}


def _run_transformers(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return ForCausalLMLoss(F.linear(hidden, weight), None, len(weight), shift_labels=labels)


_MAIN = Workload(
    op="linear_cross_entropy",
    sizes={"n": 2048, "d": 512, "v": 32000},
    draw=_draw,
    run=linear_cross_entropy,
    fixed=(),
    precise=(),
    flops=lambda n, d, v: 2 * n * d * v,
    peers=(Contender("transformers", _run_transformers),),
    peak_memory=True,
)
ON_CPU = [_MAIN]
ON_GPU = [replace(_MAIN, sizes={"n": 16384, "d": 2048, "v": 128000}, forms=GPU_FORMS)]
