"""Linear scan: every channel its own first-order recurrence.

    h_t = a_t h_{t-1} + b_t

The RG-LRU of Griffin (De et al., 2024, arXiv:2402.19427, eq. 4), the LRU (Orvieto et al., 2023, arXiv:2303.06349; a
and b complex), S5, HGRN, minGRU and minLSTM.
"""

from torch import Tensor

from zoo.ops.checks import check_shapes
from zoo.ops.linear_scan.chunked import linear_scan_chunked
from zoo.ops.linear_scan.reference import linear_scan_reference
from zoo.ops.op import Op
from zoo.ops.packing import fill_padding, segment_starts


def _empty_outputs(a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    check_shapes("linear_scan", {"a": "b t d", "b": "b t d", "state": "b d"}, a=a, b=b, state=state)
    return state.new_empty(b.shape), state.new_empty(state.shape)


OP = Op(
    "linear_scan",
    _empty_outputs,
    reference=linear_scan_reference,
    chunked=linear_scan_chunked,
    kernels=("native", "triton"),
    backward_reads_outputs=True,
    takes_complex=True,
)


def linear_scan(
    a: Tensor,
    b: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a batch of sequences; differentiable in `a`, `b` and `state`.

    Args:
        a: what is kept of the channel's state at each token, (b t d), real or complex.
        b: what is added to it, (b t d).
        state: h before the first token, (b d), in float32 (float64, complex64, ... where the inputs are).
        mask: (b t), False at padding: the state stays as it is there and the output is 0. None: no padding.
        segments: (b t) ids of the documents packed in a row; each starts from a state of 0, but the row's first, which
            continues `state`. None: one document a row. A NaN or an infinity in one may reach the others.
        kernels: which form runs (`zoo.ops.dispatch`).

    Returns:
        h at every token, (b t d), and after the last one, (b d), both in the dtype of the state.

    Raises:
        ValueError: if the shapes do not agree, or the form asked for cannot run.
    """
    (a,), (b,) = fill_padding(mask, 1.0, a), fill_padding(mask, 0.0, b)
    starts = segment_starts(segments, mask, b)
    if starts is not None:
        a = a.masked_fill(starts[..., None], 0.0)
    if any(x.is_complex() for x in (a, b, state)):
        a, b, state = (x.to(x.dtype.to_complex()) if x.is_floating_point() else x for x in (a, b, state))
    h, state = OP(a, b, state, kernels=kernels)
    return *fill_padding(mask, 0.0, h), state
