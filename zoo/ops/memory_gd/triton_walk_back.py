"""The walk of the neural memory back along the chunks, in Triton: the gradients of the states and of the errors.

The gradients of E and X come with what a chunk reads, `triton_backward.py`; what it writes is added to them, as
`triton_layers.py` says. They go on through the two sides of the gradients inside, to the values V and the anchor Z,

    one layer       E = 2 (K Z - V)                     dV = -2 dE      dZ = 2 K^T dE
    the second      E = 2 (X Z2 - V), E1 = back * s     dV = -2 dE      dZ2 = 2 X^T dE + (dE1 * s)^T E
    the first       X = silu(U), U = K Z1               dU = dX * s + dE1 * back * s'       dZ1 = K^T dU

with back = E Z2^T, s and s' the slope and the curvature of silu at U; there dE has 2 (dE1 * s) Z2 in it, and dX has
2 dE Z2^T. Where a chunk moved the anchor, dZ is handed on to the weights; where it began anew, that of the weights goes
to the initial ones.

Letters: b batch, t slot of a token, h head, n chunk, c slot in the chunk, d key, e value, f column of the first layer
(hidden unit; value where there is one layer), w weights of a memory.
"""

import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.memory_gd.triton_layers import dot, hand_on, silu, state_backward, write_backward
from zoo.ops.memory_gd.triton_span import (
    Span,
    load_flags,
    load_pair,
    load_read_gates,
    load_tile,
    load_write_gates,
    slot_rows,
    store_tile,
)
from zoo.ops.tiles import load_rows, store_rows


def walk_back(
    span: Span,
    anchor: Tensor,
    sides: tuple[Tensor | None, ...],
    grad_v: Tensor,
    grad_states: tuple[Tensor, ...],
    grad_anchor: Tensor,
    grad_initial: Tensor | None,
) -> None:
    """From the last chunk of a span to the first.

    Args:
        span: the chunks.
        anchor: behind each chunk, the buffer (n+1 b h w).
        sides: units, back, errors and what the second layer reads, the gradients of outputs (b t h e), of those of the
            first layer, of units and of both errors; those of the last three become complete.
        grad_v: where the gradients of the values go, (b t h e).
        grad_states: buffers (n+1 b h w) of weights and surprise with the last given; the rest is filled in.
        grad_anchor, grad_initial: (b h w), changed in place.
    """
    units, back, errors, x, grad_y, grad_out, grad_units, grad_errors1, grad_errors = sides
    gates = span.q, span.k, span.learned, span.surprised, span.refresh, span.reset
    grads = *grad_states, grad_anchor, grad_initial, grad_states[0][0].numel()
    if span.hidden:
        span.launch_walk(
            *(_walk_back_hidden, *gates, anchor, units, back, errors, x, grad_y, grad_out, grad_units),
            *(grad_errors1, grad_errors, grad_v, *grads),
            wide=True,
        )
    else:
        span.launch_walk(_walk_back_linear, *gates, grad_y, grad_errors, grad_v, *grads)


