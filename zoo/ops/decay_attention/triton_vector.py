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

from zoo.ops.decay_attention.triton_carry import (
    Walk,
    block_size,
    carry_chunks,
    first_row,
    load_rows,
    position_of,
    rows_at,
)
from zoo.ops.gpu import dot_precision, launch, target


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
    block_e = block_size(v.shape[-1], _sizes(v.dtype).read)
    blocks = triton.cdiv(v.shape[-1], block_e)
    _launch(_read, blocks, (q, k, v, log_decay, states, y), q, v, walk, block_e)


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
    block_e: int | None = None,
) -> None:
    """Over blocks of all chunks of keys (b t h d) and values (b t h e)."""
    (b, t, h, d), e = keys.shape, values.shape[-1]
    sizes = _sizes(values.dtype)
    constants = {
        "D": d,
        "E": e,
        "BLOCK_D": block_size(d, sizes.width),
        "BLOCK_E": block_e or block_size(e, sizes.width),
        "PRECISION": dot_precision(),
        "PART": sizes.part,
        **walk.constants(),
    }
    chunks = walk.chunks(t)
    launch(kernel, (b * h * chunks, blocks), *tensors, t, h, chunks, **constants, warps=sizes.warps, stages=1)


@triton.jit
def _pass_write(since, until, g, s, step):
    """From write s of every part to the one before it.

    `since`, what lies between the write and the reads r, goes from g_{s+1..r} to g_{s..r}, and is 0 at r < s. `until`,
    what a write meets up to the end of its part, grows by g_s for the writes before s.
    """
    behind = (step >= s)[:, None]
    return tl.where(behind, since + g, 0.0), tl.where(behind, until, until + g)


