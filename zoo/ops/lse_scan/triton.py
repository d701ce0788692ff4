"""The log-sum-exp scan in Triton: a program owns a row of the batch and a block of channels and walks along the tokens.

The state stays in registers. The backward walks forward once more, keeps the state before each token, and comes back
with the gradients of num and den, which decay as the sums themselves do.

Letters: b batch, t tokens, d channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.gpu import launch
from zoo.ops.lse_scan.reference import EMPTY, add, normalise, total_of
from zoo.ops.tiles import load_float32

BLOCK, WARPS = 64, 1
_EMPTY: tl.constexpr = tl.constexpr(EMPTY)


def forward(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    num: Tensor,
    den: Tensor,
    maximum: Tensor,
    bonus: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, ends = num.new_empty(v.shape), [torch.empty_like(num) for _ in range(3)]
    _walk_forward(k, v, log_decay, num, den, maximum, bonus, starts, y, *ends, None, None, None)
    return y, *normalise(ends)


def backward(
    grads: list[Tensor],
    outputs: list[Tensor],
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    num: Tensor,
    den: Tensor,
    maximum: Tensor,
    bonus: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor | None, ...]:
    before = [num.new_empty(v.shape) for _ in range(3)]
    _walk_forward(k, v, log_decay, num, den, maximum, bonus, starts, None, None, None, None, *before)
    timed = log_decay.dim() == 3
    last = [x[:, -1] for x in before]
    _, den_end, _ = add(last, log_decay[:, -1] if timed else log_decay, k[:, -1], v[:, -1])
    ends = (grad / total_of(den_end) for grad in grads[1:3])
    grad_k, grad_v, grad_num, grad_den = (torch.empty_like(x) for x in (k, v, num, den))
    grad_decay = torch.empty_like(log_decay) if timed else torch.empty_like(num)
    grad_bonus = None if bonus is None else torch.empty_like(num)
    rows, t, d = k.shape
    launch(
        _backward,
        (rows, triton.cdiv(d, BLOCK)),
        *(k, v, log_decay, *before, bonus, starts, grads[0], *ends),
        *(grad_k, grad_v, grad_decay, grad_num, grad_den, grad_bonus, t, d),
        warps=WARPS,
        TIMED=timed,
        BLOCK=BLOCK,
    )
    if not timed:
        grad_decay = grad_decay.sum(0).to(log_decay.dtype)
    if grad_bonus is not None:
        grad_bonus = grad_bonus.sum(0).to(bonus.dtype)
    return grad_k, grad_v, grad_decay, grad_num, grad_den, torch.zeros_like(maximum), grad_bonus, None


def ahead_of_time() -> dict[str, tuple[Tensor | None, ...]]:
    """Inputs of the main sizes, by name."""
    sequence = torch.empty(8, 4096, 2048, dtype=torch.bfloat16, device="meta")
    state = torch.empty(8, 2048, device="meta")
    channel = state[0]
    return {
        "d2048 average": (sequence, sequence, channel, state, state, state, None, None),
        "d2048 bonus": (sequence, sequence, channel, state, state, state, channel, None),
    }


def _walk_forward(k: Tensor, v: Tensor, log_decay: Tensor, *tensors: Tensor | None) -> None:
    rows, t, d = k.shape
    timed = log_decay.dim() == 3
    grid = rows, triton.cdiv(d, BLOCK)
    launch(_forward, grid, k, v, log_decay, *tensors, t, d, warps=WARPS, TIMED=timed, BLOCK=BLOCK)


@triton.jit
def _add(num, den, before, log_decay, k, v):
    """The state decayed, and v with the weight exp(k); and what it was multiplied with, and the weight."""
    maximum = tl.maximum(tl.maximum(before + log_decay, k), _EMPTY)
    keep = tl.exp((before - maximum) + log_decay)  # summed in this order, the rounding of the new maximum cancels
    weight = tl.exp(k - maximum)
    return keep * num + weight * v, keep * den + weight, maximum, keep, weight


@triton.jit
def _forward(
    k,
    v,
    log_decay,
    num,
    den,
    maximum,
    bonus,
    starts,
    y,
    num_end,
    den_end,
    maximum_end,
    nums_before,
    dens_before,
    maxima_before,
    t,
    d,
    TIMED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y and the state after the last token; or, where `nums_before` is given, the state before each token instead."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < d
    num_t = load_float32(num + row * d + channel, inside)
    den_t = load_float32(den + row * d + channel, inside)
    maximum_t = tl.load(maximum + row * d + channel, mask=inside, other=_EMPTY)
    if not TIMED:
        decay_t = load_float32(log_decay + channel, inside)
    if bonus is not None:
        u = load_float32(bonus + channel, inside)
    for token in tl.range(0, t, num_stages=4):
        at = (row * t + token) * d + channel
        k_t = load_float32(k + at, inside)
        v_t = load_float32(v + at, inside)
        if TIMED:
            decay_t = load_float32(log_decay + at, inside)
        if starts is not None:
            anew = tl.load(starts + row * t + token) != 0
            num_t = tl.where(anew, 0.0, num_t)
            den_t = tl.where(anew, 0.0, den_t)
            maximum_t = tl.where(anew, _EMPTY, maximum_t)
        if nums_before is not None:
            tl.store(nums_before + at, num_t, mask=inside)
            tl.store(dens_before + at, den_t, mask=inside)
            tl.store(maxima_before + at, maximum_t, mask=inside)
        if bonus is not None:
            read_num, read_den, _, _, _ = _add(num_t, den_t, maximum_t, 0.0, u + k_t, v_t)
        num_t, den_t, maximum_t, _, _ = _add(num_t, den_t, maximum_t, decay_t, k_t, v_t)
        if bonus is None:
            read_num, read_den = num_t, den_t
        if y is not None:
            tl.store(y + at, read_num / tl.where(read_den == 0.0, 1.0, read_den), mask=inside)
    if num_end is not None:
        tl.store(num_end + row * d + channel, num_t, mask=inside)
        tl.store(den_end + row * d + channel, den_t, mask=inside)
        tl.store(maximum_end + row * d + channel, maximum_t, mask=inside)


@triton.jit
def _grad_average(num, den, grad_y):
    """The gradients of num and den where y = num / den."""
    nothing = den == 0.0
    grad_num = grad_y / tl.where(nothing, 1.0, den)
    return grad_num, tl.where(nothing, 0.0, -grad_num * num / tl.where(nothing, 1.0, den))


@triton.jit
def _backward(
    k,
    v,
    log_decay,
    nums_before,
    dens_before,
    maxima_before,
    bonus,
    starts,
    grad_y,
    grad_num_end,
    grad_den_end,
    grad_k,
    grad_v,
    grad_decay,
    grad_num,
    grad_den,
    grad_bonus,
    t,
    d,
    TIMED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < d
    g_num = load_float32(grad_num_end + row * d + channel, inside)
    g_den = load_float32(grad_den_end + row * d + channel, inside)
    g_decay = tl.zeros([BLOCK], tl.float32)
    g_bonus = tl.zeros([BLOCK], tl.float32)
    if not TIMED:
        decay_t = load_float32(log_decay + channel, inside)
    if bonus is not None:
        u = load_float32(bonus + channel, inside)
    for step in tl.range(0, t, num_stages=3):
        token = t - 1 - step
        at = (row * t + token) * d + channel
        k_t = load_float32(k + at, inside)
        v_t = load_float32(v + at, inside)
        num_t = load_float32(nums_before + at, inside)
        den_t = load_float32(dens_before + at, inside)
        maximum_t = tl.load(maxima_before + at, mask=inside, other=_EMPTY)
        g_y = load_float32(grad_y + at, inside)
        if TIMED:
            decay_t = load_float32(log_decay + at, inside)

        num_after, den_after, _, keep, weight = _add(num_t, den_t, maximum_t, decay_t, k_t, v_t)
        if bonus is None:
            read_num, read_den = _grad_average(num_after, den_after, g_y)
            g_num += read_num
            g_den += read_den
        g_v = weight * g_num
        g_k = weight * (v_t * g_num + g_den)
        g_decay_t = keep * (num_t * g_num + den_t * g_den)
        g_num *= keep
        g_den *= keep
        if bonus is not None:
            num_read, den_read, _, keep, weight = _add(num_t, den_t, maximum_t, 0.0, u + k_t, v_t)
            read_num, read_den = _grad_average(num_read, den_read, g_y)
            g_own = weight * (v_t * read_num + read_den)
            g_v += weight * read_num
            g_k += g_own
            g_bonus += g_own
            g_num += keep * read_num
            g_den += keep * read_den
        if starts is not None:
            anew = tl.load(starts + row * t + token) != 0
            g_num = tl.where(anew, 0.0, g_num)
            g_den = tl.where(anew, 0.0, g_den)
        tl.store(grad_k + at, g_k, mask=inside)
        tl.store(grad_v + at, g_v, mask=inside)
        if TIMED:
            tl.store(grad_decay + at, g_decay_t, mask=inside)
        else:
            g_decay += g_decay_t
    tl.store(grad_num + row * d + channel, g_num, mask=inside)
    tl.store(grad_den + row * d + channel, g_den, mask=inside)
    if not TIMED:
        tl.store(grad_decay + row * d + channel, g_decay, mask=inside)
    if bonus is not None:
        tl.store(grad_bonus + row * d + channel, g_bonus, mask=inside)
