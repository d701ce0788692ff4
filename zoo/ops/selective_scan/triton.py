"""The selective scan in Triton: a program owns a row of the batch and a block of channels and walks along the tokens.

A program is one warp, which keeps the states of its channels in registers, (n d): sums over the states or the channels
take a shuffle or two and no barrier. The inputs of a few tokens, a part, are loaded before any of them is computed, so
that the latency of memory is paid once a part.

The backward walks along the tokens and keeps the states before every `SEGMENT` tokens. Then, from the last segment to
the first, it walks again and keeps the states before every part, and goes back through the parts, each computed once
more in registers. So what it needs beside its inputs and outputs grows with t by the states before the segments only,
and nothing is divided. What B and C get is kept for each block of channels and summed afterwards: runs give the same to
the bit.

Letters: b batch, t tokens, d channels, n states of a channel.
"""

# A, B and C are capitals in the field.

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.gpu import launch, next_power_of_2, target
from zoo.ops.tiles import load_float32

FORWARD_PART, BACKWARD_PART = 8, 4
SEGMENT = 1024


def forward(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, end = torch.empty_like(x), torch.empty_like(state)
    (b, t, d), n = x.shape, A.shape[1]
    tensors = (x, step, A, B, C, state, starts, y, end)
    constants = _constants(n, FORWARD_PART)
    launch(_forward, (b, triton.cdiv(d, _block(n))), *tensors, t, d, n, warps=1, **constants)
    return y, end


def backward(
    grads: list[Tensor],
    outputs: list[Tensor],
    x: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor | None, ...]:
    (b, t, d), n = x.shape, A.shape[1]
    grid = (b, triton.cdiv(d, _block(n)))

    def keep_states(state: Tensor, first: int, stop: int, every: int, part: int) -> Tensor:
        """The states before tokens `first`, `first + every`, ...: (k b d n), given that before `first`."""
        states = state.new_empty(triton.cdiv(stop - first, every), *state.shape)
        constants = _constants(n, part)
        launch(
            *(_keep_states, grid, x, step, A, B, state, starts, states, first, stop, t, d, n),
            **constants,
            EVERY=every,
            warps=1,
        )
        return states

    before_segments = keep_states(state, 0, t, SEGMENT, FORWARD_PART) if t > SEGMENT else state[None]
    grad_x, grad_step = torch.empty_like(x), torch.empty_like(step)
    grad_B, grad_C = torch.empty_like(B), torch.empty_like(C)
    carry, rows_A = grads[1].clone(), torch.zeros_like(state)  # what A gets of each row
    blocks_B, blocks_C = state.new_empty(2, b, grid[1], min(t, SEGMENT), n)  # of each block
    for segment in reversed(range(triton.cdiv(t, SEGMENT))):
        first, stop = segment * SEGMENT, min((segment + 1) * SEGMENT, t)
        states = keep_states(before_segments[segment], first, stop, BACKWARD_PART, BACKWARD_PART)
        tensors = (x, step, A, B, C, starts, states, grads[0], grad_x, grad_step, rows_A, blocks_B, blocks_C, carry)
        constants = _constants(n, BACKWARD_PART)
        launch(_backward, grid, *tensors, first, stop, t, d, n, blocks_B.shape[2], warps=1, **constants)
        grad_B[:, first:stop] = blocks_B[:, :, : stop - first].sum(1)
        grad_C[:, first:stop] = blocks_C[:, :, : stop - first].sum(1)
    return grad_x, grad_step, rows_A.sum(0).to(A.dtype), grad_B, grad_C, carry, None


def ahead_of_time() -> dict[str, tuple[Tensor | None, ...]]:
    """Inputs of the main sizes, by name."""

    def inputs(d: int, packed: bool) -> tuple[Tensor | None, ...]:
        b, t, n = 4, 4096, 16
        x = torch.empty(b, t, d, dtype=torch.bfloat16, device="meta")
        A, B = x.new_empty(d, n, dtype=torch.float32), x.new_empty(b, t, n)
        starts = x.new_empty(b, t, dtype=torch.bool) if packed else None
        return x, x, A, B, B, x.new_empty(b, d, n, dtype=torch.float32), starts

    return {
        "d1536 bfloat16": inputs(1536, packed=False),
        "d1536 bfloat16 packed": inputs(1536, packed=True),
        "d5120 bfloat16": inputs(5120, packed=False),
    }


def _block(n: int) -> int:
    """Channels of a program: of 256 states. Interpreted, a program takes as long whatever its size."""
    return 64 if target() == "cpu" else max(1, 256 // next_power_of_2(n))


def _constants(n: int, part: int) -> dict[str, int]:
    return {"PART": part, "BLOCK": _block(n), "N": next_power_of_2(n)}


@triton.jit
def _locate(A, d, n, BLOCK: tl.constexpr, N: tl.constexpr):
    """Of a program: its row of the batch, channels (d) and states (n), where these lie in A (d n) and which of them
    there are (n d), and A log2(e) there."""
    row = tl.program_id(0).to(tl.int64)
    channel, place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N)
    inside = (place < n)[:, None] & (channel < d)[None, :]
    at_state = channel[None, :] * n + place[:, None]
    return row, channel, place, at_state, inside, load_float32(A + at_state, inside) * 1.4426950408889634


@triton.jit
def _load_row(x, token, behind, column, width):
    """A token of x (b t width), zeros from token `behind` on."""
    return load_float32(x + token * width + column, column < tl.where(token < behind, width, 0))


@triton.jit
def _advance(h, rates, step, x, B, starts, token, behind):
    """The state behind a token, given that before it, and the decay (n d) between them."""
    decay = tl.exp2(step[None, :] * rates)
    if starts is not None:
        decay = tl.where(tl.load(starts + token, mask=token < behind, other=0) != 0, 0.0, decay)
    return decay * h + (step * x)[None, :] * B[:, None], decay


@triton.jit
def _forward(
    x,
    step,
    A,
    B,
    C,
    state,
    starts,
    y,
    end,
    t,
    d,
    n,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
):
    row, channel, place, at_state, inside, rates = _locate(A, d, n, BLOCK, N)
    h = tl.load(state + row * d * n + at_state, mask=inside, other=0.0)
    behind = (row + 1) * t  # tokens are counted through all rows
    for part in range(tl.cdiv(t, PART)):
        first = row * t + part * PART
        steps, xs, Bs, Cs = (), (), (), ()  # behind the row 0: a step of 0 keeps the state
        for i in tl.static_range(PART):
            steps += (_load_row(step, first + i, behind, channel, d),)
            xs += (_load_row(x, first + i, behind, channel, d),)
            Bs += (_load_row(B, first + i, behind, place, n),)
            Cs += (_load_row(C, first + i, behind, place, n),)
        for i in tl.static_range(PART):
            h, _ = _advance(h, rates, steps[i], xs[i], Bs[i], starts, first + i, behind)
            channels = channel < tl.where(first + i < behind, d, 0)
            tl.store(y + (first + i) * d + channel, tl.sum(h * Cs[i][:, None], 0), mask=channels)
    tl.store(end + row * d * n + at_state, h, mask=inside)


@triton.jit
def _keep_states(
    x,
    step,
    A,
    B,
    state,
    starts,
    states,
    first_token,
    stop_token,
    t,
    d,
    n,
    EVERY: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
):
    """The states before every `EVERY` tokens, a multiple of `PART`, between two tokens: (k b d n)."""
    row, channel, place, at_state, inside, rates = _locate(A, d, n, BLOCK, N)
    h = tl.load(state + row * d * n + at_state, mask=inside, other=0.0)
    behind = row * t + stop_token
    for part in range(tl.cdiv(stop_token - first_token, PART)):
        if part * PART % EVERY == 0:
            kept = part * PART // EVERY
            tl.store(states + (kept * tl.num_programs(0) + row) * d * n + at_state, h, mask=inside)
        first = row * t + first_token + part * PART
        steps, xs, Bs = (), (), ()
        for i in tl.static_range(PART):
            steps += (_load_row(step, first + i, behind, channel, d),)
            xs += (_load_row(x, first + i, behind, channel, d),)
            Bs += (_load_row(B, first + i, behind, place, n),)
        for i in tl.static_range(PART):
            h, _ = _advance(h, rates, steps[i], xs[i], Bs[i], starts, first + i, behind)


@triton.jit
def _backward(
    x,
    step,
    A,
    B,
    C,
    starts,
    states,
    grad_y,
    grad_x,
    grad_step,
    rows_A,
    blocks_B,
    blocks_C,
    grad_state,
    first_token,
    stop_token,
    t,
    d,
    n,
    tokens,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
):
    """g_t = C_t grad y_t + decay_{t+1} g_{t+1}, the gradient of h_t, from the last token of a segment to its first.

    `states` are those before each part; `grad_state` and `rows_A` go from segment to segment; `tokens` is how many
    tokens a block of `blocks_B` and `blocks_C` (b blocks tokens n) has.
    """
    row, channel, place, at_state, inside, rates = _locate(A, d, n, BLOCK, N)
    carry = tl.load(grad_state + row * d * n + at_state, mask=inside, other=0.0)  # decay_{t+1} g_{t+1}
    grad_rates = tl.load(rows_A + row * d * n + at_state, mask=inside, other=0.0)
    behind = row * t + stop_token
    block = row * tl.num_programs(1) + tl.program_id(1)
    parts = tl.cdiv(stop_token - first_token, PART)
    for later in range(parts):
        part = parts - 1 - later
        first = row * t + first_token + part * PART
        steps, xs, Bs, Cs, grad_ys = (), (), (), (), ()
        for i in tl.static_range(PART):
            steps += (_load_row(step, first + i, behind, channel, d),)
            xs += (_load_row(x, first + i, behind, channel, d),)
            Bs += (_load_row(B, first + i, behind, place, n),)
            Cs += (_load_row(C, first + i, behind, place, n),)
            grad_ys += (_load_row(grad_y, first + i, behind, channel, d),)
        h = tl.load(states + (part * tl.num_programs(0) + row) * d * n + at_state, mask=inside, other=0.0)
        hs, decays = (h,), ()
        for i in tl.static_range(PART):
            h, decay = _advance(h, rates, steps[i], xs[i], Bs[i], starts, first + i, behind)
            hs += (h,)
            decays += (decay,)
        for i in tl.static_range(PART - 1, -1, -1):
            channels = channel < tl.where(first + i < behind, d, 0)
            places = place < tl.where(first + i < behind, n, 0)
            g = carry + grad_ys[i][None, :] * Cs[i][:, None]
            carry = decays[i] * g
            grad_exponent = carry * hs[i]
            grad_rates += grad_exponent * steps[i][None, :]
            grad_write = tl.sum(g * Bs[i][:, None], 0)
            grad_decay = tl.sum(grad_exponent * rates, 0) * 0.6931471805599453  # rates are A log2(e)
            at = (first + i) * d + channel
            tl.store(grad_x + at, grad_write * steps[i], mask=channels)
            tl.store(grad_step + at, grad_write * xs[i] + grad_decay, mask=channels)
            at = (block * tokens + part * PART + i) * n + place
            tl.store(blocks_B + at, tl.sum(g * (steps[i] * xs[i])[None, :], 1), mask=places)
            tl.store(blocks_C + at, tl.sum(grad_ys[i][None, :] * hs[i + 1], 1), mask=places)
    tl.store(grad_state + row * d * n + at_state, carry, mask=inside)
    tl.store(rows_A + row * d * n + at_state, grad_rates, mask=inside)
