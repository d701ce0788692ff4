"""The backward of the neural memory over a span of chunks, in Triton.

The states before each chunk are computed again (`triton_walk.py`). What needs the gradient of the state behind a chunk
is left to a walk back (`triton_walk_back.py`), all else is done here for all chunks at once, layer by layer, in the
letters of `triton_layers.py`. By what a chunk reads (`_second_reads_backward`, `_first_reads_backward`),

    dP = -dy E^T        dx = a (dy M^T) + b (dy S^T) + (G * dP) X       dX = (G * dP)^T x         dE = -P^T dy
    dG = dP * (x X^T)   da = the rows of x * (dy M^T), summed           db = those of x * (dy S^T)

and by what it writes and by the gradients inside, whose point is the anchor Z (`_writes_backward`),

    dg = -the rows of (X dM') * E, summed       dg' = -those of (X dS') * E
    dp = sum of S * dM'         dw = sum of M * dM'         dp' = sum of S * dS'
    dK = -g (E dM'^T) - g' (E dS'^T) + d(K Z) Z^T           of the first layer, where X = K

Letters: b batch, t slot of a token, h head, n chunk, c slot in the chunk, d key, e value, f column of the first layer
(hidden unit; value where there is one layer), w weights of a memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.memory_gd.triton_layers import dot, gates_backward, read, read_backward, silu, write_backward
from zoo.ops.memory_gd.triton_span import (
    Span,
    add_read_gates,
    add_write_gates,
    load_pair,
    load_read_gates,
    load_tile,
    load_write_gates,
    slot_rows,
)
from zoo.ops.memory_gd.triton_walk import walk
from zoo.ops.memory_gd.triton_walk_back import walk_back
from zoo.ops.tiles import load_rows, locate_chunk, store_rows


def backward_span(
    span: Span,
    states: tuple[Tensor, ...],
    grad_y: Tensor,
    grad_states: tuple[Tensor, ...],
    grad_anchor: Tensor,
    grad_initial: Tensor | None,
) -> tuple[Tensor, ...]:
    """The gradients of q, k, v and of the coefficients.

    Args:
        span: the chunks.
        states: buffers (n+1 b h w) of weights, surprise and anchor with the first given; the rest is filled in.
        grad_y: of the span's outputs, (b t h e).
        grad_states: buffers (n+1 b h w) of weights and surprise with the last given; the rest is filled in.
        grad_anchor, grad_initial: those of anchor and initial weights (b h w) behind the span; changed in place.
    """
    stride = states[0][0].numel()
    errors, grad_errors, grad_v = (torch.empty_like(grad_y) for _ in range(3))
    grad_q, grad_k = (torch.empty_like(x, dtype=torch.float32) for x in (span.q, span.k))
    grad_learned, grad_surprised = torch.zeros_like(span.learned), torch.empty_like(span.surprised)
    if span.hidden:
        units, back, errors1, x, grad_out, grad_units, grad_errors1 = (
            grad_y.new_empty(*grad_y.shape[:-1], span.hidden) for _ in range(7)
        )
        walk(span, states, sides=(units, back, errors1, errors))
    else:
        units, back, x = None, None, None
        errors1, grad_out, grad_units, grad_errors1 = errors, grad_y, grad_errors, grad_errors
        walk(span, states, sides=(errors,))
    weights, surprise, anchor = states
    if span.reset is not None:
        restarts = span.reset.T[:, :, None, None]
        torch.where(restarts, span.initial, weights[: span.chunks], out=weights[: span.chunks])
        surprise[: span.chunks].masked_fill_(restarts, 0.0)

    given = span.q, span.k, span.learned, weights, surprise
    if span.hidden:
        span.launch_chunks(
            *(_second_reads_backward, *given, units, errors1, errors, grad_y),
            *(x, grad_out, grad_units, grad_errors, grad_learned, stride),
            wide=True,
        )
    span.launch_chunks(
        *(_first_reads_backward, *given, errors1, grad_out, grad_q, grad_k, grad_errors1, grad_learned, stride)
    )
    sides = (units, back, errors, x, grad_y, grad_out, grad_units, grad_errors1, grad_errors)
    walk_back(span, anchor, sides, grad_v, grad_states, grad_anchor, grad_initial)
    span.launch_chunks(
        *(_writes_backward, span.k, span.learned, span.surprised, *states, units, errors1, errors, grad_units),
        *(*grad_states, grad_k, grad_learned, grad_surprised, stride),
    )
    return grad_q, grad_k, grad_v, grad_learned, grad_surprised


@triton.jit
def _second_reads_backward(
    q,
    k,
    learned,
    weights,
    surprise,
    all_units,
    all_errors1,
    all_errors,
    grad_y,
    all_x,
    grad_out,
    grad_inputs,
    grad_errors,
    grad_learned,
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
    """One chunk, the second layer: what it reads (x), and by its reads alone the gradients of the first layer's
    outputs, of inputs, errors and coefficients."""
    program, memory, chunk = locate_chunk(chunks)
    dtype: tl.constexpr = q.dtype.element_ty
    key, value = tl.arange(0, KEYS), tl.arange(0, VALUES)
    at = memory * (d * f + f * e) + chunk.to(tl.int64) * stride
    weights += at
    surprise += at
    tokens = slot_rows(memory, chunk, t, h, width, CHUNK)
    gates = load_read_gates(learned, program, width, CHUNK)
    queries, keys = load_rows(q, tokens, key, d), load_rows(k, tokens, key, d)
    attention = dot(queries, tl.trans(keys), dtype) * gates[0]
    errors, grad = load_rows(all_errors, tokens, value, e), load_rows(grad_y, tokens, value, e)
    grad_attention = -dot(grad, tl.trans(errors), dtype)
    grad_similar = grad_attention * gates[0]
    similar = tl.zeros((CHUNK, CHUNK), tl.float32)
    grad_past, grad_weight = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32)
    for start in range(0, f, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        weight, past = load_pair(weights, surprise, (0, key, unit, d, f))
        errors1 = load_rows(all_errors1, tokens, unit, f)
        x, slope, _ = silu(read(queries, weight, past, attention, errors1, gates, dtype))
        store_rows(all_x, tokens, unit, f, x)
        inputs, _, _ = silu(load_rows(all_units, tokens, unit, f))
        similar += dot(x, tl.trans(inputs), dtype)
        weight, past = load_pair(weights, surprise, (d * f, unit, value, f, e))
        grad_x, more_past, more_weight = read_backward(x, grad, weight, past, gates, dtype)
        grad_past += more_past
        grad_weight += more_weight
        grad_x += dot(grad_similar, inputs, dtype)
        store_rows(grad_out, tokens, unit, f, grad_x * slope)
        store_rows(grad_inputs, tokens, unit, f, dot(tl.trans(grad_similar), x, dtype))
    store_rows(grad_errors, tokens, value, e, -dot(tl.trans(similar * gates[0]), grad, dtype))
    add_read_gates(grad_learned, program, width, (grad_attention * similar, grad_past, grad_weight), CHUNK)


@triton.jit
def _first_reads_backward(
    q,
    k,
    learned,
    weights,
    surprise,
    all_errors,
    grad_out,
    grad_q,
    grad_k,
    grad_errors,
    grad_learned,
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
    VALUES: tl.constexpr = 0,
):
    """One chunk, the first layer: by its reads alone the gradients of queries, keys, errors and coefficients."""
    program, memory, chunk = locate_chunk(chunks)
    dtype: tl.constexpr = q.dtype.element_ty
    key = tl.arange(0, KEYS)
    size = d * f + f * e if VALUES else d * f
    at = memory * size + chunk.to(tl.int64) * stride
    tokens = slot_rows(memory, chunk, t, h, width, CHUNK)
    gates = load_read_gates(learned, program, width, CHUNK)
    queries, keys = load_rows(q, tokens, key, d), load_rows(k, tokens, key, d)
    similar = dot(queries, tl.trans(keys), dtype)
    grad_queries = tl.zeros((CHUNK, KEYS), tl.float32)
    grad_attention = tl.zeros((CHUNK, CHUNK), tl.float32)
    grad_past, grad_weight = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32)
    for start in range(0, f, BLOCK):
        column = start + tl.arange(0, BLOCK)
        weight, past = load_pair(weights + at, surprise + at, (0, key, column, d, f))
        errors, grad = load_rows(all_errors, tokens, column, f), load_rows(grad_out, tokens, column, f)
        more, more_past, more_weight = read_backward(queries, grad, weight, past, gates, dtype)
        grad_queries += more
        grad_past += more_past
        grad_weight += more_weight
        grad_attention -= dot(grad, tl.trans(errors), dtype)
        store_rows(grad_errors, tokens, column, f, -dot(tl.trans(similar * gates[0]), grad, dtype))
    grad_similar = grad_attention * gates[0]
    store_rows(grad_q, tokens, key, d, grad_queries + dot(grad_similar, keys, dtype))
    store_rows(grad_k, tokens, key, d, dot(tl.trans(grad_similar), queries, dtype))
    add_read_gates(grad_learned, program, width, (grad_attention * similar, grad_past, grad_weight), CHUNK)


@triton.jit
def _writes_backward(
    k,
    learned,
    surprised,
    weights,
    surprise,
    anchor,
    all_units,
    all_errors1,
    all_errors,
    grad_units,
    grad_weights,
    grad_surprise,
    grad_k,
    grad_learned,
    grad_surprised,
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
    VALUES: tl.constexpr = 0,
):
    """One chunk: what its writes and the gradients inside add to the gradients of keys and coefficients."""
    program, memory, chunk = locate_chunk(chunks)
    dtype: tl.constexpr = k.dtype.element_ty
    key = tl.arange(0, KEYS)
    size = d * f + f * e if VALUES else d * f
    at = memory * size + chunk.to(tl.int64) * stride
    weights += at
    surprise += at
    grad_weights += at + stride
    grad_surprise += at + stride
    tokens = slot_rows(memory, chunk, t, h, width, CHUNK)
    gates = load_write_gates(learned, surprised, program, width, CHUNK)
    keys, grad_keys = load_rows(k, tokens, key, d), load_rows(grad_k, tokens, key, d)
    found = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32), 0.0, 0.0, 0.0
    for start in range(0, f, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tile = 0, key, column, d, f
        weight, past = load_pair(weights, surprise, tile)
        grad_weight, grad_past = load_pair(grad_weights, grad_surprise, tile)
        errors = load_rows(all_errors1, tokens, column, f)
        found = gates_backward(found, keys, errors, weight, past, grad_weight, grad_past, dtype)
        grad_keys += write_backward(errors, tl.trans(grad_weight), tl.trans(grad_past), gates, dtype)
        units, point = load_rows(grad_units, tokens, column, f), load_tile(anchor + at + stride, tile)
        grad_keys += dot(units, tl.trans(point), dtype)
    store_rows(grad_k, tokens, key, d, grad_keys)
    if VALUES:
        value = tl.arange(0, VALUES)
        errors = load_rows(all_errors, tokens, value, e)
        for start in range(0, f, BLOCK):
            unit = start + tl.arange(0, BLOCK)
            tile = d * f, unit, value, f, e
            weight, past = load_pair(weights, surprise, tile)
            grad_weight, grad_past = load_pair(grad_weights, grad_surprise, tile)
            inputs, _, _ = silu(load_rows(all_units, tokens, unit, f))
            found = gates_backward(found, inputs, errors, weight, past, grad_weight, grad_past, dtype)
    add_write_gates(grad_learned, grad_surprised, program, width, found, CHUNK)
