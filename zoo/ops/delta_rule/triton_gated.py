"""The gated delta rule in chunks, in products of tiles, in Triton (Yang et al., 2024, arXiv:2412.06464, section 3.3).

In a chunk that starts with the state S, with G the decay from a write to a read, `since` that from the chunk's start to
a token and `until` that from a token to its end,

    A = strictly lower part of beta (G * K K^T)     T = (I + A)^-1          P = lower part of G * Q K^T
    U = T beta (V - since K S)                      Y = since Q S + P U     S' = decay S + K^T (until U)

`_pairs` makes T and P of all chunks at once, `_states` walks from chunk to chunk and leaves U and each S, `_outputs`
reads.

Letters: b batch, t tokens, h heads, d keys, e values, n chunks, c token in a chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.delta_rule.triton_chunks import (
    Tiles,
    load_decays,
    load_decays_between,
    load_key_products,
    square,
)
from zoo.ops.tiles import load_rows, load_scalars, locate_chunk, matrix_rows, store_rows, token_rows


def forward_gated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    beta: Tensor,
    starts: Tensor | None,
    y: Tensor,
    end: Tensor,
) -> None:
    """Fill y (b t h e) and the last state (b h d e)."""
    tiles = Tiles.choose(q, k, v)
    _, reads, u, states = recur(q, k, v, log_decay, state, beta, starts, end, tiles)
    tiles.launch_chunks(_outputs, tiles.blocks(v), q, log_decay, starts, reads, u, states, y)


def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    beta: Tensor,
    starts: Tensor | None,
    end: Tensor | None,
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """T and P (b h n c c), U (b t h e) and the states the chunks start with (b h n d e); the last one goes to `end`."""
    b, _, h, d, e = tiles.sizes
    inverses, reads = k.new_empty(2, b, h, tiles.chunks, tiles.chunk, tiles.chunk, dtype=tiles.dtype)
    tiles.launch_chunks(_pairs, 1, q, k, log_decay, beta, starts, inverses, reads)
    u, states = torch.empty_like(v, dtype=tiles.dtype), k.new_empty(b, h, tiles.chunks, d, e, dtype=tiles.dtype)
    tiles.launch_heads(_states, k, v, log_decay, beta, starts, inverses, state, u, states, end)
    return inverses, reads, u, states


@triton.jit
def _pairs(
    q,
    k,
    log_decay,
    beta,
    starts,
    inverses,
    reads,
    t,
    h,
    d,
    e,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """T and P of a chunk."""
    program, sequence, chunk = locate_chunk(tl.cdiv(t, CHUNK))
    at = tl.arange(0, CHUNK)
    tokens = token_rows(sequence, chunk * CHUNK + at, t, h)
    dtype = reads.dtype.element_ty
    kk, qk = load_key_products(q, k, tokens, d, dtype, CHUNK, BLOCK, PRECISION)
    decay = load_decays_between(log_decay, starts, sequence, chunk, t, h, CHUNK)
    tl.store(square(reads, program, CHUNK), (decay * qk).to(dtype))
    a = tl.where(at[:, None] > at[None, :], load_scalars(beta, tokens)[:, None] * decay * kk, 0.0)
    tl.store(square(inverses, program, CHUNK), _invert(a, CHUNK, PRECISION).to(dtype))


@triton.jit
def _invert(a, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)^-1 of a strictly lower (c c): blocks of 16 on the diagonal by substitution, then pairs of blocks merged.

    Merging two blocks is [[P, 0], [R, Q]]^-1 = [[P^-1, 0], [-Q^-1 R P^-1, Q^-1]].
    """
    count: tl.constexpr = CHUNK // 16
    at, row = tl.arange(0, CHUNK), tl.arange(0, 16)
    diagonal = at[:, None] // 16 == at[None, :] // 16
    blocks = tl.sum(tl.reshape(tl.where(diagonal, a, 0.0), (count, 16, count, 16)), 2)
    inverse = tl.zeros_like(blocks) + tl.where(row[:, None] == row[None, :], 1.0, 0.0)[None, :, :]
    for i in range(1, 16):
        factors = tl.sum(tl.where((row == i)[None, :, None], blocks, 0.0), 1)
        below = tl.sum(factors[:, :, None] * inverse, 1)
        inverse -= tl.where((row == i)[None, :, None], below[:, None, :], 0.0)
    inverse = tl.broadcast_to(inverse[:, :, None, :], (count, 16, count, 16))
    inverse = tl.where(diagonal, tl.reshape(inverse, (CHUNK, CHUNK)), 0.0)
    for level in tl.static_range(4, 6):
        if 2**level < CHUNK:
            block = at // 2**level
            corner = (block[:, None] % 2 == 1) & (block[None, :] == block[:, None] - 1)
            left = tl.dot(inverse, tl.where(corner, a, 0.0), input_precision=PRECISION)
            inverse -= tl.dot(left, inverse, input_precision=PRECISION)
    return inverse