@triton.jit
def _walk_back_linear(
    q,
    k,
    learned,
    surprised,
    refresh,
    reset,
    grad_y,
    grad_errors,
    grad_v,
    grad_weights,
    grad_surprise,
    grad_anchor,
    grad_initial,
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
    """One layer: a program has a block of columns."""
    program = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = q.dtype.element_ty
    key, column = tl.arange(0, KEYS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tile = 0, key, column, d, f
    here = program * d * f
    at = here + tl.cast(chunks, tl.int64) * stride
    grad_weight, grad_past = load_pair(grad_weights + at, grad_surprise + at, tile)
    grad_point = load_tile(grad_anchor + here, tile)
    initial = tl.zeros((KEYS, BLOCK), tl.float32)
    for step in range(chunks):
        chunk = chunks - 1 - step
        tokens = slot_rows(program, chunk, t, h, width, CHUNK)
        reads = load_read_gates(learned, program * chunks + chunk, width, CHUNK)
        writes = load_write_gates(learned, surprised, program * chunks + chunk, width, CHUNK)
        opens, restarts = load_flags(refresh, reset, program // h * chunks + chunk)
        keys = load_rows(k, tokens, key, d)
        errors = load_rows(grad_errors, tokens, column, f)
        errors += write_backward(keys, grad_weight, grad_past, writes, dtype)
        store_rows(grad_errors, tokens, column, f, 2 * errors)
        store_rows(grad_v, tokens, column, f, -2 * errors)
        queries, grad = load_rows(q, tokens, key, d), load_rows(grad_y, tokens, column, f)
        grad_weight, grad_past = state_backward(queries, grad, grad_weight, grad_past, reads, writes, dtype)
        grad_point += 2 * dot(tl.trans(keys), errors, dtype)
        grad_weight, grad_past, grad_point, more = hand_on(grad_weight, grad_past, grad_point, opens, restarts)
        initial += more
        at -= stride
        store_tile(grad_weights + at, tile, grad_weight)
        store_tile(grad_surprise + at, tile, grad_past)
    store_tile(grad_anchor + here, tile, grad_point)
    if reset is not None:
        store_tile(grad_initial + here, tile, initial + load_tile(grad_initial + here, tile))


@triton.jit
def _walk_back_hidden(
    q,
    k,
    learned,
    surprised,
    refresh,
    reset,
    anchor,
    all_units,
    all_back,
    all_errors,
    all_x,
    grad_y,
    grad_out,
    grad_units,
    grad_errors1,
    grad_errors,
    grad_v,
    grad_weights,
    grad_surprise,
    grad_anchor,
    grad_initial,
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
    """Two layers: a program has a memory. The gradients of the second's inputs become those of the units."""
    program = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = q.dtype.element_ty
    key, value = tl.arange(0, KEYS), tl.arange(0, VALUES)
    here = program * (d * f + f * e)
    grad_anchor += here
    if grad_initial is not None:
        grad_initial += here
    for step in tl.range(chunks, disable_licm=True):
        chunk = chunks - 1 - step
        at = here + tl.cast(chunk, tl.int64) * stride
        before = grad_weights + at, grad_surprise + at, grad_anchor, grad_initial
        at += stride
        behind, behind_past, point = grad_weights + at, grad_surprise + at, anchor + at
        tokens = slot_rows(program, chunk, t, h, width, CHUNK)
        reads = load_read_gates(learned, program * chunks + chunk, width, CHUNK)
        writes = load_write_gates(learned, surprised, program * chunks + chunk, width, CHUNK)
        opens, restarts = load_flags(refresh, reset, program // h * chunks + chunk)

        # the second layer's errors: errors = 2 (inputs point - v), errors1 = (errors point^T) slope
        grad = load_rows(grad_errors, tokens, value, e)
        for start in tl.range(0, f, BLOCK, disable_licm=True):
            unit = start + tl.arange(0, BLOCK)
            first, second = (0, key, unit, d, f), (d * f, unit, value, f, e)
            inputs, slope, _ = silu(load_rows(all_units, tokens, unit, f))
            grad_weight, grad_past = load_pair(behind, behind_past, second)
            grad += write_backward(inputs, grad_weight, grad_past, writes, dtype)
            grad_weight, grad_past = load_pair(behind, behind_past, first)
            errors1 = load_rows(grad_errors1, tokens, unit, f)
            errors1 += write_backward(load_rows(k, tokens, key, d), grad_weight, grad_past, writes, dtype)
            store_rows(grad_errors1, tokens, unit, f, errors1)
            grad += dot(errors1 * slope, load_tile(point, second), dtype)
        grad *= 2
        store_rows(grad_v, tokens, value, e, -grad)
        tl.debug_barrier()  # the next pass reads what others wrote

        # the units: inputs = silu(units), whose slope is in errors1 too
        for start in tl.range(0, f, BLOCK, disable_licm=True):
            unit = start + tl.arange(0, BLOCK)
            second = d * f, unit, value, f, e
            inputs, slope, curvature = silu(load_rows(all_units, tokens, unit, f))
            errors1 = load_rows(grad_errors1, tokens, unit, f)
            grad_weight, grad_past = load_pair(behind, behind_past, second)
            grad = -load_rows(grad_v, tokens, value, e)  # again: kept, it would cost too many registers
            errors = load_rows(all_errors, tokens, value, e)
            grad_inputs = load_rows(grad_units, tokens, unit, f)
            grad_inputs += write_backward(errors, tl.trans(grad_weight), tl.trans(grad_past), writes, dtype)
            grad_inputs += dot(grad, tl.trans(load_tile(point, second)), dtype)
            units = errors1 * load_rows(all_back, tokens, unit, f) * curvature + grad_inputs * slope
            store_rows(grad_units, tokens, unit, f, units)
        tl.debug_barrier()

        # the second layer's weights
        for start in tl.range(0, f, BLOCK, disable_licm=True):
            unit = start + tl.arange(0, BLOCK)
            second = d * f, unit, value, f, e
            inputs, slope, _ = silu(load_rows(all_units, tokens, unit, f))
            errors1 = load_rows(grad_errors1, tokens, unit, f)
            grad = -load_rows(grad_v, tokens, value, e)
            errors = load_rows(all_errors, tokens, value, e)
            grad_point = dot(tl.trans(inputs), grad, dtype) + dot(tl.trans(errors1 * slope), errors, dtype)
            grad_weight, grad_past = load_pair(behind, behind_past, second)
            x, grad_x = load_rows(all_x, tokens, unit, f), load_rows(grad_y, tokens, value, e)
            grad_weight, grad_past = state_backward(x, grad_x, grad_weight, grad_past, reads, writes, dtype)
            _hand_on_tile(before, second, grad_weight, grad_past, grad_point, opens, restarts)

        # the first layer's weights
        for start in tl.range(0, f, BLOCK, disable_licm=True):
            unit = start + tl.arange(0, BLOCK)
            first = 0, key, unit, d, f
            grad_weight, grad_past = load_pair(behind, behind_past, first)
            grad_point = dot(tl.trans(load_rows(k, tokens, key, d)), load_rows(grad_units, tokens, unit, f), dtype)
            x, grad_x = load_rows(q, tokens, key, d), load_rows(grad_out, tokens, unit, f)
            grad_weight, grad_past = state_backward(x, grad_x, grad_weight, grad_past, reads, writes, dtype)
            _hand_on_tile(before, first, grad_weight, grad_past, grad_point, opens, restarts)
        tl.debug_barrier()  # the chunk before reads what others wrote


@triton.jit
def _hand_on_tile(grads, tile, weight, past, point, opens, restarts):
    """Hand the gradients of weights, surprise and anchor on to the chunk before, or to the initial weights."""
    grad_weights, grad_surprise, grad_anchor, grad_initial = grads
    point += load_tile(grad_anchor, tile)
    weight, past, point, initial = hand_on(weight, past, point, opens, restarts)
    store_tile(grad_weights, tile, weight)
    store_tile(grad_surprise, tile, past)
    store_tile(grad_anchor, tile, point)
    if grad_initial is not None:
        store_tile(grad_initial, tile, initial + load_tile(grad_initial, tile))
