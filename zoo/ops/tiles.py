"""Pieces of Triton kernels that several ops share: tiles of tensors, and the decays between the tokens of a chunk.

A tensor of any shape is seen as a matrix of rows: a row of (b t h d) is a token of a head, a row of a state (b h d e)
is a key of a head. Which rows a program takes is said by a pair, `rows`: their numbers (c) in 64 bits, and which of
them there are (c). What is not there is loaded as 0 and not stored.

The logarithm of a decay over a segment is the sum of the log-decays in it, never a difference of two sums: none is
positive, none is lost to rounding, and a decay of 0 (a logarithm of minus infinity) is as good as any.

Letters: b batch, t tokens, h heads, d keys, e values, n chunks; c rows of a tile, w its columns; g log-decays.
"""

import triton
import triton.language as tl


@triton.jit
def locate_chunk(chunks):
    """Of programs (b h n): the number of this one, its head among the b h ones (64 bits), and its chunk."""
    program = tl.program_id(0)
    return program.to(tl.int64), (program // chunks).to(tl.int64), program % chunks


@triton.jit
def token_rows(sequence, token, t, h):
    """The rows of (b t h ...) that hold tokens (c) of a head, `sequence` among the b h ones; none outside 0..t-1."""
    rows = sequence // h * t * h + sequence % h + token.to(tl.int64) * h
    return rows, (token >= 0) & (token < t)


@triton.jit
def matrix_rows(matrix, row, height):
    """The rows (c) of one of many matrices (... height width); none behind the last."""
    return matrix * height + row, row < height


@triton.jit
def load_float32(pointer, inside):
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_scalars(x, rows):
    """A number a row, (c) in float32."""
    number, there = rows
    return load_float32(x + number, there)


@triton.jit
def store_scalars(x, rows, values):
    number, there = rows
    tl.store(x + number, values, mask=there)


@triton.jit
def load_rows(x, rows, column, width):
    """A tile (c w) of x (... width)."""
    number, there = rows
    at = number[:, None] * width + column[None, :]
    return tl.load(x + at, mask=there[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def load_transposed(x, rows, column, width):
    """The same tile as (w c)."""
    number, there = rows
    at = column[:, None] + number[None, :] * width
    return tl.load(x + at, mask=(column < width)[:, None] & there[None, :], other=0.0)


@triton.jit
def store_rows(x, rows, column, width, tile):
    """A tile (c w) into x (... width), in its dtype."""
    number, there = rows
    at = number[:, None] * width + column[None, :]
    tl.store(x + at, tile, mask=there[:, None] & (column < width)[None, :])


@triton.jit
def decay_since_start(g):
    """g (c) or (c w) -> the decay from the start of the chunk up to each token, its own among it."""
    return tl.exp(tl.cumsum(g, 0))


@triton.jit
def decay_until_end(g_next):
    """g (c) or (c w) of the tokens that follow -> the decay from behind each token to the last of those."""
    return tl.exp(tl.cumsum(g_next, 0, reverse=True))


@triton.jit
def decay_between(g):
    """g (c) -> the decay (c c) from behind a token (second) to a later one (first); to an earlier one 0."""
    at = tl.arange(0, g.shape[0])
    between = tl.cumsum(tl.where(at[:, None] > at[None, :], g[:, None], 0.0), 0)
    return tl.where(at[:, None] >= at[None, :], tl.exp(between), 0.0)
