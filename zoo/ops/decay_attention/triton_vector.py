"""The Triton kernels for one decay a key channel.

    y_r = S^T (exp(g_{1..r}) q_r) + sum_{s <= r} sum_d (q_rd k_sd exp(g_{s+1..r, d})) v_s

gives the outputs of a chunk from the state before it. The decay between two tokens is a vector: the weights of a chunk
are not one product of matrices. A chunk is cut into parts. Inside a part a loop over its writes makes the weights, in
all parts at once. A write in an earlier part is decayed up to where the part of the read begins, the query from there
on: both factors are at most 1, and there is one product a part.

Letters: b batch, t tokens, h heads, d key width, e value width; n chunks, c position in a chunk, r reading, s written;
g log-decay, S state.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.decay_attention.triton_carry import Walk, block_size, carry_chunks, launch_chunks, position_of
from zoo.ops.gpu import target
from zoo.ops.tiles import (
    decay_since_start,
    decay_until_end,
    load_rows,
    load_transposed,
    locate_chunk,
    matrix_rows,
    store_rows,
    token_rows,
)


def forward_vector(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, y: Tensor, end: Tensor, shift: int = 0
) -> None:
    """Fill y (b t h e) and the last state (b h d e). q, k and v are of one dtype. Shift 1 reads before it writes."""
    walk = Walk(_sizes(v.dtype).chunk, shift)
    states = _carry_states(k, v, log_decay, state, end, walk)
    _read_chunks(q, k, v, log_decay, states, y, walk)


def backward_vector(
    grad_y: Tensor,
    grad_end: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    grads: tuple[Tensor, ...],
    shift: int = 0,
) -> None:
    """Fill the gradients of q, k, v, log_decay and the state. grad_y, q, k and v are of one dtype."""
    grad_q, grad_k, grad_v, grad_log_decay, grad_state = grads
    walk, back = Walk(_sizes(v.dtype).chunk, shift), Walk(_sizes(v.dtype).chunk, shift, reverse=True)
    before = _carry_states(k, v, log_decay, state, torch.empty_like(state), walk)
    behind = _carry_states(q, grad_y, log_decay, grad_end, grad_state, back)
    if not shift:
        grad_state *= log_decay[:, 0, :, :, None].float().exp()
    _read_chunks(k, q, grad_y, log_decay, behind, grad_v, back)
    _read_keys_of_chunks(grad_y, v, k, log_decay, before, grad_q, walk)
    _read_keys_of_chunks(v, grad_y, q, log_decay, behind, grad_k, back)
    _differentiate_decays(q, k, v, grad_y, log_decay, before, behind, grad_log_decay, walk)


class _Sizes(NamedTuple):
    """How the work is cut.

    chunk, part: positions in a chunk and in a part of one.
    width: largest tile of keys and of values.
    read: largest block of values that a program reads; each block makes the weights anew.
    carried: largest tile of the state that a program carries.
    warps: of a program that reads.
    """

    chunk: int
    part: int
    width: int
    read: int
    carried: tuple[int, int]
    warps: int


def _sizes(dtype: torch.dtype) -> _Sizes:
    """WGMMA and tcgen05 take 64 positions; float32, multiplied in three parts, has registers for half of that."""
    if target() == "cpu":
        return _Sizes(chunk=16, part=4, width=16, read=32, carried=(16, 32), warps=4)
    if dtype == torch.float32:
        return _Sizes(chunk=32, part=16, width=32, read=32, carried=(32, 32), warps=4)
    return _Sizes(chunk=64, part=16, width=32, read=128, carried=(64, 32), warps=8)


def _carry_states(k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, end: Tensor, walk: Walk) -> Tensor:
    return carry_chunks(k, v, log_decay, state, end, walk, *_sizes(v.dtype).carried)


def _read_chunks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, states: Tensor, y: Tensor, walk: Walk) -> None:
    """y (b t h e) from q, k (b t h d), v (b t h e) and the states (b h n d e)."""
    widest = _sizes(v.dtype).read
    blocks = triton.cdiv(v.shape[-1], block_size(v.shape[-1], widest))
    _launch(_read, blocks, (q, k, v, log_decay, states, y), q, v, walk, widest)


def _read_keys_of_chunks(
    x: Tensor, v: Tensor, k: Tensor, log_decay: Tensor, states: Tensor, y: Tensor, walk: Walk
) -> None:
    """y (b t h d) from x, v (b t h e), k (b t h d) and the states (b h n d e)."""
    blocks = triton.cdiv(k.shape[-1], _sizes(v.dtype).width)
    _launch(_read_keys, blocks, (x, v, k, log_decay, states, y), k, v, walk)


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
    """The gradient of the decays (b t h d) from the states before and their gradients behind each chunk."""
    blocks = triton.cdiv(k.shape[-1], _sizes(v.dtype).width)
    _launch(_read_decays, blocks, (q, k, v, grad_y, log_decay, before, behind, grad), k, v, walk)


def _launch(
    kernel: Callable,
    blocks: int,
    tensors: tuple[Tensor, ...],
    keys: Tensor,
    values: Tensor,
    walk: Walk,
    widest: int | None = None,
) -> None:
    """Over blocks of all chunks of keys (b t h d) and values (b t h e)."""
    sizes = _sizes(values.dtype)
    tiles = sizes.width, widest or sizes.width
    constants = {"PART": sizes.part, **walk.constants()}
    launch_chunks(kernel, blocks, tensors, keys, values, walk, *tiles, warps=sizes.warps, **constants)


@triton.jit
def _pass_write(since, until, g, s, step):
    """From write s of every part to the one before it.

    `since`, what lies between the write and the reads r, goes from g_{s+1..r} to g_{s..r}, and is 0 at r < s. `until`,
    what a write meets up to the end of its part, grows by g_s for the writes before s.
    """
    behind = (step >= s)[:, None]
    return tl.where(behind, since + g, 0.0), tl.where(behind, until, until + g)


@triton.jit
def _inside_parts(index, s, PART: tl.constexpr):
    """Which pairs (r s) are of write s of a part and a read of the same part, at it or behind it."""
    return (index % PART >= s)[:, None] & (index[None, :] == (index // PART * PART + s)[:, None])


@triton.jit
def _across_parts(part, number):
    """Which pairs (r s) are of a write in an earlier part and a read in the part of that number."""
    return (part == number)[:, None] & (part < number)[None, :]


@triton.jit
def _pass_part(write, g, part, number):
    """The writes (c d) before a part, decayed from where it begins to where it ends."""
    passed = tl.sum(tl.where((part == number)[:, None], g, 0.0), 0)[None, :]
    return tl.where((part < number)[:, None], write * tl.exp(passed), write)


@triton.jit
def _sum_behind(x, CHUNK: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr):
    """x (c d) summed from each position to the end of its part."""
    x = tl.cumsum(tl.reshape(x, (CHUNK // PART, PART, WIDTH)), 1, reverse=True)
    return tl.reshape(x, (CHUNK, WIDTH))


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
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    READ_LAG: tl.constexpr,
    WRITE_LAG: tl.constexpr,
    DECAY_LAG: tl.constexpr,
):
    """A program owns a block of values of one chunk."""
    program, sequence, chunk = locate_chunk(chunks)
    index = tl.arange(0, CHUNK)
    part = index // PART
    position = position_of(index, chunk, chunks, REVERSE, CHUNK)
    reads = token_rows(sequence, position - READ_LAG, t, h)
    writes = token_rows(sequence, position - WRITE_LAG, t, h)
    decays = token_rows(sequence, position - DECAY_LAG, t, h)
    value = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    out = tl.zeros((CHUNK, BLOCK_E), tl.float32)
    weights = tl.zeros((CHUNK, CHUNK), tl.float32)
    for start in range(0, D, BLOCK_D):
        key = start + tl.arange(0, BLOCK_D)
        g = load_rows(log_decay, decays, key, D).to(tl.float32)
        query = load_rows(q, reads, key, D)
        tile = load_rows(states, matrix_rows(program, key, D), value, E)
        out = tl.dot((query * decay_since_start(g)).to(tile.dtype), tile, out, input_precision=PRECISION)

        since = tl.zeros((CHUNK, BLOCK_D), tl.float32)
        until = tl.zeros((CHUNK, BLOCK_D), tl.float32)
        for back in range(PART):
            s = PART - 1 - back
            at = position_of(part * PART + s, chunk, chunks, REVERSE, CHUNK)
            write = load_rows(k, token_rows(sequence, at - WRITE_LAG, t, h), key, D).to(tl.float32)
            weight = tl.sum(query * write * tl.exp(since), 1)
            weights += tl.where(_inside_parts(index, s, PART), weight[:, None], 0.0)
            g_write = load_rows(log_decay, token_rows(sequence, at - DECAY_LAG, t, h), key, D).to(tl.float32)
            since, until = _pass_write(since, until, g_write, s, index % PART)

        query = (query * tl.exp(since)).to(tile.dtype)
        write = load_rows(k, writes, key, D) * tl.exp(until)
        for number in range(1, CHUNK // PART):
            product = tl.dot(query, tl.trans(write.to(tile.dtype)), input_precision=PRECISION)
            weights += tl.where(_across_parts(part, number), product, 0.0)
            write = _pass_part(write, g, part, number)
    written = load_rows(v, writes, value, E)
    out = tl.dot(weights.to(written.dtype), written, out, input_precision=PRECISION)
    store_rows(y, reads, value, E, out)


@triton.jit
def _read_keys(
    x,
    v,
    k,
    log_decay,
    states,
    y,
    t,
    h,
    chunks,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    READ_LAG: tl.constexpr,
    WRITE_LAG: tl.constexpr,
    DECAY_LAG: tl.constexpr,
):
    """y_rd = exp(g_{1..r, d}) (S x_r)_d + sum_{s <= r} (x_r v_s) k_sd exp(g_{s+1..r, d}).

    A program owns a block of keys of one chunk.
    """
    program, sequence, chunk = locate_chunk(chunks)
    index = tl.arange(0, CHUNK)
    part = index // PART
    position = position_of(index, chunk, chunks, REVERSE, CHUNK)
    reads = token_rows(sequence, position - READ_LAG, t, h)
    writes = token_rows(sequence, position - WRITE_LAG, t, h)
    decays = token_rows(sequence, position - DECAY_LAG, t, h)
    key = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    weights = tl.zeros((CHUNK, CHUNK), tl.float32)
    out = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    for start in range(0, E, BLOCK_E):
        value = start + tl.arange(0, BLOCK_E)
        query = load_rows(x, reads, value, E)
        written = load_rows(v, writes, value, E)
        tile = load_transposed(states, matrix_rows(program, key, D), value, E)
        weights = tl.dot(query, tl.trans(written), weights, input_precision=PRECISION)
        out = tl.dot(query, tile, out, input_precision=PRECISION)
    g = load_rows(log_decay, decays, key, D).to(tl.float32)
    out *= decay_since_start(g)

    since = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    until = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    for back in range(PART):
        s = PART - 1 - back
        at = position_of(part * PART + s, chunk, chunks, REVERSE, CHUNK)
        weight = tl.sum(tl.where(_inside_parts(index, s, PART), weights, 0.0), 1)
        write = load_rows(k, token_rows(sequence, at - WRITE_LAG, t, h), key, D).to(tl.float32)
        out += weight[:, None] * write * tl.exp(since)
        g_write = load_rows(log_decay, token_rows(sequence, at - DECAY_LAG, t, h), key, D).to(tl.float32)
        since, until = _pass_write(since, until, g_write, s, index % PART)

    write = load_rows(k, writes, key, D) * tl.exp(until)
    earlier = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    for number in range(1, CHUNK // PART):
        weight = tl.where(_across_parts(part, number), weights, 0.0).to(states.dtype.element_ty)
        earlier = tl.dot(weight, write.to(states.dtype.element_ty), earlier, input_precision=PRECISION)
        write = _pass_part(write, g, part, number)
    out += earlier * tl.exp(since)
    store_rows(y, reads, key, D, out)


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
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    READ_LAG: tl.constexpr,
    WRITE_LAG: tl.constexpr,
    DECAY_LAG: tl.constexpr,
):
    """The gradient of a decay is the sum of all that went through it, from a write before it to a read at or behind it.

    Sums by where these lie: before the chunk or in it; in it or behind it; both in it, in one part or in two.
    A program owns a block of keys of one chunk.
    """
    program, sequence, chunk = locate_chunk(chunks)
    index = tl.arange(0, CHUNK)
    part = index // PART
    position = position_of(index, chunk, chunks, REVERSE, CHUNK)
    reads = token_rows(sequence, position - READ_LAG, t, h)
    writes = token_rows(sequence, position - WRITE_LAG, t, h)
    decays = token_rows(sequence, position - DECAY_LAG, t, h)
    program_behind = sequence * chunks + chunks - 1 - chunk
    key = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    weights = tl.zeros((CHUNK, CHUNK), tl.float32)
    from_before = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    to_behind = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    across = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, E, BLOCK_E):
        value = start + tl.arange(0, BLOCK_E)
        grad_rows = load_rows(grad_y, reads, value, E)
        written = load_rows(v, writes, value, E)
        tile = load_transposed(before, matrix_rows(program, key, D), value, E)
        grad_tile = load_transposed(behind, matrix_rows(program_behind, key, D), value, E)
        weights = tl.dot(grad_rows, tl.trans(written), weights, input_precision=PRECISION)
        from_before = tl.dot(grad_rows, tile, from_before, input_precision=PRECISION)
        to_behind = tl.dot(written, grad_tile, to_behind, input_precision=PRECISION)
        across += tl.sum(tile.to(tl.float32) * grad_tile.to(tl.float32), 0)

    query = load_rows(q, reads, key, D).to(tl.float32)
    write = load_rows(k, writes, key, D).to(tl.float32)
    g = load_rows(log_decay, decays, key, D).to(tl.float32)
    g_next = load_rows(log_decay, token_rows(sequence, position + 1 - DECAY_LAG, t, h), key, D).to(tl.float32)
    to_behind *= write * decay_until_end(g_next)  # its first decay behind the chunk is among them
    total = tl.cumsum(from_before * query * decay_since_start(g), 0, reverse=True)
    total += tl.cumsum(to_behind, 0) - to_behind
    last = (index == CHUNK - 1)[:, None]
    total += (across * tl.exp(tl.sum(g, 0) + tl.sum(tl.where(last, g_next, 0.0), 0)))[None, :]

    since = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    until = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    for back in range(PART):
        s = PART - 1 - back
        at = position_of(part * PART + s, chunk, chunks, REVERSE, CHUNK)
        weight = tl.sum(tl.where(_inside_parts(index, s, PART), weights, 0.0), 1)
        write_s = load_rows(k, token_rows(sequence, at - WRITE_LAG, t, h), key, D).to(tl.float32)
        through = _sum_behind(weight[:, None] * query * write_s * tl.exp(since), CHUNK, PART, BLOCK_D)
        total += tl.where((index % PART > s)[:, None], through, 0.0)
        g_write = load_rows(log_decay, token_rows(sequence, at - DECAY_LAG, t, h), key, D).to(tl.float32)
        since, until = _pass_write(since, until, g_write, s, index % PART)

    query *= tl.exp(since)
    write *= tl.exp(until)
    earlier = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    for number in range(1, CHUNK // PART):
        weight = tl.where(_across_parts(part, number), weights, 0.0).to(before.dtype.element_ty)
        earlier = tl.dot(weight, write.to(weight.dtype), earlier, input_precision=PRECISION)
        later = tl.dot(tl.trans(weight), query.to(weight.dtype), input_precision=PRECISION) * write
        total += tl.where((part < number)[:, None], tl.cumsum(later, 0) - later, 0.0)
        write = _pass_part(write, g, part, number)
    total += _sum_behind(earlier * query, CHUNK, PART, BLOCK_D)
    store_rows(grad, decays, key, D, total)