@triton.jit
def _of_part(x, part, number):
    """The sum of x (c d) over one part, (1 d)."""
    return tl.sum(tl.where((part == number)[:, None], x, 0.0), 0)[None, :]


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
    program = tl.program_id(0).to(tl.int64)
    sequence, chunk = program // chunks, (program % chunks).to(tl.int32)
    first = first_row(sequence, t, h)
    index = tl.arange(0, CHUNK)
    part, step = index // PART, index % PART
    position = position_of(index, chunk, chunks, REVERSE, CHUNK)
    value = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    out = tl.zeros((CHUNK, BLOCK_E), tl.float32)
    weights = tl.zeros((CHUNK, CHUNK), tl.float32)
    for start in range(0, D, BLOCK_D):
        key = start + tl.arange(0, BLOCK_D)
        g = load_rows(log_decay, first, position - DECAY_LAG, t, h, key, D).to(tl.float32)
        query = load_rows(q, first, position - READ_LAG, t, h, key, D)
        there = (key < D)[:, None] & (value < E)[None, :]
        tile = tl.load(states + program * D * E + key[:, None] * E + value[None, :], mask=there, other=0.0)
        out = tl.dot((query * tl.exp(tl.cumsum(g, 0))).to(tile.dtype), tile, out, input_precision=PRECISION)

        since = tl.zeros((CHUNK, BLOCK_D), tl.float32)
        until = tl.zeros((CHUNK, BLOCK_D), tl.float32)
        for back in range(PART):
            s = PART - 1 - back
            at = position_of(part * PART + s, chunk, chunks, REVERSE, CHUNK)
            write = load_rows(k, first, at - WRITE_LAG, t, h, key, D).to(tl.float32)
            weight = tl.sum(query * write * tl.exp(since), 1)
            this = (step >= s)[:, None] & (index[None, :] == (part * PART + s)[:, None])
            weights += tl.where(this, weight[:, None], 0.0)
            g_write = load_rows(log_decay, first, at - DECAY_LAG, t, h, key, D).to(tl.float32)
            since, until = _pass_write(since, until, g_write, s, step)

        query = (query * tl.exp(since)).to(tile.dtype)
        write = load_rows(k, first, position - WRITE_LAG, t, h, key, D) * tl.exp(until)
        for number in range(1, CHUNK // PART):
            product = tl.dot(query, tl.trans(write.to(tile.dtype)), input_precision=PRECISION)
            this = (part == number)[:, None] & (part < number)[None, :]
            weights += tl.where(this, product, 0.0)
            write = tl.where((part < number)[:, None], write * tl.exp(_of_part(g, part, number)), write)
    written = load_rows(v, first, position - WRITE_LAG, t, h, value, E)
    out = tl.dot(weights.to(written.dtype), written, out, input_precision=PRECISION)
    at, there = rows_at(first, position - READ_LAG, t, h, value, E)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=there)


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
    program = tl.program_id(0).to(tl.int64)
    sequence, chunk = program // chunks, (program % chunks).to(tl.int32)
    first = first_row(sequence, t, h)
    index = tl.arange(0, CHUNK)
    part, step = index // PART, index % PART
    position = position_of(index, chunk, chunks, REVERSE, CHUNK)
    key = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    weights = tl.zeros((CHUNK, CHUNK), tl.float32)
    out = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    for start in range(0, E, BLOCK_E):
        value = start + tl.arange(0, BLOCK_E)
        query = load_rows(x, first, position - READ_LAG, t, h, value, E)
        written = load_rows(v, first, position - WRITE_LAG, t, h, value, E)
        there = (value < E)[:, None] & (key < D)[None, :]
        tile = tl.load(states + program * D * E + value[:, None] + key[None, :] * E, mask=there, other=0.0)
        weights = tl.dot(query, tl.trans(written), weights, input_precision=PRECISION)
        out = tl.dot(query, tile, out, input_precision=PRECISION)
    g = load_rows(log_decay, first, position - DECAY_LAG, t, h, key, D).to(tl.float32)
    out *= tl.exp(tl.cumsum(g, 0))

    since = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    until = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    for back in range(PART):
        s = PART - 1 - back
        at = position_of(part * PART + s, chunk, chunks, REVERSE, CHUNK)
        this = (step >= s)[:, None] & (index[None, :] == (part * PART + s)[:, None])
        weight = tl.sum(tl.where(this, weights, 0.0), 1)
        write = load_rows(k, first, at - WRITE_LAG, t, h, key, D).to(tl.float32)
        out += weight[:, None] * write * tl.exp(since)
        g_write = load_rows(log_decay, first, at - DECAY_LAG, t, h, key, D).to(tl.float32)
        since, until = _pass_write(since, until, g_write, s, step)

    write = load_rows(k, first, position - WRITE_LAG, t, h, key, D) * tl.exp(until)
    earlier = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    for number in range(1, CHUNK // PART):
        this = (part == number)[:, None] & (part < number)[None, :]
        weight = tl.where(this, weights, 0.0).to(states.dtype.element_ty)
        earlier = tl.dot(weight, write.to(states.dtype.element_ty), earlier, input_precision=PRECISION)
        write = tl.where((part < number)[:, None], write * tl.exp(_of_part(g, part, number)), write)
    out += earlier * tl.exp(since)
    at, there = rows_at(first, position - READ_LAG, t, h, key, D)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=there)


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
    program = tl.program_id(0).to(tl.int64)
    sequence, chunk = program // chunks, (program % chunks).to(tl.int32)
    first = first_row(sequence, t, h)
    index = tl.arange(0, CHUNK)
    part, step = index // PART, index % PART
    position = position_of(index, chunk, chunks, REVERSE, CHUNK)
    program_behind = sequence * chunks + chunks - 1 - chunk
    key = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    weights = tl.zeros((CHUNK, CHUNK), tl.float32)
    from_before = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    to_behind = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    across = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, E, BLOCK_E):
        value = start + tl.arange(0, BLOCK_E)
        grad_rows = load_rows(grad_y, first, position - READ_LAG, t, h, value, E)
        written = load_rows(v, first, position - WRITE_LAG, t, h, value, E)
        there = (value < E)[:, None] & (key < D)[None, :]
        at = value[:, None] + key[None, :] * E
        tile = tl.load(before + program * D * E + at, mask=there, other=0.0)
        grad_tile = tl.load(behind + program_behind * D * E + at, mask=there, other=0.0)
        weights = tl.dot(grad_rows, tl.trans(written), weights, input_precision=PRECISION)
        from_before = tl.dot(grad_rows, tile, from_before, input_precision=PRECISION)
        to_behind = tl.dot(written, grad_tile, to_behind, input_precision=PRECISION)
        across += tl.sum(tile.to(tl.float32) * grad_tile.to(tl.float32), 0)

    query = load_rows(q, first, position - READ_LAG, t, h, key, D).to(tl.float32)
    write = load_rows(k, first, position - WRITE_LAG, t, h, key, D).to(tl.float32)
    g = load_rows(log_decay, first, position - DECAY_LAG, t, h, key, D).to(tl.float32)
    g_next = load_rows(log_decay, first, position + 1 - DECAY_LAG, t, h, key, D).to(tl.float32)
    to_behind *= write * tl.exp(tl.cumsum(g_next, 0, reverse=True))  # its first decay behind the chunk is among them
    total = tl.cumsum(from_before * query * tl.exp(tl.cumsum(g, 0)), 0, reverse=True)
    total += tl.cumsum(to_behind, 0) - to_behind
    last = (index == CHUNK - 1)[:, None]
    total += (across * tl.exp(tl.sum(g, 0) + tl.sum(tl.where(last, g_next, 0.0), 0)))[None, :]

    since = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    until = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    for back in range(PART):
        s = PART - 1 - back
        at = position_of(part * PART + s, chunk, chunks, REVERSE, CHUNK)
        this = (step >= s)[:, None] & (index[None, :] == (part * PART + s)[:, None])
        weight = tl.sum(tl.where(this, weights, 0.0), 1)
        write_s = load_rows(k, first, at - WRITE_LAG, t, h, key, D).to(tl.float32)
        through = _sum_behind(weight[:, None] * query * write_s * tl.exp(since), CHUNK, PART, BLOCK_D)
        total += tl.where((step > s)[:, None], through, 0.0)
        g_write = load_rows(log_decay, first, at - DECAY_LAG, t, h, key, D).to(tl.float32)
        since, until = _pass_write(since, until, g_write, s, step)

    query *= tl.exp(since)
    write *= tl.exp(until)
    earlier = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    for number in range(1, CHUNK // PART):
        this = (part == number)[:, None] & (part < number)[None, :]
        weight = tl.where(this, weights, 0.0).to(before.dtype.element_ty)
        earlier = tl.dot(weight, write.to(weight.dtype), earlier, input_precision=PRECISION)
        later = tl.dot(tl.trans(weight), query.to(weight.dtype), input_precision=PRECISION) * write
        total += tl.where((part < number)[:, None], tl.cumsum(later, 0) - later, 0.0)
        write = tl.where((part < number)[:, None], write * tl.exp(_of_part(g, part, number)), write)
    total += _sum_behind(earlier * query, CHUNK, PART, BLOCK_D)
    at, there = rows_at(first, position - DECAY_LAG, t, h, key, D)
    tl.store(grad + at, total.to(grad.dtype.element_ty), mask=there)
