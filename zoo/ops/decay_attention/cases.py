"""Inputs that decayed linear attention is tested on."""

import torch

from zoo.ops.decay_attention import decay_attention, normalized_decay_attention
from zoo.ops.testing import Case, Draw, Inputs

SEQUENCES = ("q", "k", "v", "log_decay", "log_input")


def _attention(draw: Draw, t: int) -> Inputs:
    h, d, e = draw.size(2), draw.size(19), draw.size(37)
    q, k, v = draw.normal(3, t, h, d), draw.normal(3, t, h, d), draw.normal(3, t, h, e)
    return {"q": q, "k": k, "v": v, "state": draw.normal(3, h, d, e)}


def _constant(draw: Draw, t: int) -> Inputs:
    inputs = _attention(draw, t)
    return {**inputs, "log_decay": draw.log_decay(inputs["q"].shape[2])}


def _scalar(draw: Draw, t: int) -> Inputs:
    inputs = _attention(draw, t)
    return {**inputs, "log_decay": draw.log_decay(*inputs["q"].shape[:3])}


def _scalar_bonus(draw: Draw, t: int) -> Inputs:
    inputs = _scalar(draw, t)
    return {**inputs, "bonus": draw.normal(*inputs["q"].shape[2:])}


def _vector(draw: Draw, t: int) -> Inputs:
    inputs = _attention(draw, t)
    return {**inputs, "log_decay": draw.log_decay(*inputs["q"].shape)}


def _vector_bonus(draw: Draw, t: int) -> Inputs:
    inputs = _vector(draw, t)
    return {**inputs, "bonus": draw.normal(*inputs["q"].shape[2:])}


def _constant_vector_bonus(draw: Draw, t: int) -> Inputs:
    inputs = _vector_bonus(draw, t)
    return {**inputs, "log_decay": inputs["log_decay"][0, 0]}


def _normalized(draw: Draw, t: int) -> Inputs:
    inputs = _scalar(draw, t)
    log_input = draw.uniform(*inputs["log_decay"].shape, low=-5.0, high=1.0)
    log_input = log_input.masked_fill(draw.uniform(*log_input.shape) < 0.1, -torch.inf)
    matrix = inputs["state"]
    return {**inputs, "log_input": log_input, "state": (matrix, matrix[..., 0] + 1, draw.normal(*matrix.shape[:2]))}


def _linear_attention(draw: Draw, t: int) -> Inputs:
    inputs = _normalized(draw, t)
    if inputs["q"].shape[-1] == 1:  # then the query cancels, and its gradient is nothing but rounding
        return _linear_attention(draw, t)
    matrix, normalizer, maximum = inputs["state"]
    positive = {name: inputs[name].abs() for name in ("q", "k")}
    gates = {name: torch.zeros_like(inputs[name]) for name in ("log_decay", "log_input")}
    return {**inputs, **positive, **gates, "state": (matrix, normalizer.abs(), torch.zeros_like(maximum))}


CASES = [
    Case("constant", decay_attention, _constant, ("q", "k", "v")),
    Case("scalar", decay_attention, _scalar, SEQUENCES),
    Case("scalar bonus", decay_attention, _scalar_bonus, SEQUENCES),
    Case("vector", decay_attention, _vector, SEQUENCES),
    Case("vector bonus", decay_attention, _vector_bonus, SEQUENCES),
    Case("constant vector bonus", decay_attention, _constant_vector_bonus, ("q", "k", "v")),
    Case("normalized", normalized_decay_attention, _normalized, SEQUENCES, gauge=True),
    Case("linear attention", normalized_decay_attention, _linear_attention, SEQUENCES, {"floor": 0.0}, gauge=True),
]
