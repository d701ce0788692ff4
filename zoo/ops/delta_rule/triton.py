"""The delta rule in Triton: the gated form in chunks, in products of tiles; the general form one token at a time.

The gated form, in a chunk that starts with the state S (Yang et al., 2024, arXiv:2412.06464, section 3.3): with G the
decay from a write to a read, `since` that from the chunk's start to a token and `until` that from a token to its end,

    A = strictly lower part of beta (G * K K^T)     T = (I + A)^-1          P = lower part of G * Q K^T
    U = T beta (V - since K S)                      Y = since Q S + P U     S' = decay S + K^T (until U)

`_pairs` makes T and P of all chunks at once, `_states` walks from chunk to chunk and leaves U and each S, `_outputs`
reads. Backward, with the gradients dY and dS' of what a chunk gives,

    dX = T^T (P^T dY + until K dS')                 dS = decay dS' + Q^T (since dY) - K^T (since beta dX)

`_state_grads` walks back and leaves dX and each dS'; `_pair_grads` and `_key_grads` make the gradients of all chunks
at once. The logarithm of a decay over a segment is the sum over it, never a difference of two sums: a decay of 0 is as
good as any, and where a document starts the state decays to 0.

The general form reads and writes the state token by token. Its backward computes the states again, from checkpoints.

Letters: b batch, t tokens, h heads, d keys, e values, n chunks, c token in a chunk.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.gpu import dot_precision, launch, next_power_of_2, on_nvidia, target


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y, end = torch.empty_like(v), torch.empty_like(state)
    if beta is None or q.shape[1] == 1:
        _walk(q, k, v, log_decay, state, a, b, beta, starts, y, end, None, every=1)
        return y, end
    tiles = _Tiles.choose(q, k, v)
    _, reads, u, states = _recur(q, k, v, log_decay, state, beta, starts, end, tiles)
    tiles.launch_chunks(_outputs, tiles.blocks(v), q, log_decay, starts, reads, u, states, y)
    return y, end


def backward(
    grads: list[Tensor],
    outputs: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor | None, ...]:
    if beta is None:
        return _walk_back(*grads, q, k, v, log_decay, state, a, b, starts)
    grad_y, grad_end = grads
    tiles = _Tiles.choose(q, k, v)
    inverses, reads, u, states = _recur(q, k, v, log_decay, state, beta, starts, None, tiles)

    grad_x, grad_states, grad_state = torch.empty_like(u), torch.empty_like(states), torch.empty_like(state)
    tiles.launch_heads(
        *(_state_grads, q, k, log_decay, beta, starts, inverses, reads),
        *(grad_y, grad_end, grad_x, grad_states, grad_state),
        heavy=True,
    )
    grad_inverses, grad_reads, grad_v = torch.empty_like(inverses), torch.empty_like(reads), torch.empty_like(v)
    blocks = tiles.blocks(k)
    parts = k.new_empty(2, 1 + blocks, *k.shape[:3], dtype=torch.float32)  # of the gradients of log_decay and beta
    tiles.launch_chunks(
        *(_pair_grads, 1, q, k, v, log_decay, beta, starts, u),
        *(grad_y, grad_x, grad_inverses, grad_reads, grad_v, *parts[:, 0]),
        heavy=True,
    )
    grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
    tiles.launch_chunks(
        *(_key_grads, blocks, q, k, log_decay, beta, starts, u, states),
        *(grad_y, grad_x, grad_states, grad_inverses, grad_reads, grad_q, grad_k, *parts[:, 1:], parts[0, 0].numel()),
        heavy=True,
    )
    grad_log_decay, grad_beta = (x.sum(0).to(y.dtype) for x, y in zip(parts, (log_decay, beta), strict=True))
    return grad_q, grad_k, grad_v, grad_log_decay, grad_state, None, None, grad_beta, None


def ahead_of_time() -> dict[str, tuple[Tensor | None, ...]]:
    """Inputs of the main sizes, by name."""

    def inputs(d: int, gated: bool) -> tuple[Tensor | None, ...]:
        q = torch.empty(8, 4096, 16, d, dtype=torch.bfloat16, device="meta")
        state = torch.empty(8, 16, d, d, device="meta")
        log_decay = torch.empty(q.shape[:3] if gated else q.shape, device="meta")
        a, beta = (None, torch.empty(q.shape[:3], dtype=q.dtype, device="meta")) if gated else (q, None)
        return q, q, q, log_decay, state, a, a, beta, None

    return {
        "gated d64 bfloat16": inputs(64, gated=True),
        "gated d128 bfloat16": inputs(128, gated=True),
        "general d64 bfloat16": inputs(64, gated=False),
    }


class _Tiles(NamedTuple):
    """How the gated form of some inputs is cut up.

    Args:
        dtype: of the factors of products; they are added up in float32.
        chunk: tokens in a chunk.
        chunks: how many a head has.
        block: keys or values in a block, for the kernels that do all chunks at once.
        state_block: values in a block, for those that walk along the chunks with all keys.
        sizes: b, t, h, d, e.
    """

    dtype: torch.dtype
    chunk: int
    chunks: int
    block: int
    state_block: int
    sizes: tuple[int, int, int, int, int]

    @classmethod
    def choose(cls, q: Tensor, k: Tensor, v: Tensor) -> "_Tiles":
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        chunk = 16 if target() == "cpu" else 64 if dtype.itemsize == 2 else 32
        (b, t, h, d), e = k.shape, v.shape[3]
        # 64 and 32 for halves: larger ones do not fit into the registers
        block = min(128 // dtype.itemsize, max(16, next_power_of_2(max(d, e))))
        state_block = min(64 // dtype.itemsize, max(16, next_power_of_2(e)))
        return cls(dtype, chunk, triton.cdiv(t, chunk), block, state_block, (b, t, h, d, e))

    def blocks(self, x: Tensor) -> int:
        """How many blocks there are along the last dimension."""
        return triton.cdiv(x.shape[-1], self.block)

    def launch_chunks(self, kernel: Any, blocks: int, *arguments: Tensor | int | None, heavy: bool = False) -> None:
        """All chunks at once: a program a chunk and block. A `heavy` kernel holds many tiles at a time."""
        b, t, h, d, e = self.sizes
        constants = {"CHUNK": self.chunk, "BLOCK": self.block, "PRECISION": self._precision()}
        warps = 8 if heavy and on_nvidia() else 4  # a thread of AMD's has registers enough for 4
        launch(kernel, (b * h * self.chunks, blocks), *arguments, t, h, d, e, **constants, warps=warps)

    def launch_heads(self, kernel: Any, *arguments: Tensor | int | None, heavy: bool = False) -> None:
        """Chunk after chunk: a program a head and block of values."""
        b, t, h, d, e = self.sizes
        keys = max(16, next_power_of_2(d))
        constants = {"CHUNK": self.chunk, "KEYS": keys, "BLOCK": self.state_block, "PRECISION": self._precision()}
        warps = 8 if keys > 64 and on_nvidia() else 4
        stages = 1 if keys > 64 and heavy else 2  # two copies of each tile would be too much of shared memory
        grid = (b * h, triton.cdiv(e, self.state_block))
        launch(kernel, grid, *arguments, t, h, d, e, **constants, warps=warps, stages=stages)

    def _precision(self) -> str:
        """Of products of float32: three of tf32 make one. For halves it is those of T, which is rounded to halves."""
        return "tf32" if on_nvidia() and self.dtype.itemsize == 2 else dot_precision()


def _recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    beta: Tensor,
    starts: Tensor | None,
    end: Tensor | None,
    tiles: _Tiles,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """T and P (b h n c c), U (b t h e) and the states the chunks start with (b h n d e); the last one goes to `end`."""
    b, _, h, d, e = tiles.sizes
    inverses, reads = k.new_empty(2, b, h, tiles.chunks, tiles.chunk, tiles.chunk, dtype=tiles.dtype)
    tiles.launch_chunks(_pairs, 1, q, k, log_decay, beta, starts, inverses, reads)
    u, states = torch.empty_like(v, dtype=tiles.dtype), k.new_empty(b, h, tiles.chunks, d, e, dtype=tiles.dtype)
    tiles.launch_heads(_states, k, v, log_decay, beta, starts, inverses, state, u, states, end)
    return inverses, reads, u, states


def _walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    starts: Tensor | None,
    y: Tensor | None,
    end: Tensor | None,
    checkpoints: Tensor | None,
    every: int,
) -> None:
    """Token by token: the outputs, the last state, and the state before each `every` tokens (b h n d e)."""
    rows, t, h, d = k.shape
    e, keys = v.shape[3], next_power_of_2(d)
    block = max(1, min(next_power_of_2(e), 1024 // keys))
    launch(
        *(_walk_forward, (rows * h, triton.cdiv(e, block))),
        *(q, k, v, log_decay, state, a, b, beta, starts, y, end, checkpoints, every, t, h, d, e),
        VECTOR=log_decay.dim() == 4,
        KEYS=keys,
        BLOCK=block,
        warps=max(1, keys * block // 1024),
    )


def _walk_back(
    grad_y: Tensor,
    grad_end: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    a: Tensor,
    b: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor | None, ...]:
    rows, t, h, d = k.shape
    e, keys = v.shape[3], next_power_of_2(d)
    block = max(1, min(next_power_of_2(e), 4096 // keys))
    blocks = triton.cdiv(e, block)
    every = next_power_of_2(math.isqrt(t))  # as many checkpoints as states between two of them
    checkpoints = state.new_empty(rows, h, triton.cdiv(t, every), d, e, dtype=torch.float32)
    _walk(q, k, v, log_decay, state, a, b, None, starts, None, None, checkpoints, every)

    inputs = (q, k, log_decay, a, b)
    # each block of values has its part of these gradients
    parts = [x.new_empty(blocks, *x.shape, dtype=torch.float32 if blocks > 1 else x.dtype) for x in inputs]
    grad_v, grad_state = torch.empty_like(v), torch.empty_like(state)
    launch(
        *(_walk_backward, (rows * h, blocks)),
        *(q, k, v, log_decay, a, b, starts, grad_y, grad_end, checkpoints),
        *(state.new_empty(rows, h, blocks, every, keys, block, dtype=torch.float32), *parts, grad_v, grad_state),
        *(q.numel(), log_decay.numel(), every, t, h, d, e),
        VECTOR=log_decay.dim() == 4,
        KEYS=keys,
        BLOCK=block,
        warps=max(1, keys * block // 512),
    )
    sums = [part.sum(0).to(x.dtype) if blocks > 1 else part[0] for part, x in zip(parts, inputs, strict=True)]
    grad_q, grad_k, grad_log_decay, grad_a, grad_b = sums
    return grad_q, grad_k, grad_v, grad_log_decay, grad_state, grad_a, grad_b, None, None


@triton.jit
def _load_log_decay(log_decay, starts, row, head, token, inside, t, h):
    """The log-decays (c) of some tokens, -inf where a document starts; 0 outside."""
    g = tl.load(log_decay + (row * t + token) * h + head, mask=inside, other=0.0).to(tl.float32)
    if starts is not None:
        g = tl.where(tl.load(starts + row * t + token, mask=inside, other=0) != 0, float("-inf"), g)
    return g


@triton.jit
def _decay_since_start(g):
    return tl.exp(tl.cumsum(g, 0))


@triton.jit
def _decay_until_end(log_decay, starts, row, head, chunk, t, h, CHUNK: tl.constexpr):
    """The decay (c) from behind each token to the end of its chunk."""
    following = chunk * CHUNK + tl.arange(0, CHUNK) + 1
    inside = (following < t) & (following < (chunk + 1) * CHUNK)
    g = _load_log_decay(log_decay, starts, row, head, following, inside, t, h)
    return tl.exp(tl.cumsum(g, 0, reverse=True))


@triton.jit
def _decay_between(g, CHUNK: tl.constexpr):
    """The decay (c c) from behind a token (second) to a later one (first), 0 to an earlier one."""
    at = tl.arange(0, CHUNK)
    between = tl.cumsum(tl.where(at[:, None] > at[None, :], g[:, None], 0.0), 0)
    return tl.where(at[:, None] >= at[None, :], tl.exp(between), 0.0)


@triton.jit
def _load_rows(x, row, head, token, column, t, h, width):
    """A tile (c width) of x (b t h width)."""
    at = ((row * t + token[:, None]) * h + head) * width + column[None, :]
    return tl.load(x + at, mask=(token < t)[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _store_rows(x, tile, row, head, token, column, t, h, width):
    at = ((row * t + token[:, None]) * h + head) * width + column[None, :]
    tl.store(x + at, tile.to(x.dtype.element_ty), mask=(token < t)[:, None] & (column < width)[None, :])


@triton.jit
def _square(x, program, CHUNK: tl.constexpr):
    """Pointers to a chunk's tile (c c) of x (b h n c c)."""
    at = tl.arange(0, CHUNK)
    return x + program.to(tl.int64) * CHUNK * CHUNK + at[:, None] * CHUNK + at[None, :]


