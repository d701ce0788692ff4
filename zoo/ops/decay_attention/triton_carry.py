"""The walk along the chunks, which the Triton kernels of decayed linear attention share, and loading what they read.

A walk is over positions, in chunks, forward or in reverse. What is read and what is written at a position may lag
behind it: where a token is read before it is written (with a bonus), position p reads token p and writes token p - 1.
In reverse queries and keys change places, and the decay of a token comes when it is left.

Letters: b batch, t tokens, h heads, d key width, e value width; n chunks, c position in a chunk; S state; g log-decay.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.gpu import dot_precision, launch, next_power_of_2


class Walk(NamedTuple):
    """An order of the tokens.

    Args:
        chunk: positions in a chunk.
        shift: how far writes lag behind reads, 0 or 1.
        reverse: from the last token to the first.
    """

    chunk: int
    shift: int = 0
    reverse: bool = False

    def chunks(self, tokens: int) -> int:
        return triton.cdiv(tokens + self.shift, self.chunk)

    def constants(self) -> dict[str, int | bool]:
        return {
            "CHUNK": self.chunk,
            "REVERSE": self.reverse,
            "READ_LAG": self.shift if self.reverse else 0,
            "WRITE_LAG": 0 if self.reverse else self.shift,
            "DECAY_LAG": self.shift - self.reverse,
        }


def block_size(width: int, largest: int) -> int:
    """Of a tile; products want at least 16."""
    return min(max(16, next_power_of_2(width)), largest)


def carry_chunks(
    k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, end: Tensor, walk: Walk, block_d: int, block_e: int
) -> Tensor:
    """The states before each chunk of a walk.

    Args:
        k, v: what is written, (b t h d) and (b t h e), of one dtype.
        log_decay: (b t h) or (b t h d).
        state: S before the walk, (b h d e).
        end: where S after it goes.
        walk: the walk.
        block_d, block_e: largest tile of S.

    Returns:
        (b h n d e), in the dtype of v.
    """
    b, t, h, d = k.shape
    e, chunks = v.shape[-1], walk.chunks(t)
    states = v.new_empty(b, h, chunks, d, e)
    block_d, block_e = block_size(d, block_d), block_size(e, block_e)
    constants = {"VECTOR": log_decay.dim() == 4, "PRECISION": dot_precision(), **walk.constants()}
    grid = (b * h, triton.cdiv(d, block_d), triton.cdiv(e, block_e))
    tensors = k, v, log_decay, state, states, end
    launch(_carry, grid, *tensors, t, h, chunks, D=d, E=e, BLOCK_D=block_d, BLOCK_E=block_e, **constants)
    return states


@triton.jit
def _carry(
    k,
    v,
    log_decay,
    state,
    states,
    end,
    t,
    h,
    chunks,
    D: tl.constexpr,
    E: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    READ_LAG: tl.constexpr,
    WRITE_LAG: tl.constexpr,
    DECAY_LAG: tl.constexpr,
):
    """A program owns a tile of the state of one head."""
    sequence = tl.program_id(0).to(tl.int64)
    first = first_row(sequence, t, h)
    key = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    value = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    at = key[:, None] * E + value[None, :]
    inside = (key < D)[:, None] & (value < E)[None, :]
    index = tl.arange(0, CHUNK)
    has_next = index < CHUNK - 1
    step: tl.constexpr = -1 if REVERSE else 1
    tile = tl.load(state + sequence * D * E + at, mask=inside, other=0.0)
    for chunk in range(chunks):
        tl.store(states + (sequence * chunks + chunk) * D * E + at, tile.to(states.dtype.element_ty), mask=inside)
        position = position_of(index, chunk, chunks, REVERSE, CHUNK)
        write = load_rows(k, first, position - WRITE_LAG, t, h, key, D)
        written = load_rows(v, first, position - WRITE_LAG, t, h, value, E)
        if VECTOR:
            g = load_rows(log_decay, first, position - DECAY_LAG, t, h, key, D).to(tl.float32)
            g_next = load_rows(log_decay, first, position + step - DECAY_LAG, t, h, key, D).to(tl.float32)
            g_next = tl.where(has_next[:, None], g_next, 0.0)
            write = (write * tl.exp(tl.cumsum(g_next, 0, reverse=True))).to(written.dtype)
            tile *= tl.exp(tl.sum(g, 0))[:, None]
        else:
            g = load_scalars(log_decay, first, position - DECAY_LAG, t, h)
            g_next = tl.where(has_next, load_scalars(log_decay, first, position + step - DECAY_LAG, t, h), 0.0)
            write = (write * tl.exp(tl.cumsum(g_next, 0, reverse=True))[:, None]).to(written.dtype)
            tile *= tl.exp(tl.sum(g, 0))
        tile = tl.dot(tl.trans(write), written, tile, input_precision=PRECISION)
    tl.store(end + sequence * D * E + at, tile, mask=inside)


@triton.jit
def first_row(sequence, t, h):
    """Where token 0 of a head lies in (b t h); the next ones are h apart. `sequence` counts the b x h heads."""
    return sequence // h * t * h + sequence % h


@triton.jit
def position_of(index, chunk, chunks, REVERSE: tl.constexpr, CHUNK: tl.constexpr):
    """The position, or those, that come at an index of a chunk in the order of the walk."""
    position = chunk * CHUNK + index
    return chunks * CHUNK - 1 - position if REVERSE else position


@triton.jit
def load_scalars(x, first, token, t, h):
    """x (b t h) at tokens (c), 0 outside the sequence."""
    at = x + first + token.to(tl.int64) * h
    return tl.load(at, mask=(token >= 0) & (token < t), other=0.0).to(tl.float32)


@triton.jit
def rows_at(first, token, t, h, column, WIDTH: tl.constexpr):
    """Where tokens (c) x columns of a tensor (b t h width) lie, and which of them there are."""
    at = (first + token.to(tl.int64) * h)[:, None] * WIDTH + column[None, :]
    return at, ((token >= 0) & (token < t))[:, None] & (column < WIDTH)[None, :]


@triton.jit
def load_rows(x, first, token, t, h, column, WIDTH: tl.constexpr):
    """x (b t h width) at tokens (c) x columns, 0 outside."""
    at, there = rows_at(first, token, t, h, column, WIDTH)
    return tl.load(x + at, mask=there, other=0.0)


@triton.jit
def load_row(x, first, token, t, h, column, WIDTH: tl.constexpr):
    """x (b t h width) at one token, in float32, 0 outside."""
    token += tl.zeros_like(column)
    there = (token >= 0) & (token < t) & (column < WIDTH)
    return tl.load(x + (first + token.to(tl.int64) * h) * WIDTH + column, mask=there, other=0.0).to(tl.float32)
