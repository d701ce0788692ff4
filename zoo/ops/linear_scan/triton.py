"""The linear scan in Triton: a program owns a row of the batch and a block of channels and walks along the tokens.

A tile of `CHUNK` tokens is scanned at once, the state is carried from tile to tile in registers. The backward is the
same recurrence from the last token to the first. Complex tensors come as pairs of reals.

Letters: b batch, t tokens, d channels; c token in a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.gpu import launch

CHUNK, BLOCK = 32, 32


def forward(a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    h, end = torch.empty_like(b), torch.empty_like(state)
    rows, t, d = b.shape
    launch(_forward, (rows, triton.cdiv(d, BLOCK)), *_reals(a, b, state, h, end), t, d, **_constants(b))
    return h, end


def backward(grads: list[Tensor], outputs: list[Tensor], a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    grad_a, grad_b, grad_state = torch.empty_like(a), torch.empty_like(b), torch.empty_like(state)
    rows, t, d = b.shape
    tensors = _reals(a, state, outputs[0], *grads, grad_a, grad_b, grad_state)
    launch(_backward, (rows, triton.cdiv(d, BLOCK)), *tensors, t, d, **_constants(b))
    return grad_a, grad_b, grad_state


def ahead_of_time() -> dict[str, tuple[Tensor, ...]]:
    """Inputs of the main sizes, by name."""

    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        sequence = torch.empty(8, 4096, 2560, dtype=dtype, device="meta")
        return sequence, sequence, sequence[:, 0].to(torch.promote_types(dtype, torch.float32))

    return {"d2560 float32": inputs(torch.float32), "d2560 bfloat16": inputs(torch.bfloat16)}


def _constants(b: Tensor) -> dict:
    return {"COMPLEX": b.is_complex(), "CHUNK": CHUNK, "BLOCK": BLOCK}


def _reals(*tensors: Tensor) -> list[Tensor]:
    return [torch.view_as_real(x) if x.is_complex() else x for x in tensors]


@triton.jit
def _then(a1, b1, a2, b2):
    """First h -> a1 h + b1, then h -> a2 h + b2."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _then_complex(a1, ai1, b1, bi1, a2, ai2, b2, bi2):
    return (
        a1 * a2 - ai1 * ai2,
        a1 * ai2 + ai1 * a2,
        a2 * b1 - ai2 * bi1 + b2,
        a2 * bi1 + ai2 * b1 + bi2,
    )


@triton.jit
def _scan(keep, add, carry):
    """A tile (c d) of h, given that before it (d)."""
    keep, add = tl.associative_scan((keep, add), 0, _then)
    return keep * carry[None, :] + add


@triton.jit
def _scan_complex(keep, keep_i, add, add_i, carry, carry_i):
    keep, keep_i, add, add_i = tl.associative_scan((keep, keep_i, add, add_i), 0, _then_complex)
    tile = keep * carry[None, :] - keep_i * carry_i[None, :] + add
    return tile, keep * carry_i[None, :] + keep_i * carry[None, :] + add_i


@triton.jit
def _last(x, CHUNK: tl.constexpr):
    """The last row of a tile (c d)."""
    return tl.sum(tl.where(tl.arange(0, CHUNK)[:, None] == CHUNK - 1, x, 0.0), 0)


