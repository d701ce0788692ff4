"""Inputs that the log-sum-exp scan is tested on."""

import torch

from zoo.ops.lse_scan import lse_scan
from zoo.ops.testing import Case, Draw, Inputs


def _average(draw: Draw, t: int) -> Inputs:
    """As in Aaren: weights of any size, 0 among them, no decay, nothing seen before."""
    d = draw.size(37)
    num, den = torch.zeros(2, 3, d, dtype=torch.float64)
    k = draw.uniform(3, t, d, low=-90.0, high=90.0)
    return {
        "k": k.masked_fill(draw.uniform(*k.shape) < 0.1, -torch.inf),
        "v": draw.normal(3, t, d),
        "log_decay": torch.zeros(d, dtype=torch.float64),
        "state": (num, den, den - torch.inf),
    }


def _decay(draw: Draw, t: int) -> Inputs:
    d = draw.size(37)
    return {
        "k": 20 * draw.normal(3, t, d),
        "v": draw.normal(3, t, d),
        "log_decay": draw.log_decay(3, t, d),
        "state": _state(draw, d),
    }


def _bonus(draw: Draw, t: int) -> Inputs:
    """As in RWKV-4: a decay and a bonus of each channel. They are more than a thread takes at a time."""
    d = draw.size(137)
    return {
        "k": 20 * draw.normal(3, t, d),
        "v": draw.normal(3, t, d),
        "log_decay": draw.log_decay(d),
        "state": _state(draw, d),
        "bonus": 5 * draw.normal(d),
    }


def _state(draw: Draw, d: int) -> tuple[torch.Tensor, ...]:
    return draw.normal(3, d), draw.uniform(3, d, low=0.1, high=2.0), 20 * draw.normal(3, d)


CASES = [
    Case("average", lse_scan, _average, sequences=("k", "v"), gauge=True),
    Case("decay", lse_scan, _decay, sequences=("k", "v", "log_decay"), gauge=True),
    Case("bonus", lse_scan, _bonus, sequences=("k", "v"), gauge=True),
]
