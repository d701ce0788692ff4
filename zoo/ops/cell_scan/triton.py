"""The cells in Triton: a program owns a head and some rows of the batch, and walks along the tokens.

The state stays in registers, the head's weights too where they fit. The backward walks forward once more and writes the
gates down, then comes back; the gradient of the weights is one product over all tokens.

Letters: b batch, t tokens, s tensor of the state, h heads, d channels of a head, g gate; r row of the batch in a tile.
What is kept of a token for the backward: i, f, g, o, c of the LSTM; r, z, n and h's part of n of the GRU; i, f, z, o,
the slope of ln f, c, n of the sLSTM.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.cell_scan import LARGEST_TRITON_HEAD
from zoo.ops.cell_scan.reference import CELLS
from zoo.ops.gpu import dot_precision, launch, next_power_of_2, on_nvidia

ROWS = 16  # the fewest that tensor cores take
_KEPT = {"lstm": 5, "gru": 4, "slstm": 7}


def forward(
    x: Tensor,
    recurrent: Tensor,
    bias: Tensor | None,
    state: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    cell: str,
) -> tuple[Tensor, Tensor]:
    b, t, h, _ = x.shape
    y, end = state.new_empty(b, t, h, recurrent.shape[1]), torch.empty_like(state)
    _walk(_forward, x, recurrent, cell, x, recurrent, bias, state, mask, starts, y, end, None)
    return y, end


def backward(
    grads: list[Tensor],
    outputs: list[Tensor],
    x: Tensor,
    recurrent: Tensor,
    bias: Tensor | None,
    state: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    cell: str,
) -> tuple[Tensor | None, ...]:
    y, (grad_y, grad_end) = outputs[0], grads
    kept = state.new_empty(*y.shape[:3], _KEPT[cell] * y.shape[3])
    _walk(_forward, x, recurrent, cell, x, recurrent, bias, state, mask, starts, None, None, kept)

    grad_x, grad_state = torch.empty_like(x), torch.empty_like(state)
    grad_gates = torch.empty_like(x) if cell == "gru" else grad_x  # of what the gates get from h
    tensors = recurrent, state, mask, starts, y, kept, grad_y, grad_end, grad_x, grad_gates, grad_state
    _walk(_backward, x, recurrent, cell, *tensors)

    h_before = torch.cat([state[:, None, 0], y[:, :-1]], dim=1)
    if starts is not None:
        h_before = h_before.masked_fill(starts[..., None, None], 0.0)
    grad_recurrent = torch.einsum("bthd,bthg->hdg", h_before.to(grad_gates.dtype), grad_gates).to(recurrent.dtype)
    grad_bias = None if bias is None else grad_gates.sum((0, 1), dtype=torch.float32).to(bias.dtype)
    return grad_x, grad_recurrent, grad_bias, grad_state, None, None


def ahead_of_time() -> dict[str, tuple[Tensor | str | None, ...]]:
    """Inputs of the main sizes, by name."""

    def inputs(cell: str, b: int, t: int, h: int, d: int) -> tuple[Tensor | str | None, ...]:
        gates, states = CELLS[cell].gates, CELLS[cell].states
        x, recurrent, bias = (
            torch.empty(shape, dtype=torch.bfloat16, device="meta")
            for shape in ((b, t, h, gates * d), (h, d, gates * d), (h, gates * d))
        )
        return x, recurrent, bias, torch.empty(b, states, h, d, device="meta"), None, None, cell

    return {f"{cell} d64": inputs(cell, 16, 1024, 8, 64) for cell in CELLS}


def _walk(kernel, x: Tensor, recurrent: Tensor, cell: str, *tensors: Tensor | None) -> None:
    """Launch a kernel, a program for each head and block of rows."""
    b, t, h, _ = x.shape
    d = recurrent.shape[1]
    if d > LARGEST_TRITON_HEAD:
        raise ValueError(
            f"cell_scan: the Triton kernel has heads of at most {LARGEST_TRITON_HEAD} channels, got {d}; "
            "kernels='chunked' has no limit"
        )
    width = max(16, next_power_of_2(d))
    row_bytes = width * recurrent.element_size()  # of a gate's weights
    constants = {
        "CELL": cell,
        "HOLD": on_nvidia() and row_bytes <= 128,  # more, or AMD's larger tiles of a warp, would spill
        "PRECISION": dot_precision(),
        "ROWS": ROWS,
        "D": width,
    }
    launch(kernel, (h, triton.cdiv(b, ROWS)), *tensors, b, t, h, d, warps=4 if row_bytes <= 128 else 8, **constants)


@triton.jit
def _tanh(x):
    """The quotient loses small x: they have a series."""
    square = x * x
    series = -1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))
    return tl.where(square < 0.0625, x + x * square * series, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def _log_sigmoid(x):
    """min(x, 0) - ln(1 + u) with u = exp(-|x|), and ln(1 + u) = 2 artanh(u / (2 + u))."""
    u = tl.exp(-tl.abs(x))
    s = u / (2 + u)
    square = s * s
    series = 1 / 7 + square * (1 / 9 + square * (1 / 11 + square * (1 / 13)))
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * series))
    return tl.minimum(x, 0.0) - 2 * s * series


@triton.jit
def _load_tiles(x, stride, inside, COUNT: tl.constexpr):
    """A tuple of tiles (r d), a stride apart, 0 outside."""
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles += (tl.load(x + i * stride, mask=inside, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def _store_tiles(x, stride, inside, tiles):
    for i in tl.static_range(len(tiles)):
        tl.store(x + i * stride, tiles[i], mask=inside)


@triton.jit
def _weights(recurrent, head, gate, d, GATES: tl.constexpr, D: tl.constexpr):
    """The weights of a gate, (d d), padded with zeros."""
    k = tl.arange(0, D)[:, None]
    j = tl.arange(0, D)[None, :]
    at = recurrent + (head * d * GATES + gate) * d
    return tl.load(at + (k * GATES * d + j), mask=(k < d) & (j < d), other=0.0)


@triton.jit
def _from_h(
    hidden,
    weights,
    recurrent,
    head,
    gate,
    d,
    bias,
    GATES: tl.constexpr,
    HOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
):
    """What a gate gets from the last h, (r d)."""
    if not HOLD:
        weights = _weights(recurrent, head, gate, d, GATES, D)
    return tl.dot(hidden.to(weights.dtype), weights, input_precision=PRECISION) + bias


@triton.jit
def _to_h(
    grad,
    weights,
    recurrent,
    head,
    gate,
    d,
    GATES: tl.constexpr,
    HOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
):
    """What the gradient of a gate means for the last h, (r d)."""
    if not HOLD:
        weights = _weights(recurrent, head, gate, d, GATES, D)
    return tl.dot(grad.to(weights.dtype), tl.trans(weights), input_precision=PRECISION)


@triton.jit
def _bias(bias, head, gate, d, GATES: tl.constexpr, D: tl.constexpr):
    if bias is None:
        return tl.zeros([1, D], tl.float32)
    j = tl.arange(0, D)[None, :]
    return tl.load(bias + (head * GATES + gate) * d + j, mask=j < d, other=0.0).to(tl.float32)


@triton.jit
def _flags(flags, row, token, b, t):
    """The (b t) bools of a token, (r 1)."""
    return tl.load(flags + row * t + token, mask=row < b, other=0) != 0


@triton.jit
def _forward(
    x,
    recurrent,
    bias,
    state,
    mask,
    starts,
    y,
    end,
    kept,
    b,
    t,
    h,
    d,
    CELL: tl.constexpr,
    HOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """y and the state after the last token; or, where `kept` is given, what the backward needs of every token."""
    GATES: tl.constexpr = 3 if CELL == "gru" else 4
    STATES: tl.constexpr = 1 if CELL == "gru" else (2 if CELL == "lstm" else 4)
    KEPT: tl.constexpr = 4 if CELL == "gru" else (5 if CELL == "lstm" else 7)
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, D)[None, :]
    inside = (row < b) & (channel < d)
    at_state = (row * STATES * h + head) * d + channel
    hd = h * d

    w0, w1, w2, w3 = 0, 0, 0, 0
    if HOLD:
        w0 = _weights(recurrent, head, 0, d, GATES, D)
        w1 = _weights(recurrent, head, 1, d, GATES, D)
        w2 = _weights(recurrent, head, 2, d, GATES, D)
        if GATES == 4:
            w3 = _weights(recurrent, head, 3, d, GATES, D)
    bias0 = _bias(bias, head, 0, d, GATES, D)
    bias1 = _bias(bias, head, 1, d, GATES, D)
    bias2 = _bias(bias, head, 2, d, GATES, D)
    if GATES == 4:
        bias3 = _bias(bias, head, 3, d, GATES, D)

    hidden = tl.load(state + at_state, mask=inside, other=0.0)
    if STATES > 1:
        c = tl.load(state + at_state + hd, mask=inside, other=0.0)
    if STATES > 2:
        n = tl.load(state + at_state + 2 * hd, mask=inside, other=0.0)
        m = tl.load(state + at_state + 3 * hd, mask=inside, other=0.0)

    for token in tl.range(0, t, num_stages=2 if HOLD else 1):
        cell = (row * t + token) * h + head
        at_x = cell * GATES * d + channel
        xs = _load_tiles(x + at_x, d, inside, GATES)
        if starts is not None:
            anew = _flags(starts, row, token, b, t)
            hidden = tl.where(anew, 0.0, hidden)
            if STATES > 1:
                c = tl.where(anew, 0.0, c)
            if STATES > 2:
                n = tl.where(anew, 0.0, n)
                m = tl.where(anew, 0.0, m)
        real = row < b
        if mask is not None:
            real = _flags(mask, row, token, b, t)

        h0 = _from_h(hidden, w0, recurrent, head, 0, d, bias0, GATES, HOLD, PRECISION, D)
        h1 = _from_h(hidden, w1, recurrent, head, 1, d, bias1, GATES, HOLD, PRECISION, D)
        h2 = _from_h(hidden, w2, recurrent, head, 2, d, bias2, GATES, HOLD, PRECISION, D)
        if GATES == 4:
            h3 = _from_h(hidden, w3, recurrent, head, 3, d, bias3, GATES, HOLD, PRECISION, D)
        at_kept = cell * KEPT * d + channel
        if CELL == "lstm":
            i = tl.sigmoid(xs[0] + h0)
            f = tl.sigmoid(xs[1] + h1)
            g = _tanh(xs[2] + h2)
            o = tl.sigmoid(xs[3] + h3)
            c = tl.where(real, f * c + i * g, c)
            hidden = tl.where(real, o * _tanh(c), hidden)
            if kept is not None:
                _store_tiles(kept + at_kept, d, inside, (i, f, g, o, c))
        elif CELL == "gru":
            r = tl.sigmoid(xs[0] + h0)
            z = tl.sigmoid(xs[1] + h1)
            new = _tanh(xs[2] + r * h2)
            hidden = tl.where(real, new + z * (hidden - new), hidden)
            if kept is not None:
                _store_tiles(kept + at_kept, d, inside, (r, z, new, h2))
        else:
            log_f = _log_sigmoid(xs[1] + h1)
            z = _tanh(xs[2] + h2)
            o = tl.sigmoid(xs[3] + h3)
            empty = n == 0.0
            new_m = tl.where(empty, xs[0] + h0, tl.maximum(log_f + m, xs[0] + h0))
            i = tl.exp(xs[0] + h0 - new_m)
            f = tl.exp(tl.where(empty, -float("inf"), (m - new_m) + log_f))
            c = tl.where(real, f * c + i * z, c)
            n = tl.where(real, f * n + i, n)
            m = tl.where(real, new_m, m)
            # rows behind the last keep their zeros: they are not divided by
            hidden = tl.where(real, o * c / tl.where(real, n, 1.0), hidden)
            if kept is not None:
                _store_tiles(kept + at_kept, d, inside, (i, f, z, o, tl.sigmoid(-xs[1] - h1), c, n))
        if y is not None:
            tl.store(y + cell * d + channel, hidden, mask=inside)

    if end is not None:
        tl.store(end + at_state, hidden, mask=inside)
        if STATES > 1:
            tl.store(end + at_state + hd, c, mask=inside)
        if STATES > 2:
            tl.store(end + at_state + 2 * hd, n, mask=inside)
            tl.store(end + at_state + 3 * hd, m, mask=inside)


@triton.jit
def _before(first, sequence, at, step, is_first, anew, inside):
    """A tensor of the state before a token: of the token `step` behind, of the first state, or of a new document."""
    earlier = tl.load(sequence + at - step, mask=inside & ~is_first, other=0.0)
    return tl.where(anew, 0.0, tl.where(is_first, first, earlier))


@triton.jit
def _backward(
    recurrent,
    state,
    mask,
    starts,
    y,
    kept,
    grad_y,
    grad_end,
    grad_x,
    grad_gates,
    grad_state,
    b,
    t,
    h,
    d,
    CELL: tl.constexpr,
    HOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    GATES: tl.constexpr = 3 if CELL == "gru" else 4
    STATES: tl.constexpr = 1 if CELL == "gru" else (2 if CELL == "lstm" else 4)
    KEPT: tl.constexpr = 4 if CELL == "gru" else (5 if CELL == "lstm" else 7)
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, D)[None, :]
    inside = (row < b) & (channel < d)
    at_state = (row * STATES * h + head) * d + channel
    hd = h * d

    w0, w1, w2, w3 = 0, 0, 0, 0
    if HOLD:
        w0 = _weights(recurrent, head, 0, d, GATES, D)
        w1 = _weights(recurrent, head, 1, d, GATES, D)
        w2 = _weights(recurrent, head, 2, d, GATES, D)
        if GATES == 4:
            w3 = _weights(recurrent, head, 3, d, GATES, D)

    first_h = tl.load(state + at_state, mask=inside, other=0.0)
    g_h = tl.load(grad_end + at_state, mask=inside, other=0.0)
    if STATES > 1:
        first_c = tl.load(state + at_state + hd, mask=inside, other=0.0)
        g_c = tl.load(grad_end + at_state + hd, mask=inside, other=0.0)
    if STATES > 2:
        first_n = tl.load(state + at_state + 2 * hd, mask=inside, other=0.0)
        g_n = tl.load(grad_end + at_state + 2 * hd, mask=inside, other=0.0)

    for step in tl.range(0, t, num_stages=2 if HOLD else 1):
        token = t - 1 - step
        cell = (row * t + token) * h + head
        at_kept = cell * KEPT * d + channel
        at_x = cell * GATES * d + channel
        kept0, kept1, kept2, kept3 = _load_tiles(kept + at_kept, d, inside, 4)
        g_h += tl.load(grad_y + cell * d + channel, mask=inside, other=0.0)
        is_first = tl.full([ROWS, 1], token, tl.int32) == 0
        anew = row < 0
        if starts is not None:
            anew = _flags(starts, row, token, b, t)
        real = row < b
        if mask is not None:
            real = _flags(mask, row, token, b, t)

        if CELL == "lstm":
            c = tl.load(kept + at_kept + 4 * d, mask=inside, other=0.0)
            c_before = _before(first_c, kept, at_kept + 4 * d, hd * KEPT, is_first, anew, inside)
            bounded = _tanh(c)
            total = g_c + g_h * kept3 * (1 - bounded * bounded)
            g0 = tl.where(real, total * kept2 * kept0 * (1 - kept0), 0.0)
            g1 = tl.where(real, total * c_before * kept1 * (1 - kept1), 0.0)
            g2 = tl.where(real, total * kept0 * (1 - kept2 * kept2), 0.0)
            g3 = tl.where(real, g_h * bounded * kept3 * (1 - kept3), 0.0)
            g_c = tl.where(real, total * kept1, g_c)
            g_h = tl.where(real, 0.0, g_h)
        elif CELL == "gru":
            h_before = _before(first_h, y, cell * d + channel, hd, is_first, anew, inside)
            g2 = tl.where(real, g_h * (1 - kept1) * (1 - kept2 * kept2), 0.0)
            g0 = g2 * kept3 * kept0 * (1 - kept0)
            g1 = tl.where(real, g_h * (h_before - kept2) * kept1 * (1 - kept1), 0.0)
            g_h = tl.where(real, g_h * kept1, g_h)
            _store_tiles(grad_x + at_x, d, inside, (g0, g1, g2))
            g2 *= kept0
            _store_tiles(grad_gates + at_x, d, inside, (g0, g1, g2))
        else:
            slope = tl.load(kept + at_kept + 4 * d, mask=inside, other=0.0)
            c = tl.load(kept + at_kept + 5 * d, mask=inside, other=0.0)
            n = tl.load(kept + at_kept + 6 * d, mask=inside, other=1.0)
            c_before = _before(first_c, kept, at_kept + 5 * d, hd * KEPT, is_first, anew, inside)
            n_before = _before(first_n, kept, at_kept + 6 * d, hd * KEPT, is_first, anew, inside)
            inverse = 1 / tl.where(real, n, 1.0)
            average = c * inverse
            total_c = g_c + g_h * kept3 * inverse
            total_n = g_n - g_h * kept3 * average * inverse
            g0 = tl.where(real, (total_c * kept2 + total_n) * kept0, 0.0)
            g1 = tl.where(real, (total_c * c_before + total_n * n_before) * kept1 * slope, 0.0)
            g2 = tl.where(real, total_c * kept0 * (1 - kept2 * kept2), 0.0)
            g3 = tl.where(real, g_h * average * kept3 * (1 - kept3), 0.0)
            g_c = tl.where(real, total_c * kept1, g_c)
            g_n = tl.where(real, total_n * kept1, g_n)
            g_h = tl.where(real, 0.0, g_h)

        g_h += _to_h(g0, w0, recurrent, head, 0, d, GATES, HOLD, PRECISION, D)
        g_h += _to_h(g1, w1, recurrent, head, 1, d, GATES, HOLD, PRECISION, D)
        g_h += _to_h(g2, w2, recurrent, head, 2, d, GATES, HOLD, PRECISION, D)
        if GATES == 4:
            _store_tiles(grad_x + at_x, d, inside, (g0, g1, g2, g3))
            g_h += _to_h(g3, w3, recurrent, head, 3, d, GATES, HOLD, PRECISION, D)
        if starts is not None:
            g_h = tl.where(anew, 0.0, g_h)
            if STATES > 1:
                g_c = tl.where(anew, 0.0, g_c)
            if STATES > 2:
                g_n = tl.where(anew, 0.0, g_n)

    tl.store(grad_state + at_state, g_h, mask=inside)
    if STATES > 1:
        tl.store(grad_state + at_state + hd, g_c, mask=inside)
    if STATES > 2:
        tl.store(grad_state + at_state + 2 * hd, g_n, mask=inside)
        tl.store(grad_state + at_state + 3 * hd, tl.zeros_like(g_n), mask=inside)
