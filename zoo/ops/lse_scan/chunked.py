"""The log-sum-exp scan in parallel: the running maxima first, then two linear scans relative to them.

The maxima are a gauge and carry no gradient: they are looked for without one, and whatever rounding did to them cancels
in the exponents. Relative to them nothing is larger than 1, and num and den are linear scans of the same decays.

Letters: b batch, t tokens, d channels; n chunk, c position in it.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.linear_scan.chunked import linear_scan_chunked
from zoo.ops.lse_scan.reference import EMPTY, add, average, forget, lse_scan_reference, normalise


def lse_scan_chunked(
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
    if k.shape[1] == 1:
        return lse_scan_reference(k, v, log_decay, num, den, maximum, bonus, starts)

    if starts is not None:
        log_decay = log_decay.expand_as(k).masked_fill(starts[..., None], -torch.inf)
    maxima = _running_maxima(k, log_decay, maximum)
    maxima_before = torch.cat([maximum[:, None], maxima[:, :-1]], dim=1)
    keep, weight = ((maxima_before - maxima) + log_decay).exp(), (k - maxima).exp()
    nums, num_end = linear_scan_chunked(keep, weight * v, num)
    dens, den_end = linear_scan_chunked(keep, weight, den)

    if bonus is None:
        y = average((nums, dens, maxima))
    else:
        before = *(torch.cat([x[:, None], xs[:, :-1]], dim=1) for x, xs in ((num, nums), (den, dens))), maxima_before
        if starts is not None:
            before = forget(before, starts[..., None])
        y = average(add(before, 0.0, bonus + k, v))
    return y, *normalise((num_end, den_end, maxima[:, -1]))


@torch.no_grad()
def _running_maxima(k: Tensor, log_decay: Tensor, maximum: Tensor) -> Tensor:
    """m_t = max(m_{t-1} + w_t, k_t), (b t d): along all chunks at once, then from chunk to chunk."""
    t = k.shape[1]
    chunk = math.isqrt(t)
    log_decay = F.pad(log_decay.expand_as(k), (0, 0, 0, -t % chunk)).unflatten(1, (-1, chunk))  # b n c d
    k = F.pad(k, (0, 0, 0, -t % chunk), value=-torch.inf).unflatten(1, (-1, chunk))
    since_start, highest = [log_decay[:, :, 0]], [k[:, :, 0]]
    for decay_c, k_c in zip(log_decay.unbind(2)[1:], k.unbind(2)[1:], strict=True):
        since_start.append(since_start[-1] + decay_c)
        highest.append(torch.maximum(highest[-1] + decay_c, k_c))

    before = []
    for decay_n, highest_n in zip(since_start[-1].unbind(1), highest[-1].unbind(1), strict=True):
        before.append(maximum)
        maximum = torch.maximum(maximum + decay_n, highest_n).clamp(min=EMPTY)
    carried = torch.stack(before, dim=1)[:, :, None] + torch.stack(since_start, dim=2)
    return torch.maximum(carried, torch.stack(highest, dim=2)).clamp(min=EMPTY).flatten(1, 2)[:, :t]
