"""The neural memory in Triton: programs walk along the chunks with the state, others take all chunks at once.

The algebra is that of `chunked.py`, whose coefficients the kernels are given. Weights, surprise and anchor are float32
and are taken a block at a time. The columns of a linear memory do not meet, so each block of them has a program of its
own, which carries them along. Two layers meet in sums over the hidden units: there a program owns the memory of a row
and head, keeps it in global memory, and takes a chunk in several passes over the units. Loops keep what does not change
out of registers (`disable_licm`), and load tiles again rather than hold them.

The backward is the gradient of all that by hand, that of the gradients inside included. It keeps inputs only: states
are computed again, first those before every span of chunks, then, span by span from the last, those before each chunk.
In a span only what needs the gradient of the state behind a chunk is left to a walk:

    `_walk_...`             forward: the states, and the two sides of the gradients inside
    `_..._reads_backward`   what the outputs' gradients say, all chunks at once
    `_walk_back_...`        backward: the gradients of the states, and of the gradients inside
    `_writes_backward`      what these say of keys and coefficients, all chunks at once

Letters: b batch, t slot of a token, h head, n chunk, c slot in the chunk, d key, e value, f column of the first layer
(hidden unit; value where there is one layer), w weights of a memory. `x` is what a layer reads; `inputs` and `errors`
are the two sides of its gradients, at `point`, the anchor; `units` is what the first layer makes of the keys there, and
`back` the errors of the second before the slope of silu.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.gpu import launch, next_power_of_2
from zoo.ops.memory_gd.gates import gate_coefficients, gate_gradients

BLOCK, WIDE_BLOCK, WARPS = 16, 32, 8


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    momentum: Tensor,
    decay: Tensor,
    weights: Tensor,
    surprise: Tensor,
    anchor: Tensor,
    initial: Tensor | None,
    real: Tensor | None,
    refresh: Tensor | None,
    reset: Tensor | None,
    hidden: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gates = gate_coefficients(*_to_float(step, momentum, decay), real, width)
    y = torch.empty_like(v, dtype=torch.float32)
    state = tuple(x.clone() for x in (weights, surprise, anchor))
    _Span(0, gates[0].shape[2], q, k, v, gates, initial, refresh, reset, hidden).walk(state, y)
    return y, *state


def backward(
    grads: list[Tensor],
    outputs: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    momentum: Tensor,
    decay: Tensor,
    weights: Tensor,
    surprise: Tensor,
    anchor: Tensor,
    initial: Tensor | None,
    real: Tensor | None,
    refresh: Tensor | None,
    reset: Tensor | None,
    hidden: int,
    width: int,
) -> tuple[Tensor | None, ...]:
    float_gates = _to_float(step, momentum, decay)
    gates = gate_coefficients(*float_gates, real, width)
    chunks = gates[0].shape[2]
    length = math.isqrt(chunks - 1) + 1
    starts = range(0, chunks, length)
    spans = [_Span(start, length, q, k, v, gates, initial, refresh, reset, hidden) for start in starts]

    state = tuple(x.clone() for x in (weights, surprise, anchor))
    before = []
    for span in spans:
        before.append(tuple(x.clone() for x in state))
        if span is not spans[-1]:
            span.walk(state)

    grad_y, *grad_state = (x.float() for x in grads)
    grad_anchor = grad_state.pop().clone()
    grad_initial = None if initial is None else torch.zeros_like(weights)
    states, grad_states = (tuple(x.new_empty(length + 1, *x.shape) for x in y) for y in (state, grad_state))
    found = []
    for span, saved in zip(reversed(spans), reversed(before), strict=True):
        for buffer, x in zip(states, saved, strict=True):
            buffer[0].copy_(x)
        for buffer, x in zip(grad_states, grad_state, strict=True):
            buffer[span.chunks].copy_(x)
        found.append(span.backward(states, span.tokens(grad_y), grad_states, grad_anchor, grad_initial))
        grad_state = [buffer[0].clone() for buffer in grad_states]

    parts = zip(zip(*found, strict=True), (1, 1, 1, 2, 2), strict=True)
    grad_q, grad_k, grad_v, *grad_gates = (torch.cat(grads[::-1], dim=dim) for grads, dim in parts)
    grad_gates = gate_gradients(*grad_gates, gates[0], *float_gates, real, width)
    found = (grad_q, grad_k, grad_v, *grad_gates)
    found = (grad.to(x.dtype) for grad, x in zip(found, (q, k, v, step, momentum, decay), strict=True))
    return *found, *grad_state, grad_anchor, None if initial is None else grad_initial.sum(0), None, None, None


def ahead_of_time() -> dict[str, tuple[Tensor | int | None, ...]]:
    """Inputs of the main sizes, by name."""

    def inputs(hidden: int) -> tuple[Tensor | int | None, ...]:
        width = 16
        sequence = torch.empty(8, 2 * width, 16, 64, dtype=torch.bfloat16, device="meta")  # longer ones run the same
        state = torch.empty(8, 16, 128 * hidden if hidden else 64 * 64, device="meta")
        return *[sequence] * 3, *[sequence[..., 0]] * 3, *[state] * 3, None, None, None, None, hidden, width

    return {
        "d64 linear bfloat16": inputs(0),
        "d64 hidden 128 bfloat16": inputs(128),
        "d64 hidden 256 bfloat16": inputs(256),
    }


def _to_float(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.float() for x in tensors)


class _Span:
    """Chunks one after the other, `length` of them or what is left, and the launches over them."""

    def __init__(self, start, length, q, k, v, gates, initial, refresh, reset, hidden):
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

    def walk(self, states: tuple[Tensor, ...], y: Tensor | None = None, sides: tuple[Tensor, ...] = ()) -> None:
        """From the first state (b h w) to the last, which takes its place, or in a buffer (n+1 b h w) through all."""
        stride = states[0][0].numel() if states[0].dim() == 4 else 0
        sides = sides or (None,) * (4 if self.hidden else 1)
        self._walk(
            *(_walk_hidden if self.hidden else _walk_linear, self.q, self.k, self.v, self.learned, self.surprised),
            *(self.initial, self.refresh, self.reset, *states, y, *sides, stride),
        )

    def backward(
        self,
        states: tuple[Tensor, ...],
        grad_y: Tensor,
        grad_states: tuple[Tensor, ...],
        grad_anchor: Tensor,
        grad_initial: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """The gradients of q, k, v and of the coefficients. In their buffers the first states are given and the last
        gradients, the rest is filled in; those of anchor and initial weights change in place."""
        stride = states[0][0].numel()
        errors, grad_errors, grad_v = (torch.empty_like(grad_y) for _ in range(3))
        grad_q, grad_k = (torch.empty_like(x, dtype=torch.float32) for x in (self.q, self.k))
        grad_learned, grad_surprised = torch.zeros_like(self.learned), torch.empty_like(self.surprised)
        if self.hidden:
            units, back, errors1, x, grad_out, grad_units, grad_errors1 = (
                grad_y.new_empty(*grad_y.shape[:-1], self.hidden) for _ in range(7)
            )
            self.walk(states, None, (units, back, errors1, errors))
        else:
            units, errors1, grad_out, grad_units, grad_errors1 = None, errors, grad_y, grad_errors, grad_errors
            self.walk(states, None, (errors,))
        weights, surprise, anchor = states
        if self.reset is not None:
            restarts = self.reset.T[:, :, None, None]
            torch.where(restarts, self.initial, weights[: self.chunks], out=weights[: self.chunks])
            surprise[: self.chunks].masked_fill_(restarts, 0.0)

        given = self.q, self.k, self.learned
        if self.hidden:
            self._all_chunks(
                *(_second_reads_backward, *given, weights, surprise, units, errors1, errors, grad_y),
                *(x, grad_out, grad_units, grad_errors, grad_learned, stride),
            )
        self._all_chunks(
            *(_first_reads_backward, *given, weights, surprise, errors1, grad_out),
            *(grad_q, grad_k, grad_errors1, grad_learned, stride),
        )
        state_gradients = *grad_states, grad_anchor, grad_initial, stride
        gates = *given, self.surprised, self.refresh, self.reset
        if self.hidden:
            self._walk(
                *(_walk_back_hidden, *gates, anchor, units, back, errors, x, grad_y, grad_out, grad_units),
                *(grad_errors1, grad_errors, grad_v, *state_gradients),
            )
        else:
            self._walk(_walk_back_linear, *gates, grad_y, grad_errors, grad_v, *state_gradients)
        self._all_chunks(
            *(_writes_backward, self.k, self.learned, self.surprised, *states),
            *(units, errors1, errors, grad_units, *grad_states, grad_k, grad_learned, grad_surprised, stride),
        )
        return grad_q, grad_k, grad_v, grad_learned, grad_surprised

    def _walk(self, kernel, *arguments: Tensor | int | None) -> None:
        blocks = 1 if self.hidden else triton.cdiv(self.columns, BLOCK)
        self._launch(kernel, (self.memories, blocks), *arguments)

    def _all_chunks(self, kernel, *arguments: Tensor | int | None) -> None:
        self._launch(kernel, (self.memories * self.chunks,), *arguments)

    def _launch(self, kernel, grid: tuple[int, ...], *arguments: Tensor | int | None) -> None:
        # whichever width leaves the threads enough registers on every GPU
        block = WIDE_BLOCK if kernel in (_second_reads_backward, _walk_back_hidden) else BLOCK
        launch(kernel, grid, *arguments, *self.sizes, BLOCK=block, **self.tiles, warps=WARPS, stages=1)


@triton.jit
def _dot(x, y, dtype: tl.constexpr):
    """A product in the precision of the inputs, summed in float32."""
    return tl.dot(x.to(dtype), y.to(dtype), input_precision="ieee")


@triton.jit
def _load(pointer, rows, columns, height, breadth):
    """A tile of a matrix (height breadth), in float32, 0 outside."""
    there = (rows < height)[:, None] & (columns < breadth)[None, :]
    return tl.load(pointer + rows[:, None] * breadth + columns[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, rows, columns, height, breadth, x):
    there = (rows < height)[:, None] & (columns < breadth)[None, :]
    tl.store(pointer + rows[:, None] * breadth + columns[None, :], x.to(pointer.dtype.element_ty), mask=there)


@triton.jit
def _silu(x):
    """silu(x), its derivative and its second derivative."""
    gate = tl.sigmoid(x)
    fall = gate * (1 - gate)
    return x * gate, gate + x * fall, fall * (2 + x * (1 - 2 * gate))


@triton.jit
def _load_rows(pointer, lines, inside, columns, breadth):
    """Rows of sequences, in float32, 0 outside."""
    there = inside[:, None] & (columns < breadth)[None, :]
    return tl.load(pointer + lines[:, None] * breadth + columns[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(pointer, lines, inside, columns, breadth, x):
    there = inside[:, None] & (columns < breadth)[None, :]
    tl.store(pointer + lines[:, None] * breadth + columns[None, :], x, mask=there)


@triton.jit
def _chunk_lines(program, chunk, t, h, width, CHUNK: tl.constexpr):
    """The lines of a chunk's tokens in sequences (b t h ...), and which of them there are."""
    slot = tl.arange(0, CHUNK)
    token = chunk * width + slot
    return (program // h * t + token) * h + program % h, (slot < width) & (token < t)


@triton.jit
def _load_pair_gates(learned, at, width, CHUNK: tl.constexpr):
    """Of the weights at every token the coefficients of minus the chunk's gradients (c c)."""
    slot = tl.arange(0, CHUNK)
    inside = slot < width
    pointers = learned + ((at * width + slot) * (width + 2))[:, None] + slot[None, :]
    return tl.load(pointers, mask=inside[:, None] & inside[None, :], other=0.0)


@triton.jit
def _load_read_gates(learned, at, width, CHUNK: tl.constexpr):
    """Of the weights at every token the coefficients of surprise and weights before (c)."""
    slot = tl.arange(0, CHUNK)
    inside = slot < width
    pointers = learned + (at * width + slot) * (width + 2) + width
    return tl.load(pointers, mask=inside, other=0.0), tl.load(pointers + 1, mask=inside, other=0.0)


@triton.jit
def _load_write_gates(learned, surprised, at, width, CHUNK: tl.constexpr):
    """Of weights and surprise at the last token the coefficients of minus the gradients (c)."""
    slot = tl.arange(0, CHUNK)
    inside = slot < width
    last = tl.load(learned + (at * width + width - 1) * (width + 2) + slot, mask=inside, other=0.0)
    return last, tl.load(surprised + at * (width + 1) + slot, mask=inside, other=0.0)


@triton.jit
def _load_state_gates(learned, surprised, at, width):
    """At the last token, the coefficients in the weights of surprise and weights before, and that in the surprise."""
    lines = learned + (at * width + width - 1) * (width + 2) + width
    return tl.load(lines), tl.load(lines + 1), tl.load(surprised + at * (width + 1) + width)


@triton.jit
def _load_weight(weights, initial, restarts, at, at_initial, rows, columns, height, breadth):
    """A tile of the weights as a chunk finds them, those of a new document included."""
    weight = _load(weights + at, rows, columns, height, breadth)
    if initial is not None:
        weight = tl.where(restarts, _load(initial + at_initial, rows, columns, height, breadth), weight)
    return weight


@triton.jit
def _load_surprise(surprise, initial, restarts, at, rows, columns, height, breadth):
    past = _load(surprise + at, rows, columns, height, breadth)
    return past if initial is None else tl.where(restarts, 0.0, past)


@triton.jit
def _read(x, weight, past, attention, errors, keep, before, dtype: tl.constexpr):
    """What a layer makes of x: `keep` of the weights, `before` of the surprise, less the chunk's gradients."""
    y = keep[:, None] * _dot(x, weight, dtype) + before[:, None] * _dot(x, past, dtype)
    return y - _dot(attention, errors, dtype)


@triton.jit
def _write(weight, past, inputs, errors, last, last_past, gates, dtype: tl.constexpr):
    """Weights and surprise behind a chunk."""
    of_past, of_weight, past_of_past = gates
    after = of_weight * weight + of_past * past - _dot(tl.trans(inputs * last[:, None]), errors, dtype)
    return after, past_of_past * past - _dot(tl.trans(inputs * last_past[:, None]), errors, dtype)


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
    """Walk along the chunks with a block of columns. States are `stride` apart; 0: only the last is kept."""
    program = tl.program_id(0).to(tl.int64)
    row, head = program // h, program % h
    dtype: tl.constexpr = q.dtype.element_ty
    key, column = tl.arange(0, KEYS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = program * d * f
    weight = _load(weights + at, key, column, d, f)
    past = _load(surprise + at, key, column, d, f)
    point = _load(anchor + at, key, column, d, f)
    for chunk in range(chunks):
        lines, inside = _chunk_lines(program, chunk, t, h, width, CHUNK)
        at_gates = program * chunks + chunk
        writes = _load_pair_gates(learned, at_gates, width, CHUNK)
        before, keep = _load_read_gates(learned, at_gates, width, CHUNK)
        last, last_past = _load_write_gates(learned, surprised, at_gates, width, CHUNK)
        gates = _load_state_gates(learned, surprised, at_gates, width)
        if initial is not None:
            restarts = tl.load(reset + row * chunks + chunk)
            weight = tl.where(restarts, _load(initial + head * d * f, key, column, d, f), weight)
            past = tl.where(restarts, 0.0, past)
        point = tl.where(tl.load(refresh + row * chunks + chunk), weight, point)
        keys = _load_rows(k, lines, inside, key, d)
        errors = 2 * (_dot(keys, point, dtype) - _load_rows(v, lines, inside, column, f))
        if all_errors is not None:
            _store_rows(all_errors, lines, inside, column, f, errors)
        if y is not None:
            queries = _load_rows(q, lines, inside, key, d)
            attention = _dot(queries, tl.trans(keys), dtype) * writes
            out = _read(queries, weight, past, attention, errors, keep, before, dtype)
            _store_rows(y, lines, inside, column, f, out)
        weight, past = _write(weight, past, keys, errors, last, last_past, gates, dtype)
        at += stride
        if stride > 0 or chunk == chunks - 1:
            _store(weights + at, key, column, d, f, weight)
            _store(surprise + at, key, column, d, f, past)
            _store(anchor + at, key, column, d, f, point)


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
    """Walk along the chunks with two layers. States are `stride` apart; 0: each takes the place of the last."""
    program = tl.program_id(0).to(tl.int64)
    row, head = program // h, program % h
    dtype: tl.constexpr = q.dtype.element_ty
    key, value = tl.arange(0, KEYS), tl.arange(0, VALUES)
    size = d * f + f * e
    initial1, initial2 = head * size, head * size + d * f
    for chunk in tl.range(chunks, disable_licm=True):
        at = program * size + tl.cast(chunk, tl.int64) * stride
        at2 = at + d * f
        behind, behind2 = at + stride, at2 + stride
        opens = tl.load(refresh + row * chunks + chunk)
        restarts = False
        if initial is not None:
            restarts = tl.load(reset + row * chunks + chunk)
        lines, inside = _chunk_lines(program, chunk, t, h, width, CHUNK)
        at_gates = program * chunks + chunk
        writes = _load_pair_gates(learned, at_gates, width, CHUNK)
        before, keep = _load_read_gates(learned, at_gates, width, CHUNK)
        last, last_past = _load_write_gates(learned, surprised, at_gates, width, CHUNK)
        gates = _load_state_gates(learned, surprised, at_gates, width)
        keys = _load_rows(k, lines, inside, key, d)
        errors = -_load_rows(v, lines, inside, value, e)
        for start in tl.range(0, f, BLOCK, disable_licm=True):
            unit = start + tl.arange(0, BLOCK)
            weight = _load_weight(weights, initial, restarts, at, initial1, key, unit, d, f)
            point = tl.where(opens, weight, _load(anchor + at, key, unit, d, f))
            inputs, _, _ = _silu(_dot(keys, point, dtype))
            weight = _load_weight(weights, initial, restarts, at2, initial2, unit, value, f, e)
            point = tl.where(opens, weight, _load(anchor + at2, unit, value, f, e))
            errors += _dot(inputs, point, dtype)
        errors *= 2
        if all_errors is not None:
            _store_rows(all_errors, lines, inside, value, e, errors)
        tl.debug_barrier()  # all have read what will now be written
        if y is not None:
            queries = _load_rows(q, lines, inside, key, d)
            attention = _dot(queries, tl.trans(keys), dtype) * writes
            out = tl.zeros((CHUNK, VALUES), tl.float32)
            similar = tl.zeros((CHUNK, CHUNK), tl.float32)
        for start in tl.range(0, f, BLOCK, disable_licm=True):
            unit = start + tl.arange(0, BLOCK)
            weight = _load_weight(weights, initial, restarts, at, initial1, key, unit, d, f)
            past = _load_surprise(surprise, initial, restarts, at, key, unit, d, f)
            point = tl.where(opens, weight, _load(anchor + at, key, unit, d, f))
            weight2 = _load_weight(weights, initial, restarts, at2, initial2, unit, value, f, e)
            past2 = _load_surprise(surprise, initial, restarts, at2, unit, value, f, e)
            point2 = tl.where(opens, weight2, _load(anchor + at2, unit, value, f, e))
            _store(anchor + behind, key, unit, d, f, point)
            _store(anchor + behind2, unit, value, f, e, point2)

            units = _dot(keys, point, dtype)
            inputs, slope, _ = _silu(units)
            back = _dot(errors, tl.trans(point2), dtype)
            errors1 = back * slope
            if all_errors is not None:
                _store_rows(all_units, lines, inside, unit, f, units)
                _store_rows(all_back, lines, inside, unit, f, back)
                _store_rows(all_errors1, lines, inside, unit, f, errors1)
            if y is not None:
                x, _, _ = _silu(_read(queries, weight, past, attention, errors1, keep, before, dtype))
                similar += _dot(x, tl.trans(inputs), dtype)
                out += keep[:, None] * _dot(x, weight2, dtype) + before[:, None] * _dot(x, past2, dtype)
            weight, past = _write(weight, past, keys, errors1, last, last_past, gates, dtype)
            _store(weights + behind, key, unit, d, f, weight)
            _store(surprise + behind, key, unit, d, f, past)
            weight2, past2 = _write(weight2, past2, inputs, errors, last, last_past, gates, dtype)
            _store(weights + behind2, unit, value, f, e, weight2)
            _store(surprise + behind2, unit, value, f, e, past2)
        if y is not None:
            _store_rows(y, lines, inside, value, e, out - _dot(similar * writes, errors, dtype))
        tl.debug_barrier()  # the next chunk reads what others wrote


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
    program = tl.program_id(0).to(tl.int64)
    memory, chunk = program // chunks, program % chunks
    dtype: tl.constexpr = q.dtype.element_ty
    key, value = tl.arange(0, KEYS), tl.arange(0, VALUES)
    at = memory * (d * f + f * e) + chunk * stride
    at2 = at + d * f
    lines, inside = _chunk_lines(memory, chunk, t, h, width, CHUNK)
    writes = _load_pair_gates(learned, program, width, CHUNK)
    before, keep = _load_read_gates(learned, program, width, CHUNK)
    queries, keys = _load_rows(q, lines, inside, key, d), _load_rows(k, lines, inside, key, d)
    attention = _dot(queries, tl.trans(keys), dtype) * writes
    errors, grad = _load_rows(all_errors, lines, inside, value, e), _load_rows(grad_y, lines, inside, value, e)
    grad_attention = -_dot(grad, tl.trans(errors), dtype)
    grad_similar = grad_attention * writes
    similar = tl.zeros((CHUNK, CHUNK), tl.float32)
    grad_keep, grad_before = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32)
    for start in range(0, f, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        weight, past = _load(weights + at, key, unit, d, f), _load(surprise + at, key, unit, d, f)
        errors1 = _load_rows(all_errors1, lines, inside, unit, f)
        x, slope, _ = _silu(_read(queries, weight, past, attention, errors1, keep, before, dtype))
        _store_rows(all_x, lines, inside, unit, f, x)
        inputs, _, _ = _silu(_load_rows(all_units, lines, inside, unit, f))
        similar += _dot(x, tl.trans(inputs), dtype)
        weight, past = _load(weights + at2, unit, value, f, e), _load(surprise + at2, unit, value, f, e)
        grad_x, more_keep, more_before = _read_backward(x, grad, weight, past, keep, before, dtype)
        grad_keep += more_keep
        grad_before += more_before
        grad_x += _dot(grad_similar, inputs, dtype)
        _store_rows(grad_out, lines, inside, unit, f, grad_x * slope)
        _store_rows(grad_inputs, lines, inside, unit, f, _dot(tl.trans(grad_similar), x, dtype))
    _store_rows(grad_errors, lines, inside, value, e, -_dot(tl.trans(similar * writes), grad, dtype))
    _add_read_gradients(grad_learned, program, width, grad_attention * similar, grad_before, grad_keep, CHUNK)


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
    program = tl.program_id(0).to(tl.int64)
    memory, chunk = program // chunks, program % chunks
    dtype: tl.constexpr = q.dtype.element_ty
    key = tl.arange(0, KEYS)
    size = d * f + f * e if VALUES else d * f
    at = memory * size + chunk * stride
    lines, inside = _chunk_lines(memory, chunk, t, h, width, CHUNK)
    writes = _load_pair_gates(learned, program, width, CHUNK)
    before, keep = _load_read_gates(learned, program, width, CHUNK)
    queries, keys = _load_rows(q, lines, inside, key, d), _load_rows(k, lines, inside, key, d)
    similar = _dot(queries, tl.trans(keys), dtype)
    grad_queries = tl.zeros((CHUNK, KEYS), tl.float32)
    grad_attention = tl.zeros((CHUNK, CHUNK), tl.float32)
    grad_keep, grad_before = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32)
    for start in range(0, f, BLOCK):
        column = start + tl.arange(0, BLOCK)
        weight, past = _load(weights + at, key, column, d, f), _load(surprise + at, key, column, d, f)
        errors = _load_rows(all_errors, lines, inside, column, f)
        grad = _load_rows(grad_out, lines, inside, column, f)
        more, more_keep, more_before = _read_backward(queries, grad, weight, past, keep, before, dtype)
        grad_queries += more
        grad_keep += more_keep
        grad_before += more_before
        grad_attention -= _dot(grad, tl.trans(errors), dtype)
        _store_rows(grad_errors, lines, inside, column, f, -_dot(tl.trans(similar * writes), grad, dtype))
    grad_similar = grad_attention * writes
    _store_rows(grad_q, lines, inside, key, d, grad_queries + _dot(grad_similar, keys, dtype))
    _store_rows(grad_k, lines, inside, key, d, _dot(tl.trans(grad_similar), queries, dtype))
    _add_read_gradients(grad_learned, program, width, grad_attention * similar, grad_before, grad_keep, CHUNK)


@triton.jit
def _read_backward(x, grad, weight, past, keep, before, dtype: tl.constexpr):
    """Of keep (x weight) + before (x past): the gradients of x, keep and before."""
    from_weight, from_past = _dot(grad, tl.trans(weight), dtype), _dot(grad, tl.trans(past), dtype)
    grad_x = keep[:, None] * from_weight + before[:, None] * from_past
    return grad_x, tl.sum(x * from_weight, 1), tl.sum(x * from_past, 1)


@triton.jit
def _written_backward(x, grad_weight, grad_past, last, last_past, dtype: tl.constexpr):
    """The gradient of one side of what a chunk writes; x is the other."""
    return -last[:, None] * _dot(x, grad_weight, dtype) - last_past[:, None] * _dot(x, grad_past, dtype)


@triton.jit
def _state_backward(x, grad, grad_weight, grad_past, keep, before, gates, dtype: tl.constexpr):
    """The gradients of weights and surprise before a chunk, by its reads and by those behind it."""
    of_past, of_weight, past_of_past = gates
    x = tl.trans(x)
    before_past = of_past * grad_weight + past_of_past * grad_past + _dot(x, before[:, None] * grad, dtype)
    return of_weight * grad_weight + _dot(x, keep[:, None] * grad, dtype), before_past


@triton.jit
def _hand_on(weight, past, point, opens, restarts):
    """The gradients of weights, surprise and anchor in a chunk -> those as the chunk before left them, and of the
    initial weights."""
    weight += tl.where(opens, point, 0.0)
    initial = tl.where(restarts, weight, 0.0)
    return tl.where(restarts, 0.0, weight), tl.where(restarts, 0.0, past), tl.where(opens, 0.0, point), initial


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
    """Walk back along the chunks with the gradients of a block of columns; the errors' become complete."""
    program = tl.program_id(0).to(tl.int64)
    row = program // h
    dtype: tl.constexpr = q.dtype.element_ty
    key, column = tl.arange(0, KEYS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = program * d * f
    at = here + tl.cast(chunks, tl.int64) * stride
    grad_weight = _load(grad_weights + at, key, column, d, f)
    grad_past = _load(grad_surprise + at, key, column, d, f)
    grad_point = _load(grad_anchor + here, key, column, d, f)
    initial = tl.zeros((KEYS, BLOCK), tl.float32)
    for step in range(chunks):
        chunk = chunks - 1 - step
        lines, inside = _chunk_lines(program, chunk, t, h, width, CHUNK)
        at_gates = program * chunks + chunk
        before, keep = _load_read_gates(learned, at_gates, width, CHUNK)
        last, last_past = _load_write_gates(learned, surprised, at_gates, width, CHUNK)
        gates = _load_state_gates(learned, surprised, at_gates, width)
        keys = _load_rows(k, lines, inside, key, d)
        errors = _load_rows(grad_errors, lines, inside, column, f)
        errors += _written_backward(keys, grad_weight, grad_past, last, last_past, dtype)
        _store_rows(grad_errors, lines, inside, column, f, 2 * errors)
        _store_rows(grad_v, lines, inside, column, f, -2 * errors)
        queries, grad = _load_rows(q, lines, inside, key, d), _load_rows(grad_y, lines, inside, column, f)
        grad_weight, grad_past = _state_backward(queries, grad, grad_weight, grad_past, keep, before, gates, dtype)
        grad_point += 2 * _dot(tl.trans(keys), errors, dtype)
        opens = tl.load(refresh + row * chunks + chunk)
        restarts = False
        if reset is not None:
            restarts = tl.load(reset + row * chunks + chunk)
        grad_weight, grad_past, grad_point, more = _hand_on(grad_weight, grad_past, grad_point, opens, restarts)
        initial += more
        at -= stride
        _store(grad_weights + at, key, column, d, f, grad_weight)
        _store(grad_surprise + at, key, column, d, f, grad_past)
    _store(grad_anchor + here, key, column, d, f, grad_point)
    if reset is not None:
        _store(grad_initial + here, key, column, d, f, initial + _load(grad_initial + here, key, column, d, f))


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
    """Walk back along the chunks with the gradients of two layers. Those of the first layer's errors become complete,
    those of the second's inputs become those of the units."""
    program = tl.program_id(0).to(tl.int64)
    row = program // h
    dtype: tl.constexpr = q.dtype.element_ty
    key, value = tl.arange(0, KEYS), tl.arange(0, VALUES)
    here = program * (d * f + f * e)
    here2 = here + d * f
    for step in tl.range(chunks, disable_licm=True):
        chunk = chunks - 1 - step
        at = here + tl.cast(chunk, tl.int64) * stride
        at2 = at + d * f
        behind, behind2 = at + stride, at2 + stride
        lines, inside = _chunk_lines(program, chunk, t, h, width, CHUNK)
        at_gates = program * chunks + chunk
        before, keep = _load_read_gates(learned, at_gates, width, CHUNK)
        last, last_past = _load_write_gates(learned, surprised, at_gates, width, CHUNK)
        gates = _load_state_gates(learned, surprised, at_gates, width)
        opens = tl.load(refresh + row * chunks + chunk)
        restarts = False
        if reset is not None:
            restarts = tl.load(reset + row * chunks + chunk)

        # the second layer's errors: errors = 2 (inputs point - v), errors1 = (errors point^T) slope
        grad = _load_rows(grad_errors, lines, inside, value, e)
        for start in tl.range(0, f, BLOCK, disable_licm=True):
            unit = start + tl.arange(0, BLOCK)
            inputs, slope, _ = _silu(_load_rows(all_units, lines, inside, unit, f))
            grad_weight = _load(grad_weights + behind2, unit, value, f, e)
            grad_past = _load(grad_surprise + behind2, unit, value, f, e)
            grad += _written_backward(inputs, grad_weight, grad_past, last, last_past, dtype)
            grad_weight = _load(grad_weights + behind, key, unit, d, f)
            grad_past = _load(grad_surprise + behind, key, unit, d, f)
            errors1 = _load_rows(grad_errors1, lines, inside, unit, f)
            keys = _load_rows(k, lines, inside, key, d)
            errors1 += _written_backward(keys, grad_weight, grad_past, last, last_past, dtype)
            _store_rows(grad_errors1, lines, inside, unit, f, errors1)
            grad += _dot(errors1 * slope, _load(anchor + behind2, unit, value, f, e), dtype)
        grad *= 2
        _store_rows(grad_v, lines, inside, value, e, -grad)
        tl.debug_barrier()  # the next pass reads what others wrote

        # the units: inputs = silu(units), whose slope is in errors1 too
        for start in tl.range(0, f, BLOCK, disable_licm=True):
            unit = start + tl.arange(0, BLOCK)
            inputs, slope, curvature = _silu(_load_rows(all_units, lines, inside, unit, f))
            errors1 = _load_rows(grad_errors1, lines, inside, unit, f)
            grad_weight = _load(grad_weights + behind2, unit, value, f, e)
            grad_past = _load(grad_surprise + behind2, unit, value, f, e)
            grad = -_load_rows(grad_v, lines, inside, value, e)  # again: kept, it would cost too many registers
            errors = _load_rows(all_errors, lines, inside, value, e)
            grad_inputs = _load_rows(grad_units, lines, inside, unit, f)
            grad_inputs += _written_backward(errors, tl.trans(grad_weight), tl.trans(grad_past), last, last_past, dtype)
            grad_inputs += _dot(grad, tl.trans(_load(anchor + behind2, unit, value, f, e)), dtype)
            units = errors1 * _load_rows(all_back, lines, inside, unit, f) * curvature + grad_inputs * slope
            _store_rows(grad_units, lines, inside, unit, f, units)
        tl.debug_barrier()

        # the second layer's weights
        for start in tl.range(0, f, BLOCK, disable_licm=True):
            unit = start + tl.arange(0, BLOCK)
            inputs, slope, _ = _silu(_load_rows(all_units, lines, inside, unit, f))
            errors1 = _load_rows(grad_errors1, lines, inside, unit, f)
            grad = -_load_rows(grad_v, lines, inside, value, e)
            errors = _load_rows(all_errors, lines, inside, value, e)
            grad_point = _dot(tl.trans(inputs), grad, dtype) + _dot(tl.trans(errors1 * slope), errors, dtype)
            grad_weight = _load(grad_weights + behind2, unit, value, f, e)
            grad_past = _load(grad_surprise + behind2, unit, value, f, e)
            x, grad_x = _load_rows(all_x, lines, inside, unit, f), _load_rows(grad_y, lines, inside, value, e)
            grad_weight, grad_past = _state_backward(x, grad_x, grad_weight, grad_past, keep, before, gates, dtype)
            _store_state_gradient(
                *(grad_weights + at2, grad_surprise + at2, grad_anchor, grad_initial, here2, opens, restarts),
                *(unit, value, f, e, grad_weight, grad_past, grad_point),
            )

        # the first layer's weights
        for start in tl.range(0, f, BLOCK, disable_licm=True):
            unit = start + tl.arange(0, BLOCK)
            grad_weight = _load(grad_weights + behind, key, unit, d, f)
            grad_past = _load(grad_surprise + behind, key, unit, d, f)
            keys = _load_rows(k, lines, inside, key, d)
            grad_point = _dot(tl.trans(keys), _load_rows(grad_units, lines, inside, unit, f), dtype)
            x, grad_x = _load_rows(q, lines, inside, key, d), _load_rows(grad_out, lines, inside, unit, f)
            grad_weight, grad_past = _state_backward(x, grad_x, grad_weight, grad_past, keep, before, gates, dtype)
            _store_state_gradient(
                *(grad_weights + at, grad_surprise + at, grad_anchor, grad_initial, here, opens, restarts),
                *(key, unit, d, f, grad_weight, grad_past, grad_point),
            )
        tl.debug_barrier()  # the chunk before reads what others wrote


@triton.jit
def _store_state_gradient(
    grad_weights,
    grad_surprise,
    grad_anchor,
    grad_initial,
    here,
    opens,
    restarts,
    rows,
    columns,
    height,
    breadth,
    weight,
    past,
    point,
):
    """Hand the gradients of weights, surprise and anchor on to the chunk before, or to the initial weights."""
    point += _load(grad_anchor + here, rows, columns, height, breadth)
    weight, past, point, initial = _hand_on(weight, past, point, opens, restarts)
    _store(grad_weights, rows, columns, height, breadth, weight)
    _store(grad_surprise, rows, columns, height, breadth, past)
    _store(grad_anchor + here, rows, columns, height, breadth, point)
    if grad_initial is not None:
        initial += _load(grad_initial + here, rows, columns, height, breadth)
        _store(grad_initial + here, rows, columns, height, breadth, initial)


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
    program = tl.program_id(0).to(tl.int64)
    memory, chunk = program // chunks, program % chunks
    dtype: tl.constexpr = k.dtype.element_ty
    key = tl.arange(0, KEYS)
    size = d * f + f * e if VALUES else d * f
    at = memory * size + chunk * stride
    behind = at + stride
    lines, inside = _chunk_lines(memory, chunk, t, h, width, CHUNK)
    last, last_past = _load_write_gates(learned, surprised, program, width, CHUNK)
    keys = _load_rows(k, lines, inside, key, d)
    grad_keys = _load_rows(grad_k, lines, inside, key, d)
    found = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32), 0.0, 0.0, 0.0
    for start in range(0, f, BLOCK):
        column = start + tl.arange(0, BLOCK)
        weight, past = _load(weights + at, key, column, d, f), _load(surprise + at, key, column, d, f)
        grad_weight = _load(grad_weights + behind, key, column, d, f)
        grad_past = _load(grad_surprise + behind, key, column, d, f)
        errors = _load_rows(all_errors1, lines, inside, column, f)
        found = _gates_backward(found, keys, errors, weight, past, grad_weight, grad_past, dtype)
        grad_keys += _written_backward(errors, tl.trans(grad_weight), tl.trans(grad_past), last, last_past, dtype)
        units, point = _load_rows(grad_units, lines, inside, column, f), _load(anchor + behind, key, column, d, f)
        grad_keys += _dot(units, tl.trans(point), dtype)
    _store_rows(grad_k, lines, inside, key, d, grad_keys)
    if VALUES:
        value = tl.arange(0, VALUES)
        at, behind = at + d * f, behind + d * f
        errors = _load_rows(all_errors, lines, inside, value, e)
        for start in range(0, f, BLOCK):
            unit = start + tl.arange(0, BLOCK)
            weight, past = _load(weights + at, unit, value, f, e), _load(surprise + at, unit, value, f, e)
            grad_weight = _load(grad_weights + behind, unit, value, f, e)
            grad_past = _load(grad_surprise + behind, unit, value, f, e)
            inputs, _, _ = _silu(_load_rows(all_units, lines, inside, unit, f))
            found = _gates_backward(found, inputs, errors, weight, past, grad_weight, grad_past, dtype)
    _add_write_gradients(grad_learned, grad_surprised, program, width, found, CHUNK)


@triton.jit
def _gates_backward(found, inputs, errors, weight, past, grad_weight, grad_past, dtype: tl.constexpr):
    """The gradients of the coefficients at the last token, added to those found: of minus the gradients in weights and
    surprise (c), of surprise and weights in the weights, of surprise in the surprise."""
    last, last_past, of_past, of_weight, past_of_past = found
    last -= tl.sum(_dot(inputs, grad_weight, dtype) * errors, 1)
    last_past -= tl.sum(_dot(inputs, grad_past, dtype) * errors, 1)
    of_past += tl.sum(tl.sum(past * grad_weight, 1), 0)
    of_weight += tl.sum(tl.sum(weight * grad_weight, 1), 0)
    past_of_past += tl.sum(tl.sum(past * grad_past, 1), 0)
    return last, last_past, of_past, of_weight, past_of_past


@triton.jit
def _add(pointer, x, mask=None):
    tl.store(pointer, tl.load(pointer, mask=mask) + x, mask=mask)


@triton.jit
def _add_read_gradients(learned, at, width, writes, past, keep, CHUNK: tl.constexpr):
    """The gradients of the coefficients at every token (see `_load_pair_gates`, `_load_read_gates`)."""
    slot = tl.arange(0, CHUNK)
    inside = slot < width
    lines = learned + (at * width + slot) * (width + 2)
    _add(lines[:, None] + slot[None, :], writes, inside[:, None] & inside[None, :])
    _add(lines + width, past, inside)
    _add(lines + width + 1, keep, inside)


@triton.jit
def _add_write_gradients(learned, surprised, at, width, found, CHUNK: tl.constexpr):
    """The gradients of the coefficients at the last token, as `_gates_backward` finds them."""
    last, last_past, of_past, of_weight, past_of_past = found
    slot = tl.arange(0, CHUNK)
    inside = slot < width
    line = learned + (at * width + width - 1) * (width + 2)
    _add(line + slot, last, inside)
    _add(line + width, of_past)
    _add(line + width + 1, of_weight)
    tl.store(surprised + at * (width + 1) + slot, last_past, mask=inside)
    tl.store(surprised + at * (width + 1) + width, past_of_past)