@triton.jit
def _states(
    k,
    v,
    log_decay,
    beta,
    starts,
    inverses,
    state,
    u,
    states,
    end,
    t,
    h,
    d,
    e,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From chunk to chunk: U and the state before it."""
    sequence, chunks = tl.program_id(0).to(tl.int64), tl.cdiv(t, CHUNK)
    key, value = tl.arange(0, KEYS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype = u.dtype.element_ty
    carry = load_rows(state, matrix_rows(sequence, key, d), value, e).to(tl.float32)
    for chunk in range(chunks):
        program = sequence * chunks + chunk
        tokens = token_rows(sequence, chunk * CHUNK + tl.arange(0, CHUNK), t, h)
        factor = carry.to(dtype)
        store_rows(states, matrix_rows(program, key, d), value, e, factor)
        tile_k = load_rows(k, tokens, key, d).to(dtype)
        tile_v = load_rows(v, tokens, value, e).to(tl.float32)
        inverse = tl.load(square(inverses, program, CHUNK))
        since_start, until_end, decay = load_decays(log_decay, starts, sequence, chunk, t, h, CHUNK)
        known = tl.dot(tile_k, factor, input_precision=PRECISION) * since_start[:, None]
        x = ((tile_v - known) * load_scalars(beta, tokens)[:, None]).to(dtype)
        tile_u = tl.dot(inverse, x, input_precision=PRECISION)
        store_rows(u, tokens, value, e, tile_u)
        writes = (tile_u * until_end[:, None]).to(dtype)
        carry = tl.dot(tl.trans(tile_k), writes, carry * decay, input_precision=PRECISION)
    if end is not None:
        store_rows(end, matrix_rows(sequence, key, d), value, e, carry)


@triton.jit
def _outputs(
    q,
    log_decay,
    starts,
    reads,
    u,
    states,
    y,
    t,
    h,
    d,
    e,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Y of a chunk and a block of values."""
    program, sequence, chunk = locate_chunk(tl.cdiv(t, CHUNK))
    tokens = token_rows(sequence, chunk * CHUNK + tl.arange(0, CHUNK), t, h)
    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tile = tl.zeros((CHUNK, BLOCK), tl.float32)
    for first in range(0, d, BLOCK):
        key = first + tl.arange(0, BLOCK)
        tile_q = load_rows(q, tokens, key, d).to(reads.dtype.element_ty)
        factor = load_rows(states, matrix_rows(program, key, d), value, e)
        tile = tl.dot(tile_q, factor, tile, input_precision=PRECISION)
    since_start, _, _ = load_decays(log_decay, starts, sequence, chunk, t, h, CHUNK)
    tile *= since_start[:, None]
    tile_u = load_rows(u, tokens, value, e)
    tile = tl.dot(tl.load(square(reads, program, CHUNK)), tile_u, tile, input_precision=PRECISION)
    store_rows(y, tokens, value, e, tile)
