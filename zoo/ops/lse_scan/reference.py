"""The log-sum-exp scan one token at a time (arXiv:2405.13956, section 3.1; arXiv:2305.13048, appendix D)."""

import torch
from torch import Tensor

EMPTY = -1e38  # the maximum where nothing has been seen: finite, so that no two infinities are subtracted

State = tuple[Tensor, Tensor, Tensor]


def lse_scan_reference(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    num: Tensor,
    den: Tensor,
    maximum: Tensor,
    bonus: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k, v (b t d), log_decay (b t d | d), state (b d) each, bonus (d), starts (b t) -> y (b t d), state."""
    state = num, den, maximum
    outputs = []
    for t, (k_t, v_t, decay_t) in enumerate(
        zip(k.unbind(1), v.unbind(1), log_decay.expand_as(k).unbind(1), strict=True)
    ):
        if starts is not None:
            state = forget(state, starts[:, t, None])
        if bonus is None:
            state = add(state, decay_t, k_t, v_t)
            outputs.append(average(state))
        else:
            outputs.append(average(add(state, 0.0, bonus + k_t, v_t)))
            state = add(state, decay_t, k_t, v_t)
    return torch.stack(outputs, dim=1), *normalise(state)


def add(state: State, log_decay: Tensor | float, k: Tensor, v: Tensor) -> State:
    """The state decayed, and v with the weight exp(k).

    The exponent of what is kept is summed in this order because the rounding of the new maximum cancels in it.
    """
    num, den, before = state
    maximum = torch.maximum(before + log_decay, k).clamp(min=EMPTY).detach()
    keep, weight = ((before - maximum) + log_decay).exp(), (k - maximum).exp()
    return keep * num + weight * v, keep * den + weight, maximum


def average(state: State) -> Tensor:
    num, den, _ = state
    return num / torch.where(den == 0, 1.0, den)


def forget(state: State, where: Tensor) -> State:
    num, den, maximum = state
    return num.masked_fill(where, 0.0), den.masked_fill(where, 0.0), maximum.masked_fill(where, EMPTY)


def normalise(state: State) -> State:
    """The same state with den = 1, or 0 where nothing has been seen: what a sequence ends with, however it was cut."""
    num, den, maximum = state
    total = total_of(den)
    return num / total, den / total, maximum.detach() + total.log()


def total_of(den: Tensor) -> Tensor:
    """What `normalise` divides by: a gauge, without a gradient."""
    return torch.where(den > 0, den, 1.0).detach()