@triton.jit
def _forward(a, b, state, h, end, t, d, COMPLEX: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < d
    parts: tl.constexpr = 2 if COMPLEX else 1
    carry = tl.load(state + (row * d + channel) * parts, mask=inside, other=0.0)
    if COMPLEX:
        carry_i = tl.load(state + (row * d + channel) * parts + 1, mask=inside, other=0.0)
    for start in range(0, t, CHUNK):
        token = start + tl.arange(0, CHUNK)
        at = ((row * t + token[:, None]) * d + channel[None, :]) * parts
        there = (token < t)[:, None] & inside[None, :]
        keep = tl.load(a + at, mask=there, other=1.0).to(carry.dtype)  # behind the end the state stays
        add = tl.load(b + at, mask=there, other=0.0).to(carry.dtype)
        if COMPLEX:
            keep_i = tl.load(a + at + 1, mask=there, other=0.0)
            add_i = tl.load(b + at + 1, mask=there, other=0.0)
            tile, tile_i = _scan_complex(keep, keep_i, add, add_i, carry, carry_i)
            tl.store(h + at + 1, tile_i, mask=there)
            carry_i = _last(tile_i, CHUNK)
        else:
            tile = _scan(keep, add, carry)
        tl.store(h + at, tile, mask=there)
        carry = _last(tile, CHUNK)
    tl.store(end + (row * d + channel) * parts, carry, mask=inside)
    if COMPLEX:
        tl.store(end + (row * d + channel) * parts + 1, carry_i, mask=inside)


@triton.jit
def _backward(
    a,
    state,
    h,
    grad_h,
    grad_end,
    grad_a,
    grad_b,
    grad_state,
    t,
    d,
    COMPLEX: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """g_t = grad h_t + conj(a_{t+1}) g_{t+1}, from the last token to the first; grad a_t = g_t conj(h_{t-1})."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < d
    parts: tl.constexpr = 2 if COMPLEX else 1
    carry = tl.load(grad_end + (row * d + channel) * parts, mask=inside, other=0.0)
    if COMPLEX:
        carry_i = tl.load(grad_end + (row * d + channel) * parts + 1, mask=inside, other=0.0)
    for start in range(0, t, CHUNK):
        token = t - 1 - start - tl.arange(0, CHUNK)
        at = ((row * t + token[:, None]) * d + channel[None, :]) * parts
        there = (token >= 0)[:, None] & inside[None, :]
        has_next = there & (token < t - 1)[:, None]
        has_previous = there & (token > 0)[:, None]
        first = there & (token == 0)[:, None]
        before_first = (row * d + channel[None, :]) * parts + tl.zeros_like(at)
        keep = tl.load(a + at + d * parts, mask=has_next, other=1.0).to(carry.dtype)
        add = tl.load(grad_h + at, mask=there, other=0.0).to(carry.dtype)
        before = tl.load(h + at - d * parts, mask=has_previous, other=0.0)
        before += tl.load(state + before_first, mask=first, other=0.0)
        if COMPLEX:
            keep_i = -tl.load(a + at + d * parts + 1, mask=has_next, other=0.0)
            add_i = tl.load(grad_h + at + 1, mask=there, other=0.0)
            before_i = tl.load(h + at - d * parts + 1, mask=has_previous, other=0.0)
            before_i += tl.load(state + before_first + 1, mask=first, other=0.0)
            g, g_i = _scan_complex(keep, keep_i, add, add_i, carry, carry_i)
            tl.store(grad_b + at + 1, g_i, mask=there)
            tl.store(grad_a + at, g * before + g_i * before_i, mask=there)
            tl.store(grad_a + at + 1, g_i * before - g * before_i, mask=there)
            carry_i = _last(g_i, CHUNK)
        else:
            g = _scan(keep, add, carry)
            tl.store(grad_a + at, g * before, mask=there)
        tl.store(grad_b + at, g, mask=there)
        carry = _last(g, CHUNK)
    # what reaches the state went through the first token: g_0 conj(a_0)
    keep = tl.load(a + (row * t * d + channel) * parts, mask=inside, other=0.0).to(carry.dtype)
    if COMPLEX:
        keep_i = tl.load(a + (row * t * d + channel) * parts + 1, mask=inside, other=0.0)
        tl.store(grad_state + (row * d + channel) * parts, carry * keep + carry_i * keep_i, mask=inside)
        tl.store(grad_state + (row * d + channel) * parts + 1, carry_i * keep - carry * keep_i, mask=inside)
    else:
        tl.store(grad_state + (row * d + channel) * parts, carry * keep, mask=inside)
