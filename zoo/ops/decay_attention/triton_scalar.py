"""The Triton kernels for one decay a head.

    y_r = exp(g_{1..r}) S^T q_r + sum_{s <= r} exp(g_{s+1..r}) (q_r k_s) v_s

gives the outputs of a chunk from the state before it; the gradients of q, k and v are the same on other arguments.

Letters: b batch, t tokens, h heads, d key width, e value width; n chunks, c token in a chunk, r reading, s written;
g log-decay, S state.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.decay_attention.triton_carry import Walk, block_size, carry_chunks, launch_chunks, position_of
from zoo.ops.gpu import target
from zoo.ops.tiles import (
    decay_between,
    decay_since_start,
    decay_until_end,
    load_rows,
    load_scalars,
    load_transposed,
    locate_chunk,
    matrix_rows,
    store_rows,
    store_scalars,
    token_rows,
)


class _Tiling(NamedTuple):
    """Tokens in a chunk, and the largest tiles of what products sum over and of the width that they give."""

    chunk: int
    inner: int
    outer: int


def _tiling(dtype: torch.dtype) -> _Tiling:
    """WGMMA and tcgen05 take 64 tokens; float32, multiplied in three parts, has registers for half of that."""
    if target() == "cpu":
        return _Tiling(chunk=16, inner=16, outer=32)
    if dtype == torch.float32:
        return _Tiling(chunk=32, inner=32, outer=32)
    return _Tiling(chunk=64, inner=64, outer=128)


def forward_scalar(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, y: Tensor, end: Tensor) -> None:
    """Fill y (b t h e) and the last state (b h d e). q, k and v are of one dtype."""
    walk = Walk(_tiling(v.dtype).chunk)
    states = _carry_states(k, v, log_decay, state, end, walk)
    _read_chunks(q, k, v, log_decay, states, y, walk)


def backward_scalar(
    grad_y: Tensor,
    grad_end: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    grads: tuple[Tensor, ...],
) -> None:
    """Fill the gradients of q, k, v, log_decay and the state. grad_y, q, k and v are of one dtype."""
    grad_q, grad_k, grad_v, grad_log_decay, grad_state = grads
    walk, back = Walk(_tiling(v.dtype).chunk), Walk(_tiling(v.dtype).chunk, reverse=True)
    before = _carry_states(k, v, log_decay, state, torch.empty_like(state), walk)
    behind = _carry_states(q, grad_y, log_decay, grad_end, grad_state, back)
    grad_state *= log_decay[:, 0, :, None, None].float().exp()
    _read_chunks(grad_y, v, k, log_decay, before, grad_q, walk, transposed=True)
    _read_chunks(v, grad_y, q, log_decay, behind, grad_k, back, transposed=True)
    _read_chunks(k, q, grad_y, log_decay, behind, grad_v, back)
    _differentiate_decays(q, k, v, grad_y, log_decay, before, behind, grad_log_decay, walk)


def _carry_states(k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, end: Tensor, walk: Walk) -> Tensor:
    block = min(64, _tiling(v.dtype).outer)
    return carry_chunks(k, v, log_decay, state, end, walk, _tiling(v.dtype).inner, block)


def _read_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    states: Tensor,
    y: Tensor,
    walk: Walk,
    transposed: bool = False,
) -> None:
    """y (b t h e) from q, k (b t h d), v (b t h e) and the states (b h n d e), transposed (b h n e d)."""
    d, e, tiling = q.shape[-1], v.shape[-1], _tiling(v.dtype)
    widest = 64 if target() == "sm_80" and d > 128 else tiling.outer  # its registers hold no more there
    block_e = block_size(e, widest)
    launch_chunks(
        *(_read, triton.cdiv(e, block_e), (q, k, v, log_decay, states, y), q, v, walk, tiling.inner, widest),
        warps=8 if block_e > 64 else 4,
        TRANSPOSED=transposed,
        CHUNK=walk.chunk,
        REVERSE=walk.reverse,
    )


def _differentiate_decays(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_y: Tensor,
    log_decay: Tensor,
    before: Tensor,
    behind: Tensor,
    grad: Tensor,
    walk: Walk,
) -> None:
    """The gradient of the decays (b t h) from the states before and their gradients behind each chunk."""
    tiling, tensors = _tiling(v.dtype), (q, k, v, grad_y, log_decay, before, behind, grad)
    blocks = tiling.inner, min(64, tiling.outer)
    launch_chunks(_read_decays, 1, tensors, q, v, walk, *blocks, warps=8, CHUNK=walk.chunk)


@triton.jit
def _read(
    q,
    k,
    v,
    log_decay,
    states,
    y,
    t,
    h,
    chunks,
    D: tl.constexpr,
    E: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """A program owns a block of values of one chunk."""
    program, sequence, chunk = locate_chunk(chunks)
    index = tl.arange(0, CHUNK)
    token = position_of(index, chunk, chunks, REVERSE, CHUNK)
    tokens = token_rows(sequence, token, t, h)
    value = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    out = tl.zeros((CHUNK, BLOCK_E), tl.float32)
    weights = tl.zeros((CHUNK, CHUNK), tl.float32)
    for start in range(0, D, BLOCK_D):
        key = start + tl.arange(0, BLOCK_D)
        if TRANSPOSED:
            tile = load_transposed(states, matrix_rows(program, value, E), key, D)
        else:
            tile = load_rows(states, matrix_rows(program, key, D), value, E)
        query = load_rows(q, tokens, key, D)
        write = load_rows(k, tokens, key, D)
        out = tl.dot(query, tile, out, input_precision=PRECISION)
        weights = tl.dot(query, tl.trans(write), weights, input_precision=PRECISION)
    g = load_scalars(log_decay, token_rows(sequence, token + 1 if REVERSE else token, t, h))
    written = load_rows(v, tokens, value, E)
    weights = (weights * decay_between(g)).to(written.dtype)
    out = tl.dot(weights, written, out * decay_since_start(g)[:, None], input_precision=PRECISION)
    store_rows(y, tokens, value, E, out)


@triton.jit
def _read_decays(
    q,
    k,
    v,
    grad_y,
    log_decay,
    before,
    behind,
    grad,
    t,
    h,
    chunks,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The gradient of a decay is the sum of all that went through it, from a write before it to a read at or behind it.

    Four sums, by where these lie: both in the chunk; before it and in it; in it and behind it; before it and behind it.
    """
    program, sequence, chunk = locate_chunk(chunks)
    index = tl.arange(0, CHUNK)
    token = chunk * CHUNK + index
    tokens = token_rows(sequence, token, t, h)
    earlier = index[:, None] > index[None, :]
    g = load_scalars(log_decay, tokens)
    g_next = load_scalars(log_decay, token_rows(sequence, token + 1, t, h))

    weights = tl.zeros((CHUNK, CHUNK), tl.float32)
    for start in range(0, D, BLOCK_D):
        key = start + tl.arange(0, BLOCK_D)
        query = load_rows(q, tokens, key, D)
        write = load_rows(k, tokens, key, D)
        weights = tl.dot(query, tl.trans(write), weights, input_precision=PRECISION)
    grad_weights = tl.zeros((CHUNK, CHUNK), tl.float32)
    for start in range(0, E, BLOCK_E):
        value = start + tl.arange(0, BLOCK_E)
        grad_rows = load_rows(grad_y, tokens, value, E)
        written = load_rows(v, tokens, value, E)
        grad_weights = tl.dot(grad_rows, tl.trans(written), grad_weights, input_precision=PRECISION)
    inside = tl.cumsum(weights * grad_weights * decay_between(g), 0, reverse=True)
    total = tl.sum(tl.where(earlier, inside, 0.0), 1)

    from_before = tl.zeros((CHUNK,), tl.float32)
    to_behind = tl.zeros((CHUNK,), tl.float32)
    across = tl.zeros((BLOCK_D,), tl.float32)
    program_behind = sequence * chunks + chunks - 1 - chunk
    for start_e in range(0, E, BLOCK_E):
        value = start_e + tl.arange(0, BLOCK_E)
        read = tl.zeros((CHUNK, BLOCK_E), tl.float32)
        grad_written = tl.zeros((CHUNK, BLOCK_E), tl.float32)
        for start_d in range(0, D, BLOCK_D):
            key = start_d + tl.arange(0, BLOCK_D)
            tile = load_rows(before, matrix_rows(program, key, D), value, E)
            grad_tile = load_rows(behind, matrix_rows(program_behind, key, D), value, E)
            query = load_rows(q, tokens, key, D)
            write = load_rows(k, tokens, key, D)
            read = tl.dot(query, tile, read, input_precision=PRECISION)
            grad_written = tl.dot(write, grad_tile, grad_written, input_precision=PRECISION)
            across += tl.sum(tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
        from_before += tl.sum(read * load_rows(grad_y, tokens, value, E), 1)
        to_behind += tl.sum(grad_written * load_rows(v, tokens, value, E), 1)

    total += tl.cumsum(from_before * decay_since_start(g), 0, reverse=True)
    to_behind *= decay_until_end(g_next)  # behind the chunk, its first decay is still to come: it is among them
    total += tl.sum(tl.where(earlier, to_behind[None, :], 0.0), 1)
    total += tl.sum(across, 0) * tl.exp(tl.sum(g, 0) + tl.sum(tl.where(index == CHUNK - 1, g_next, 0.0), 0))
    store_scalars(grad, tokens, total)
