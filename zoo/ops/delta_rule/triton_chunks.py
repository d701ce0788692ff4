"""How the gated delta rule is cut into chunks in Triton, and what its kernels load of one.

Letters: b batch, t tokens, h heads, d keys, e values, n chunks, c token in a chunk; g log-decays.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.gpu import dot_precision, launch, next_power_of_2, on_nvidia, target
from zoo.ops.tiles import decay_between, decay_since_start, decay_until_end, load_rows, load_scalars, token_rows


class Tiles(NamedTuple):
    """How some inputs are cut up.

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
    def choose(cls, q: Tensor, k: Tensor, v: Tensor) -> "Tiles":
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


@triton.jit
def load_log_decays(log_decay, starts, sequence, token, t, h):
    """g (c) of tokens (c) of a head, -inf where a document starts; 0 outside the sequence."""
    rows = token_rows(sequence, token, t, h)
    g = load_scalars(log_decay, rows)
    if starts is not None:
        start = tl.load(starts + sequence // h * t + token, mask=rows[1], other=0) != 0
        g = tl.where(start, float("-inf"), g)
    return g


@triton.jit
def load_decays(log_decay, starts, sequence, chunk, t, h, CHUNK: tl.constexpr):
    """The decays of a chunk: since its start up to each token (c), from behind each until its end (c), and in all."""
    at = tl.arange(0, CHUNK)
    g = load_log_decays(log_decay, starts, sequence, chunk * CHUNK + at, t, h)
    g_next = load_log_decays(log_decay, starts, sequence, chunk * CHUNK + at + 1, t, h)
    g_next = tl.where(at < CHUNK - 1, g_next, 0.0)
    return decay_since_start(g), decay_until_end(g_next), tl.exp(tl.sum(g, 0))


@triton.jit
def load_decays_between(log_decay, starts, sequence, chunk, t, h, CHUNK: tl.constexpr):
    """G (c c) of a chunk."""
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    return decay_between(load_log_decays(log_decay, starts, sequence, token, t, h))


@triton.jit
def load_key_products(q, k, tokens, d, dtype, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """K K^T and Q K^T (c c) of the tokens in some rows."""
    kk, qk = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, CHUNK), tl.float32)
    for first in range(0, d, BLOCK):
        key = first + tl.arange(0, BLOCK)
        tile_k = load_rows(k, tokens, key, d).to(dtype)
        tile_q = load_rows(q, tokens, key, d).to(dtype)
        kk = tl.dot(tile_k, tl.trans(tile_k), kk, input_precision=PRECISION)
        qk = tl.dot(tile_q, tl.trans(tile_k), qk, input_precision=PRECISION)
    return kk, qk


@triton.jit
def square(x, program, CHUNK: tl.constexpr):
    """Pointers to a chunk's tile (c c) of x (b h n c c)."""
    at = tl.arange(0, CHUNK)
    return x + program * CHUNK * CHUNK + at[:, None] * CHUNK + at[None, :]
