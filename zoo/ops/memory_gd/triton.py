"""The neural memory in Triton: programs walk along the chunks with the state, others take all chunks at once.

The algebra is that of `chunked.py`, whose coefficients the kernels are given. Weights, surprise and anchor are float32
and are taken a block at a time. The columns of a linear memory do not meet, so each block of them has a program of its
own, which carries them along. Two layers meet in sums over the hidden units: there a program owns the memory of a row
and head, keeps it in global memory, and takes a chunk in several passes over the units. Loops keep what does not change
out of registers (`disable_licm`), and load tiles again rather than hold them.

The backward is the gradient of all that by hand, that of the gradients inside included. It keeps inputs only: states
are computed again, first those before every span of chunks, then, span by span from the last, those before each chunk.

    triton_layers.py       what a layer reads and writes, and the gradients of both
    triton_span.py         launching over a span, and what kernels load of a chunk
    triton_walk.py         forward: the outputs, the states, and the two sides of the gradients inside
    triton_backward.py     backward: a span; what is done for all chunks at once
    triton_walk_back.py    backward: the gradients of the states, and of the gradients inside

Letters: b batch, t slot of a token, h head, n chunk, d key, e value, w weights of a memory.
"""

import math

import torch
from torch import Tensor

from zoo.ops.memory_gd.gates import gate_coefficients, gate_gradients
from zoo.ops.memory_gd.triton_backward import backward_span
from zoo.ops.memory_gd.triton_span import Span
from zoo.ops.memory_gd.triton_walk import walk


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
    walk(Span(0, gates[0].shape[2], q, k, v, gates, initial, refresh, reset, hidden), state, y)
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
    spans = [Span(start, length, q, k, v, gates, initial, refresh, reset, hidden) for start in starts]

    state = tuple(x.clone() for x in (weights, surprise, anchor))
    before = []
    for span in spans:
        before.append(tuple(x.clone() for x in state))
        if span is not spans[-1]:
            walk(span, state)

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
        found.append(backward_span(span, states, span.tokens(grad_y), grad_states, grad_anchor, grad_initial))
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