@triton.jit
def _load_matrix(x, index, key, value, d, e):
    """A tile of the matrix (d e) at an index of x (... d e)."""
    at = (index * d + key[:, None]) * e + value[None, :]
    return tl.load(x + at, mask=(key < d)[:, None] & (value < e)[None, :], other=0.0)


@triton.jit
def _store_matrix(x, tile, index, key, value, d, e):
    at = (index * d + key[:, None]) * e + value[None, :]
    tl.store(x + at, tile.to(x.dtype.element_ty), mask=(key < d)[:, None] & (value < e)[None, :])


@triton.jit
def _locate(program, t, h, CHUNK: tl.constexpr):
    """Row of the batch, head and chunk of one of the programs (b h n)."""
    n = tl.cdiv(t, CHUNK)
    return (program // n // h).to(tl.int64), program // n % h, program % n


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
    program = tl.program_id(0)
    row, head, chunk = _locate(program, t, h, CHUNK)
    at = tl.arange(0, CHUNK)
    token = chunk * CHUNK + at
    inside = token < t
    dtype = reads.dtype.element_ty
    kk, qk = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, CHUNK), tl.float32)
    for first in range(0, d, BLOCK):
        key = first + tl.arange(0, BLOCK)
        tile_k = _load_rows(k, row, head, token, key, t, h, d).to(dtype)
        tile_q = _load_rows(q, row, head, token, key, t, h, d).to(dtype)
        kk = tl.dot(tile_k, tl.trans(tile_k), kk, input_precision=PRECISION)
        qk = tl.dot(tile_q, tl.trans(tile_k), qk, input_precision=PRECISION)
    decay = _decay_between(_load_log_decay(log_decay, starts, row, head, token, inside, t, h), CHUNK)
    tl.store(_square(reads, program, CHUNK), (decay * qk).to(dtype))
    rate = tl.load(beta + (row * t + token) * h + head, mask=inside, other=0.0).to(tl.float32)
    a = tl.where(at[:, None] > at[None, :], rate[:, None] * decay * kk, 0.0)
    tl.store(_square(inverses, program, CHUNK), _invert(a, CHUNK, PRECISION).to(dtype))


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
    program = tl.program_id(0).to(tl.int64)
    row, head, n = program // h, program % h, tl.cdiv(t, CHUNK)
    key, value = tl.arange(0, KEYS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype = u.dtype.element_ty
    carry = _load_matrix(state, program, key, value, d, e).to(tl.float32)
    for chunk in range(n):
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = token < t
        factor = carry.to(dtype)
        _store_matrix(states, factor, program * n + chunk, key, value, d, e)
        tile_k = _load_rows(k, row, head, token, key, t, h, d).to(dtype)
        tile_v = _load_rows(v, row, head, token, value, t, h, e).to(tl.float32)
        inverse = tl.load(_square(inverses, program * n + chunk, CHUNK))
        rate = tl.load(beta + (row * t + token) * h + head, mask=inside, other=0.0).to(tl.float32)
        g = _load_log_decay(log_decay, starts, row, head, token, inside, t, h)
        known = tl.dot(tile_k, factor, input_precision=PRECISION) * _decay_since_start(g)[:, None]
        x = ((tile_v - known) * rate[:, None]).to(dtype)
        tile_u = tl.dot(inverse, x, input_precision=PRECISION)
        _store_rows(u, tile_u, row, head, token, value, t, h, e)
        until_end = _decay_until_end(log_decay, starts, row, head, chunk, t, h, CHUNK)
        writes = (tile_u * until_end[:, None]).to(dtype)
        carry = tl.dot(tl.trans(tile_k), writes, carry * tl.exp(tl.sum(g, 0)), input_precision=PRECISION)
    if end is not None:
        _store_matrix(end, carry, program, key, value, d, e)


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
    program = tl.program_id(0)
    row, head, chunk = _locate(program, t, h, CHUNK)
    token, value = chunk * CHUNK + tl.arange(0, CHUNK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype = reads.dtype.element_ty
    tile = tl.zeros((CHUNK, BLOCK), tl.float32)
    for first in range(0, d, BLOCK):
        key = first + tl.arange(0, BLOCK)
        tile_q = _load_rows(q, row, head, token, key, t, h, d).to(dtype)
        factor = _load_matrix(states, program.to(tl.int64), key, value, d, e)
        tile = tl.dot(tile_q, factor, tile, input_precision=PRECISION)
    tile *= _decay_since_start(_load_log_decay(log_decay, starts, row, head, token, token < t, t, h))[:, None]
    tile_u = _load_rows(u, row, head, token, value, t, h, e)
    tile = tl.dot(tl.load(_square(reads, program, CHUNK)), tile_u, tile, input_precision=PRECISION)
    _store_rows(y, tile, row, head, token, value, t, h, e)


@triton.jit
def _state_grads(
    q,
    k,
    log_decay,
    beta,
    starts,
    inverses,
    reads,
    grad_y,
    grad_end,
    grad_x,
    grad_states,
    grad_state,
    t,
    h,
    d,
    e,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the last chunk to the first: dX and the gradient of the state behind it."""
    program = tl.program_id(0).to(tl.int64)
    row, head, n = program // h, program % h, tl.cdiv(t, CHUNK)
    key, value = tl.arange(0, KEYS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype = grad_x.dtype.element_ty
    carry = _load_matrix(grad_end, program, key, value, d, e).to(tl.float32)
    for step in range(n):
        chunk = n - 1 - step
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = token < t
        factor = carry.to(dtype)
        _store_matrix(grad_states, factor, program * n + chunk, key, value, d, e)
        tile_k = _load_rows(k, row, head, token, key, t, h, d).to(dtype)
        tile_y = _load_rows(grad_y, row, head, token, value, t, h, e).to(dtype)
        until_end = _decay_until_end(log_decay, starts, row, head, chunk, t, h, CHUNK)
        tile_u = tl.dot(tile_k, factor, input_precision=PRECISION) * until_end[:, None]
        read = tl.load(_square(reads, program * n + chunk, CHUNK))
        tile_u = tl.dot(tl.trans(read), tile_y, tile_u, input_precision=PRECISION)
        inverse = tl.load(_square(inverses, program * n + chunk, CHUNK))
        tile_x = tl.dot(tl.trans(inverse), tile_u.to(dtype), input_precision=PRECISION)
        _store_rows(grad_x, tile_x, row, head, token, value, t, h, e)
        rate = tl.load(beta + (row * t + token) * h + head, mask=inside, other=0.0).to(tl.float32)
        g = _load_log_decay(log_decay, starts, row, head, token, inside, t, h)
        since_start = _decay_since_start(g)
        tile_q = _load_rows(q, row, head, token, key, t, h, d).to(dtype)
        seen = (tile_y * since_start[:, None]).to(dtype)
        known = (tile_x * (-rate * since_start)[:, None]).to(dtype)
        carry = tl.dot(tl.trans(tile_q), seen, carry * tl.exp(tl.sum(g, 0)), input_precision=PRECISION)
        carry = tl.dot(tl.trans(tile_k), known, carry, input_precision=PRECISION)
    _store_matrix(grad_state, carry, program, key, value, d, e)


@triton.jit
def _pair_grads(
    q,
    k,
    v,
    log_decay,
    beta,
    starts,
    u,
    grad_y,
    grad_x,
    grad_inverses,
    grad_reads,
    grad_v,
    grad_log_decay,
    grad_beta,
    t,
    h,
    d,
    e,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients through the pairs of tokens of a chunk: those of K K^T and Q K^T, of v, and a part of the decays'."""
    program = tl.program_id(0)
    row, head, chunk = _locate(program, t, h, CHUNK)
    at = tl.arange(0, CHUNK)
    later = at[:, None] > at[None, :]
    token = chunk * CHUNK + at
    inside = token < t
    scalar = (row * t + token) * h + head
    rate = tl.load(beta + scalar, mask=inside, other=0.0).to(tl.float32)
    dtype = u.dtype.element_ty
    grad_rate = tl.zeros((CHUNK,), tl.float32)
    grad_kk, grad_qk = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, CHUNK), tl.float32)
    for first in range(0, e, BLOCK):
        value = first + tl.arange(0, BLOCK)
        tile_u = tl.trans(_load_rows(u, row, head, token, value, t, h, e))
        tile_x = _load_rows(grad_x, row, head, token, value, t, h, e)
        grad_kk = tl.dot(tile_x, tile_u, grad_kk, input_precision=PRECISION)
        tile_y = _load_rows(grad_y, row, head, token, value, t, h, e).to(dtype)
        grad_qk = tl.dot(tile_y, tile_u, grad_qk, input_precision=PRECISION)
        tile_x = tile_x.to(tl.float32)
        grad_rate += tl.sum(tile_x * _load_rows(v, row, head, token, value, t, h, e), 1)
        _store_rows(grad_v, tile_x * rate[:, None], row, head, token, value, t, h, e)
    kk, qk = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, CHUNK), tl.float32)
    for first in range(0, d, BLOCK):
        key = first + tl.arange(0, BLOCK)
        tile_k = _load_rows(k, row, head, token, key, t, h, d).to(dtype)
        tile_q = _load_rows(q, row, head, token, key, t, h, d).to(dtype)
        kk = tl.dot(tile_k, tl.trans(tile_k), kk, input_precision=PRECISION)
        qk = tl.dot(tile_q, tl.trans(tile_k), qk, input_precision=PRECISION)
    decay = _decay_between(_load_log_decay(log_decay, starts, row, head, token, inside, t, h), CHUNK)
    grad_qk *= decay
    grad_kk = tl.where(later, -grad_kk * decay, 0.0)
    tl.store(_square(grad_reads, program, CHUNK), grad_qk.to(dtype))
    tl.store(_square(grad_inverses, program, CHUNK), (grad_kk * rate[:, None]).to(dtype))
    kk *= grad_kk
    tl.store(grad_beta + scalar, grad_rate + tl.sum(kk, 1), mask=inside)
    # a pair's decay spans the tokens behind its write up to its read
    across = tl.cumsum(grad_qk * qk + kk * rate[:, None], 0, reverse=True)
    tl.store(grad_log_decay + scalar, tl.sum(tl.where(later, across, 0.0), 1), mask=inside)


