"""Selective scan: a diagonal state space model whose step, input and output depend on the token.

    h_t = exp(step_t A) h_{t-1} + step_t x_t B_t        y_t = C_t . h_t

The S6 layer of Mamba (Gu and Dao, 2023, arXiv:2312.00752, algorithm 2), Jamba and Falcon Mamba. A is discretised by its
exponential and B by a step of Euler, as in the authors' code. B and C are shared by the channels.

Letters: b batch, t tokens, d channels, n states of a channel.
"""

# ruff: noqa: N803, N806
# A, B and C are capitals in the field.

from torch import Tensor

from zoo.ops.checks import check_shapes
from zoo.ops.op import Op
from zoo.ops.packing import fill_padding, segment_starts
from zoo.ops.selective_scan.chunked import selective_scan_chunked
from zoo.ops.selective_scan.reference import selective_scan_reference

_SHAPES = {
    "x": "b t d",
    "step": "b t d",
    "A": "d n",
    "B": "b t n",
    "C": "b t n",
    "state": "b d n",
    "starts": "b t",
}


def _empty_outputs(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_shapes("selective_scan", _SHAPES, x=x, step=step, A=A, B=B, C=C, state=state, starts=starts)
    return x.new_empty(x.shape), state.new_empty(state.shape)


OP = Op(
    "selective_scan",
    _empty_outputs,
    reference=selective_scan_reference,
    chunked=selective_scan_chunked,
    kernels=("native", "triton"),
)


def selective_scan(
    x: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a batch of sequences; differentiable in `x`, `step`, `A`, `B`, `C` and `state`.

    The skip connection D x, the softplus of the step and the gate are the caller's.

    Args:
        x: what the channels are given, (b t d).
        step: size of the step of each channel, Delta in the paper, (b t d), >= 0.
        A: rate of change of each state, (d n), <= 0; what is larger lets the state grow, up to infinity.
        B: where in the states a token is written, (b t n).
        C: how the states are read, (b t n).
        state: h before the first token, (b d n), in float32 (float64 where the inputs are).
        mask: (b t), False at padding: the state stays as it is there and the output is 0. None: no padding.
        segments: (b t) ids of the documents packed in a row; each starts from a state of 0, but the row's first, which
            continues `state`. None: one document a row. A NaN or an infinity in one may reach the others, but in C++.
        kernels: which form runs (`zoo.ops.dispatch`).

    Returns:
        y, (b t d) in the dtype of `x`, and h after the last token, (b d n) in the dtype of the state.

    Raises:
        ValueError: if the shapes do not agree, or the form asked for cannot run.
    """
    dtype = x.dtype
    x, step, B, C = fill_padding(mask, 0.0, x, step, B, C)  # a step of 0 keeps the state: exp(0 A) = 1
    y, state = OP(x, step, A, B, C, state, segment_starts(segments, mask, x), kernels=kernels)
    return *fill_padding(mask, 0.0, y.to(dtype)), state
