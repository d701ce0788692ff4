"""Launching the Triton kernels of the neural memory over some chunks, and what the kernels load of one.

A tile of a memory's weights is said by a tuple, `tile`: where its layer begins among the weights of the memory, rows
(in units) and columns (out units) of the tile, and how many of each the layer has. The state of a memory before a chunk
is a tuple of pointers to its weights, surprise and anchor.

Letters: b batch, t slot of a token, h head, n chunk, c slot in the chunk, d key, e value, f column of the first layer,
w weights of a memory.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.gpu import launch, next_power_of_2
from zoo.ops.tiles import load_float32, load_rows, matrix_rows, store_rows

BLOCK, WIDE_BLOCK, WARPS = 16, 32, 8


class Span:
    """Chunks one after the other, `length` of them or what is left, and the launches over them.

    Args:
        start, length: its chunks.
        q, k, v: of all chunks, (b t h d) and (b t h e).
        gates: the coefficients of all chunks (`gate_coefficients`).
        initial: the weights of a new document, (h w).
        refresh, reset: (b n), of all chunks.
        hidden: the units between two layers; 0: one layer.
    """

    def __init__(
        self,
        start: int,
        length: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor, Tensor],
        initial: Tensor | None,
        refresh: Tensor | None,
        reset: Tensor | None,
        hidden: int,
    ):
        b, _, h, d = q.shape
        e, width = v.shape[-1], gates[0].shape[-2]
        self.slots = slice(start * width, (start + length) * width)
        self.q, self.k, self.v = (self.tokens(x) for x in (q, k, v))
        self.learned, self.surprised = (x[:, :, start : start + length].contiguous() for x in gates)
        self.chunks = self.learned.shape[2]
        if refresh is None:
            refresh = torch.ones(b, start + self.chunks, dtype=torch.bool, device=q.device)
        self.refresh = refresh[:, start : start + length].contiguous()
        self.reset = None if reset is None else reset[:, start : start + length].contiguous()
        self.initial, self.hidden, self.memories = initial, hidden, b * h
        self.columns = hidden or e
        self.sizes = self.chunks, self.q.shape[1], h, d, e, self.columns, width
        self.tiles = {"CHUNK": max(16, next_power_of_2(width)), "KEYS": max(16, next_power_of_2(d))}
        if hidden:
            self.tiles["VALUES"] = max(16, next_power_of_2(e))

    def tokens(self, x: Tensor) -> Tensor:
        """The part of a sequence (b t ...) that lies in the span."""
        return x[:, self.slots].contiguous()

    def launch_walk(self, kernel: Any, *arguments: Tensor | int | None, wide: bool = False) -> None:
        """Chunk after chunk: a program a memory, or a block of its columns where it has one layer."""
        blocks = 1 if self.hidden else triton.cdiv(self.columns, BLOCK)
        self._launch(kernel, (self.memories, blocks), *arguments, wide=wide)

    def launch_chunks(self, kernel: Any, *arguments: Tensor | int | None, wide: bool = False) -> None:
        """All chunks at once: a program each."""
        self._launch(kernel, (self.memories * self.chunks,), *arguments, wide=wide)

    def _launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int | None, wide: bool) -> None:
        """`wide` or not, whichever leaves the threads enough registers on every GPU."""
        block = WIDE_BLOCK if wide else BLOCK
        launch(kernel, grid, *arguments, *self.sizes, BLOCK=block, **self.tiles, warps=WARPS, stages=1)


@triton.jit
def slot_rows(memory, chunk, t, h, width, CHUNK: tl.constexpr):
    """The rows of (b t h ...) that hold the slots (c) of a chunk; `memory` counts the b h ones."""
    slot = tl.arange(0, CHUNK)
    token = chunk * width + slot
    return (memory // h * t + token) * h + memory % h, (slot < width) & (token < t)


@triton.jit
def load_flags(refresh, reset, at):
    """Whether a chunk moves the anchor, and whether it begins anew; `at` counts the chunks (b n)."""
    opens = tl.load(refresh + at)
    restarts = False
    if reset is not None:
        restarts = tl.load(reset + at)
    return opens, restarts


@triton.jit
def load_read_gates(learned, at, width, CHUNK: tl.constexpr):
    """The coefficients in the weights that each token reads: of minus the chunk's gradients (c c), of surprise (c) and
    of weights (c) before the chunk; `at` counts the chunks (b h n)."""
    slot = tl.arange(0, CHUNK)
    inside = slot < width
    line = learned + (at * width + slot) * (width + 2)
    of_gradients = load_float32(line[:, None] + slot[None, :], inside[:, None] & inside[None, :])
    return of_gradients, load_float32(line + width, inside), load_float32(line + width + 1, inside)


@triton.jit
def load_write_gates(learned, surprised, at, width, CHUNK: tl.constexpr):
    """The coefficients in what the chunk leaves: of minus its gradients in weights and in surprise, (c) each, of
    surprise and weights before it in the weights, of surprise in the surprise."""
    slot = tl.arange(0, CHUNK)
    inside = slot < width
    line, past_line = learned + (at * width + width - 1) * (width + 2), surprised + at * (width + 1)
    of_gradients, past_of_gradients = load_float32(line + slot, inside), load_float32(past_line + slot, inside)
    of_past, of_weight = tl.load(line + width), tl.load(line + width + 1)
    return of_gradients, past_of_gradients, of_past, of_weight, tl.load(past_line + width)


@triton.jit
def _add(pointer, x, mask=None):
    tl.store(pointer, tl.load(pointer, mask=mask) + x, mask=mask)


@triton.jit
def add_read_gates(grad_learned, at, width, grads, CHUNK: tl.constexpr):
    """Add the gradients of what `load_read_gates` loads."""
    of_gradients, of_past, of_weight = grads
    slot = tl.arange(0, CHUNK)
    inside = slot < width
    line = grad_learned + (at * width + slot) * (width + 2)
    _add(line[:, None] + slot[None, :], of_gradients, inside[:, None] & inside[None, :])
    _add(line + width, of_past, inside)
    _add(line + width + 1, of_weight, inside)


@triton.jit
def add_write_gates(grad_learned, grad_surprised, at, width, grads, CHUNK: tl.constexpr):
    """Add the gradients of what `load_write_gates` loads; those of the surprise are new."""
    of_gradients, past_of_gradients, of_past, of_weight, past_of_past = grads
    slot = tl.arange(0, CHUNK)
    inside = slot < width
    line, past_line = grad_learned + (at * width + width - 1) * (width + 2), grad_surprised + at * (width + 1)
    _add(line + slot, of_gradients, inside)
    _add(line + width, of_past)
    _add(line + width + 1, of_weight)
    tl.store(past_line + slot, past_of_gradients, mask=inside)
    tl.store(past_line + width, past_of_past)


@triton.jit
def load_tile(x, tile):
    """Of the weights of a memory, 0 outside the layer."""
    layer, row, column, height, width = tile
    return load_rows(x + layer, matrix_rows(0, row, height), column, width)


@triton.jit
def store_tile(x, tile, values):
    layer, row, column, height, width = tile
    store_rows(x + layer, matrix_rows(0, row, height), column, width, values)


@triton.jit
def load_pair(weights, surprise, tile):
    """A tile of the weights and of the surprise, or of their gradients."""
    return load_tile(weights, tile), load_tile(surprise, tile)


@triton.jit
def restart(weight, past, initial, restarts, tile):
    """Weights and surprise before a chunk -> as it finds them, those of a new document included."""
    if initial is not None:
        weight = tl.where(restarts, load_tile(initial, tile), weight)
        past = tl.where(restarts, 0.0, past)
    return weight, past


@triton.jit
def load_state(state, initial, opens, restarts, tile):
    """Weights and surprise as a chunk finds them, and the point at which it takes its gradients, the anchor."""
    weights, surprise, anchor = state
    weight, past = load_pair(weights, surprise, tile)
    weight, past = restart(weight, past, initial, restarts, tile)
    return weight, past, tl.where(opens, weight, load_tile(anchor, tile))


@triton.jit
def store_state(state, tile, weight, past, point):
    weights, surprise, anchor = state
    store_tile(weights, tile, weight)
    store_tile(surprise, tile, past)
    store_tile(anchor, tile, point)