@triton.jit
def _key_grads(
    q,
    k,
    log_decay,
    beta,
    starts,
    u,
    states,
    grad_y,
    grad_x,
    grad_states,
    grad_inverses,
    grad_reads,
    grad_q,
    grad_k,
    grad_log_decay,
    grad_beta,
    part,
    t,
    h,
    d,
    e,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of a block of q and k of a chunk, and through the states the other part of the decays'."""
    program = tl.program_id(0)
    row, head, chunk = _locate(program, t, h, CHUNK)
    at = tl.arange(0, CHUNK)
    token, key = chunk * CHUNK + at, tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < t
    dtype = u.dtype.element_ty
    seen = tl.zeros((CHUNK, BLOCK), tl.float32)
    known = tl.zeros((CHUNK, BLOCK), tl.float32)
    written = tl.zeros((CHUNK, BLOCK), tl.float32)
    carried = 0.0
    for first in range(0, e, BLOCK):
        value = first + tl.arange(0, BLOCK)
        before = _load_matrix(states, program.to(tl.int64), key, value, d, e)
        behind = _load_matrix(grad_states, program.to(tl.int64), key, value, d, e)
        tile_y = _load_rows(grad_y, row, head, token, value, t, h, e).to(dtype)
        seen = tl.dot(tile_y, tl.trans(before), seen, input_precision=PRECISION)
        tile_x = _load_rows(grad_x, row, head, token, value, t, h, e)
        known = tl.dot(tile_x, tl.trans(before), known, input_precision=PRECISION)
        tile_u = _load_rows(u, row, head, token, value, t, h, e)
        written = tl.dot(tile_u, tl.trans(behind), written, input_precision=PRECISION)
        carried += tl.sum(before.to(tl.float32) * behind.to(tl.float32))
    g = _load_log_decay(log_decay, starts, row, head, token, inside, t, h)
    since_start = _decay_since_start(g)
    scalar = (row * t + token) * h + head
    rate = tl.load(beta + scalar, mask=inside, other=0.0).to(tl.float32)
    seen *= since_start[:, None]
    known *= since_start[:, None]
    written *= _decay_until_end(log_decay, starts, row, head, chunk, t, h, CHUNK)[:, None]
    tile_q = _load_rows(q, row, head, token, key, t, h, d).to(dtype)
    tile_k = _load_rows(k, row, head, token, key, t, h, d).to(dtype)
    # decays since the start reach from it to the token, those until the end from behind the token to it
    from_start = tl.sum(tile_q * seen, 1)
    rates = tl.sum(tile_k * known, 1)
    to_end = tl.sum(tile_k * written, 1)
    from_start -= rate * rates
    across = tl.where(at[:, None] <= at[None, :], from_start[None, :], to_end[None, :])
    scalar += tl.program_id(1).to(tl.int64) * part
    tl.store(grad_log_decay + scalar, tl.sum(across, 1) + tl.exp(tl.sum(g, 0)) * carried, mask=inside)
    tl.store(grad_beta + scalar, -rates, mask=inside)

    grad_qk, grad_kk = tl.load(_square(grad_reads, program, CHUNK)), tl.load(_square(grad_inverses, program, CHUNK))
    seen = tl.dot(grad_qk, tile_k, seen, input_precision=PRECISION)
    _store_rows(grad_q, seen, row, head, token, key, t, h, d)
    written -= known * rate[:, None]
    written = tl.dot(tl.trans(grad_qk), tile_q, written, input_precision=PRECISION)
    written = tl.dot(grad_kk, tile_k, written, input_precision=PRECISION)
    written = tl.dot(tl.trans(grad_kk), tile_k, written, input_precision=PRECISION)
    _store_rows(grad_k, written, row, head, token, key, t, h, d)


@triton.jit
def _load_token(k, log_decay, a, b, beta, index, key, d, VECTOR: tl.constexpr):
    """k, the decay, a and b (d) of a token; the gated form is the general one with a = -decay k and b = beta k."""
    at, inside = index * d + key, key < d
    write = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
    if VECTOR:
        keep = tl.exp(tl.load(log_decay + at, mask=inside, other=0.0).to(tl.float32))
    else:
        keep = tl.exp(tl.load(log_decay + index).to(tl.float32)) + tl.zeros_like(write)
    if beta is None:
        read = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
        change = tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
    else:
        read = -keep * write
        write *= tl.load(beta + index).to(tl.float32)
        change = write
    return write, keep, read, change


@triton.jit
def _walk_forward(
    q,
    k,
    v,
    log_decay,
    state,
    a,
    b,
    beta,
    starts,
    y,
    end,
    checkpoints,
    every,
    t,
    h,
    d,
    e,
    VECTOR: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A head and a block of values, token by token."""
    program = tl.program_id(0).to(tl.int64)
    row, head = program // h, program % h
    key, value = tl.arange(0, KEYS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    carry = _load_matrix(state, program, key, value, d, e).to(tl.float32)
    for token in tl.range(0, t, num_stages=3):
        if checkpoints is not None and token % every == 0:
            _store_matrix(checkpoints, carry, program * tl.cdiv(t, every) + token // every, key, value, d, e)
        if starts is not None:
            carry = tl.where(tl.load(starts + row * t + token) != 0, 0.0, carry)
        index = (row * t + token) * h + head
        write, keep, read, change = _load_token(k, log_decay, a, b, beta, index, key, d, VECTOR)
        tile_v = tl.load(v + index * e + value, mask=value < e, other=0.0).to(tl.float32)
        found = tl.sum(read[:, None] * carry, 0)
        carry = keep[:, None] * carry + change[:, None] * found[None, :] + write[:, None] * tile_v[None, :]
        if y is not None:
            tile_q = tl.load(q + index * d + key, mask=key < d, other=0.0).to(tl.float32)
            tile_y = tl.sum(tile_q[:, None] * carry, 0)
            tl.store(y + index * e + value, tile_y.to(y.dtype.element_ty), mask=value < e)
    if end is not None:
        _store_matrix(end, carry, program, key, value, d, e)


@triton.jit
def _walk_backward(
    q,
    k,
    v,
    log_decay,
    a,
    b,
    starts,
    grad_y,
    grad_end,
    checkpoints,
    scratch,
    grad_q,
    grad_k,
    grad_log_decay,
    grad_a,
    grad_b,
    grad_v,
    grad_state,
    part,
    decay_part,
    every,
    t,
    h,
    d,
    e,
    VECTOR: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same from the last token to the first, with the states behind a checkpoint computed again into `scratch`."""
    program, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, head, n = program // h, program % h, tl.cdiv(t, every)
    key, column = tl.arange(0, KEYS), tl.arange(0, BLOCK)
    value = tl.program_id(1) * BLOCK + column
    saved = scratch + (program * tl.num_programs(1) + block) * every * (KEYS * BLOCK)
    saved += key[:, None] * BLOCK + column[None, :]
    grad = _load_matrix(grad_end, program, key, value, d, e).to(tl.float32)
    for step in range(n):
        first = (n - 1 - step) * every
        count = min(every, t - first)
        carry = _load_matrix(checkpoints, program * n + n - 1 - step, key, value, d, e)
        tl.debug_barrier()
        for i in tl.range(0, count, num_stages=2):
            tl.store(saved + i * (KEYS * BLOCK), carry)
            index = (row * t + first + i) * h + head
            if starts is not None:
                carry = tl.where(tl.load(starts + row * t + first + i) != 0, 0.0, carry)
            write, keep, read, change = _load_token(k, log_decay, a, b, None, index, key, d, VECTOR)
            tile_v = tl.load(v + index * e + value, mask=value < e, other=0.0).to(tl.float32)
            found = tl.sum(read[:, None] * carry, 0)
            carry = keep[:, None] * carry + change[:, None] * found[None, :] + write[:, None] * tile_v[None, :]
        tl.debug_barrier()
        for i in tl.range(0, count, num_stages=2):
            last = count - 1 - i
            index = (row * t + first + last) * h + head
            write, keep, read, change = _load_token(k, log_decay, a, b, None, index, key, d, VECTOR)
            tile_q = tl.load(q + index * d + key, mask=key < d, other=0.0).to(tl.float32)
            tile_v = tl.load(v + index * e + value, mask=value < e, other=0.0).to(tl.float32)
            tile_y = tl.load(grad_y + index * e + value, mask=value < e, other=0.0).to(tl.float32)
            grad += tile_q[:, None] * tile_y[None, :]
            at = block * part + index * d + key
            tl.store(grad_q + at, tl.sum(carry * tile_y[None, :], 1).to(grad_q.dtype.element_ty), mask=key < d)
            tl.store(grad_k + at, tl.sum(grad * tile_v[None, :], 1).to(grad_k.dtype.element_ty), mask=key < d)
            grad_tile_v = tl.sum(grad * write[:, None], 0)
            tl.store(grad_v + index * e + value, grad_tile_v.to(grad_v.dtype.element_ty), mask=value < e)
            carry = tl.load(saved + last * (KEYS * BLOCK))
            before = carry
            if starts is not None:
                start = tl.load(starts + row * t + first + last) != 0
                before = tl.where(start, 0.0, carry)
            found = tl.sum(read[:, None] * before, 0)
            grad_found = tl.sum(grad * change[:, None], 0)
            tl.store(grad_b + at, tl.sum(grad * found[None, :], 1).to(grad_b.dtype.element_ty), mask=key < d)
            tl.store(grad_a + at, tl.sum(before * grad_found[None, :], 1).to(grad_a.dtype.element_ty), mask=key < d)
            grad_decay = tl.sum(grad * before, 1) * keep
            if VECTOR:
                tl.store(grad_log_decay + at, grad_decay.to(grad_log_decay.dtype.element_ty), mask=key < d)
            else:
                grad_decay = tl.sum(grad_decay, 0).to(grad_log_decay.dtype.element_ty)
                tl.store(grad_log_decay + block * decay_part + index, grad_decay)
            grad = keep[:, None] * grad + read[:, None] * grad_found[None, :]
            if starts is not None:
                grad = tl.where(start, 0.0, grad)
    _store_matrix(grad_state, grad, program, key, value, d, e)
