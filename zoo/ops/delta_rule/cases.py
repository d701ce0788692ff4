"""Inputs that the delta rule is tested on. Keys have length 1, so that no transition lengthens a vector."""

from torch import Tensor

from zoo.ops.delta_rule import delta_rule, gated_delta_rule
from zoo.ops.testing import Case, Draw, Inputs


def _sequences(draw: Draw, t: int, h: int, d: int) -> dict[str, Tensor]:
    e = draw.size(7)
    return {
        "q": draw.normal(3, t, h, d),
        "k": draw.unit(3, t, h, d),
        "v": draw.normal(3, t, h, e),
        "state": draw.normal(3, h, d, e),
    }


def _general(draw: Draw, t: int, by_channel: bool = False) -> Inputs:
    """As RWKV-7 has it: the transition is diag(w) - kappa (kappa * iclr)^T read from the other side."""
    h, d = draw.size(2), draw.size(13)
    kappa, iclr = draw.unit(3, t, h, d), draw.gate(3, t, h, d)
    log_decay = draw.log_decay(3, t, h, d) if by_channel else draw.log_decay(3, t, h)
    return {"a": -kappa, "b": kappa * iclr, "log_decay": log_decay, **_sequences(draw, t, h, d)}


def _general_by_channel(draw: Draw, t: int) -> Inputs:
    return _general(draw, t, by_channel=True)


def _gated(draw: Draw, t: int) -> Inputs:
    h, d = draw.size(2), draw.size(13)
    gates = {"beta": draw.gate(3, t, h, high=2.0), "log_decay": draw.log_decay(3, t, h)}
    return {**gates, **_sequences(draw, t, h, d)}


def _gated_by_channel(draw: Draw, t: int) -> Inputs:
    h, d = draw.size(2), draw.size(13)
    gates = {"beta": draw.gate(3, t, h), "log_decay": draw.log_decay(3, t, h, d)}
    return {**gates, **_sequences(draw, t, h, d)}


def _without_decay(draw: Draw, t: int) -> Inputs:
    return {**_gated(draw, t), "log_decay": None}


_GENERAL = ("q", "k", "v", "a", "b", "log_decay")
_GATED = ("q", "k", "v", "beta", "log_decay")

CASES = [
    Case("vector decay", delta_rule, _general_by_channel, sequences=_GENERAL),
    Case("scalar decay", delta_rule, _general, sequences=_GENERAL),
    Case("gated", gated_delta_rule, _gated, sequences=_GATED),
    Case("gated by channel", gated_delta_rule, _gated_by_channel, sequences=_GATED),
    Case("no decay", gated_delta_rule, _without_decay, sequences=("q", "k", "v", "beta")),
]
