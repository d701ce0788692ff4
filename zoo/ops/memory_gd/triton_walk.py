"""The walk of the neural memory along the chunks, in Triton: outputs, states, and the two sides of the gradients.

At the anchor, with M1 alone where there is one layer, the keys K and values V of a chunk have the gradients X^T E with

    one layer:      X = K    E = 2 (K M1 - V)
    the second:     X = silu(K M1)    E = 2 (X M2 - V)
    the first:      X = K    E1 = (E M2^T) silu'(K M1)

Then each layer reads and writes as `triton_layers.py` says. `units` is K M1, and `back` is E M2^T.

Letters: b batch, t slot of a token, h head, n chunk, c slot in the chunk, d key, e value, f column of the first layer
(hidden unit; value where there is one layer), w weights of a memory.
"""

import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.memory_gd.triton_layers import dot, read, silu, write
from zoo.ops.memory_gd.triton_span import (
    Span,
    load_flags,
    load_pair,
    load_read_gates,
    load_state,
    load_tile,
    load_write_gates,
    restart,
    slot_rows,
    store_state,
)
from zoo.ops.tiles import load_rows, store_rows


def walk(span: Span, states: tuple[Tensor, ...], y: Tensor | None = None, sides: tuple[Tensor, ...] = ()) -> None:
    """From the first state (b h w) to the last, which takes its place, or in a buffer (n+1 b h w) through all.

    Args:
        span: the chunks.
        states: weights, surprise, anchor.
        y: where the outputs (b t h e) go.
        sides: where units, back, errors of the first layer (b t h f) and errors (b t h e) go; errors, of one layer.
    """
    stride = states[0][0].numel() if states[0].dim() == 4 else 0
    sides = sides or (None,) * (4 if span.hidden else 1)
    span.launch_walk(
        *(_walk_hidden if span.hidden else _walk_linear, span.q, span.k, span.v, span.learned, span.surprised),
        *(span.initial, span.refresh, span.reset, *states, y, *sides, stride),
    )


@triton.jit
def _walk_linear(
    q,
    k,
    v,
    learned,
    surprised,
    initial,
    refresh,
    reset,
    weights,
    surprise,
    anchor,
    y,
    all_errors,
    stride,
    chunks,
    t,
    h,
    d,
    e,
    f,
    width,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One layer: a program has a block of columns. States are `stride` apart; 0: only the last is kept."""
    program = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = q.dtype.element_ty
    key, column = tl.arange(0, KEYS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tile = 0, key, column, d, f
    at = program * d * f
    initial_at = None
    if initial is not None:
        initial_at = initial + program % h * d * f
    weight, past = load_pair(weights + at, surprise + at, tile)
    point = load_tile(anchor + at, tile)
    for chunk in range(chunks):
        tokens = slot_rows(program, chunk, t, h, width, CHUNK)
        reads = load_read_gates(learned, program * chunks + chunk, width, CHUNK)
        writes = load_write_gates(learned, surprised, program * chunks + chunk, width, CHUNK)
        opens, restarts = load_flags(refresh, reset, program // h * chunks + chunk)
        weight, past = restart(weight, past, initial_at, restarts, tile)
        point = tl.where(opens, weight, point)
        keys = load_rows(k, tokens, key, d).to(tl.float32)
        errors = 2 * (dot(keys, point, dtype) - load_rows(v, tokens, column, f))
        if all_errors is not None:
            store_rows(all_errors, tokens, column, f, errors)
        if y is not None:
            queries = load_rows(q, tokens, key, d)
            attention = dot(queries, tl.trans(keys), dtype) * reads[0]
            store_rows(y, tokens, column, f, read(queries, weight, past, attention, errors, reads, dtype))
        weight, past = write(weight, past, keys, errors, writes, dtype)
        at += stride
        if stride > 0 or chunk == chunks - 1:
            store_state((weights + at, surprise + at, anchor + at), tile, weight, past, point)


@triton.jit
def _walk_hidden(
    q,
    k,
    v,
    learned,
    surprised,
    initial,
    refresh,
    reset,
    weights,
    surprise,
    anchor,
    y,
    all_units,
    all_back,
    all_errors1,
    all_errors,
    stride,
    chunks,
    t,
    h,
    d,
    e,
    f,
    width,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Two layers: a program has a memory. States are `stride` apart; 0: each takes the place of the last."""
    program = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = q.dtype.element_ty
    key, value = tl.arange(0, KEYS), tl.arange(0, VALUES)
    size = d * f + f * e
    initial_at = None
    if initial is not None:
        initial_at = initial + program % h * size
    for chunk in tl.range(chunks, disable_licm=True):
        at = program * size + tl.cast(chunk, tl.int64) * stride
        state = weights + at, surprise + at, anchor + at
        at += stride
        behind = weights + at, surprise + at, anchor + at
        opens, restarts = load_flags(refresh, reset, program // h * chunks + chunk)
        tokens = slot_rows(program, chunk, t, h, width, CHUNK)
        reads = load_read_gates(learned, program * chunks + chunk, width, CHUNK)
        writes = load_write_gates(learned, surprised, program * chunks + chunk, width, CHUNK)
        keys = load_rows(k, tokens, key, d).to(tl.float32)
        errors = -load_rows(v, tokens, value, e).to(tl.float32)
        for start in tl.range(0, f, BLOCK, disable_licm=True):
            unit = start + tl.arange(0, BLOCK)
            _, _, point = load_state(state, initial_at, opens, restarts, (0, key, unit, d, f))
            inputs, _, _ = silu(dot(keys, point, dtype))
            _, _, point = load_state(state, initial_at, opens, restarts, (d * f, unit, value, f, e))
            errors += dot(inputs, point, dtype)
        errors *= 2
        if all_errors is not None:
            store_rows(all_errors, tokens, value, e, errors)
        tl.debug_barrier()  # all have read what will now be written
        if y is not None:
            queries = load_rows(q, tokens, key, d)
            attention = dot(queries, tl.trans(keys), dtype) * reads[0]
            out = tl.zeros((CHUNK, VALUES), tl.float32)
            similar = tl.zeros((CHUNK, CHUNK), tl.float32)
        for start in tl.range(0, f, BLOCK, disable_licm=True):
            unit = start + tl.arange(0, BLOCK)
            first, second = (0, key, unit, d, f), (d * f, unit, value, f, e)
            weight, past, point = load_state(state, initial_at, opens, restarts, first)
            weight2, past2, point2 = load_state(state, initial_at, opens, restarts, second)
            units = dot(keys, point, dtype)
            inputs, slope, _ = silu(units)
            back = dot(errors, tl.trans(point2), dtype)
            errors1 = back * slope
            if all_errors is not None:
                store_rows(all_units, tokens, unit, f, units)
                store_rows(all_back, tokens, unit, f, back)
                store_rows(all_errors1, tokens, unit, f, errors1)
            if y is not None:
                x, _, _ = silu(read(queries, weight, past, attention, errors1, reads, dtype))
                similar += dot(x, tl.trans(inputs), dtype)
                out += reads[2][:, None] * dot(x, weight2, dtype) + reads[1][:, None] * dot(x, past2, dtype)
            weight, past = write(weight, past, keys, errors1, writes, dtype)
            store_state(behind, first, weight, past, point)
            weight2, past2 = write(weight2, past2, inputs, errors, writes, dtype)
            store_state(behind, second, weight2, past2, point2)
        if y is not None:
            store_rows(y, tokens, value, e, out - dot(similar * reads[0], errors, dtype))
        tl.debug_barrier()  # the next chunk reads what others wrote
