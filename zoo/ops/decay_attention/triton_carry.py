"""The walk along the chunks, which the Triton kernels of decayed linear attention share, and launching over all chunks.

A walk is over positions, in chunks, forward or in reverse. What is read and what is written at a position may lag
behind it: where a token is read before it is written (with a bonus), position p reads token p and writes token p - 1.
In reverse queries and keys change places, and the decay of a token comes when it is left.

    S' = exp(g_{1..c}) S + sum_s exp(g_{s+1..c}) k_s v_s^T

takes S, the state before a chunk, to that before the next.

Letters: b batch, t tokens, h heads, d key width, e value width; n chunks, c position in a chunk; S state; g log-decay.
"""

from collections.abc import Callable
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.gpu import dot_precision, launch, next_power_of_2
from zoo.ops.tiles import decay_until_end, load_rows, load_scalars, matrix_rows, store_rows, token_rows


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


def launch_chunks(
    kernel: Callable,
    blocks: int,
    tensors: tuple[Tensor, ...],
    keys: Tensor,
    values: Tensor,
    walk: Walk,
    block_d: int,
    block_e: int,
    warps: int,
    **constants: int | bool,
) -> None:
    """All chunks of a walk at once: a program a chunk and block.

    Args:
        kernel: the kernel.
        blocks: how many programs a chunk has.
        tensors: its tensors.
        keys, values: tensors (b t h d) and (b t h e), for their sizes.
        walk: the walk.
        block_d, block_e: largest tiles of keys and of values.
        warps: of a program.
        constants: of the kernel, besides sizes, tiles and precision.
    """
    (b, t, h, d), e, chunks = keys.shape, values.shape[-1], walk.chunks(keys.shape[1])
    constants |= {"D": d, "E": e, "BLOCK_D": block_size(d, block_d), "BLOCK_E": block_size(e, block_e)}
    constants |= {"PRECISION": dot_precision()}
    launch(kernel, (b * h * chunks, blocks), *tensors, t, h, chunks, **constants, warps=warps, stages=1)


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
    key = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    value = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    index = tl.arange(0, CHUNK)
    has_next = index < CHUNK - 1
    step: tl.constexpr = -1 if REVERSE else 1
    tile = load_rows(state, matrix_rows(sequence, key, D), value, E)
    for chunk in range(chunks):
        store_rows(states, matrix_rows(sequence * chunks + chunk, key, D), value, E, tile)
        position = position_of(index, chunk, chunks, REVERSE, CHUNK)
        writes = token_rows(sequence, position - WRITE_LAG, t, h)
        decays = token_rows(sequence, position - DECAY_LAG, t, h)
        next_decays = token_rows(sequence, position + step - DECAY_LAG, t, h)
        write, written = load_rows(k, writes, key, D), load_rows(v, writes, value, E)
        if VECTOR:
            g = load_rows(log_decay, decays, key, D).to(tl.float32)
            g_next = tl.where(has_next[:, None], load_rows(log_decay, next_decays, key, D).to(tl.float32), 0.0)
            write = (write * decay_until_end(g_next)).to(written.dtype)
            tile *= tl.exp(tl.sum(g, 0))[:, None]
        else:
            g = load_scalars(log_decay, decays)
            g_next = tl.where(has_next, load_scalars(log_decay, next_decays), 0.0)
            write = (write * decay_until_end(g_next)[:, None]).to(written.dtype)
            tile *= tl.exp(tl.sum(g, 0))
        tile = tl.dot(tl.trans(write), written, tile, input_precision=PRECISION)
    store_rows(end, matrix_rows(sequence, key, D), value, E, tile)


@triton.jit
def position_of(index, chunk, chunks, REVERSE: tl.constexpr, CHUNK: tl.constexpr):
    """The position, or those, that come at an index of a chunk in the order of the walk."""
    position = chunk * CHUNK + index
    return chunks * CHUNK - 1 - position if REVERSE else position
