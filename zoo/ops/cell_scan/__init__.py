"""Cell scan: recurrent cells whose gates look at the last output, so that each token waits for the one before it.

Every head has its own recurrent weights: with one head this is the classical cell, with several the block-diagonal one
of xLSTM. `x` holds what the gates get from the input, computed for all tokens at once.

    lstm    LSTM (Hochreiter & Schmidhuber, 1997, with the forget gate of Gers et al., 2000), as in torch.nn.LSTM
    gru     GRU (Cho et al., 2014, arXiv:1406.1078), as in torch.nn.GRU: the reset gate acts behind the product
    slstm   sLSTM (Beck et al., 2024, arXiv:2405.04517, eq. 8-17), exponential input gate, sigmoid forget gate
"""

import torch
from torch import Tensor

from zoo.errors import unknown_name
from zoo.ops.cell_scan.chunked import cell_scan_chunked
from zoo.ops.cell_scan.reference import CELLS, cell_scan_reference
from zoo.ops.checks import check_shapes
from zoo.ops.op import Op
from zoo.ops.packing import fill_padding, segment_starts


def _empty_outputs(
    x: Tensor,
    recurrent: Tensor,
    bias: Tensor | None,
    state: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    cell: str,
) -> tuple[Tensor, Tensor]:
    if cell not in CELLS:
        raise unknown_name("cell", cell, CELLS)
    shapes = {
        "recurrent": "h d gd",
        "x": "b t h gd",
        "bias": "h gd",
        "state": "b s h d",
        "mask": "b t",
        "starts": "b t",
    }
    tensors = {"recurrent": recurrent, "x": x, "bias": bias, "state": state, "mask": mask, "starts": starts}
    sizes = check_shapes("cell_scan", shapes, **tensors)
    if sizes["gd"] != CELLS[cell].gates * sizes["d"]:
        gates = CELLS[cell].gates
        raise ValueError(f"cell_scan: {cell} has {gates} gates of width {sizes['d']}, x is {sizes['gd']} wide")
    if sizes["s"] != CELLS[cell].states:
        raise ValueError(f"cell_scan: the state of {cell} has {CELLS[cell].states} tensors, got {sizes['s']}")
    b, t = x.shape[:2]
    return state.new_empty(b, t, *state.shape[2:]), state.new_empty(state.shape)


LARGEST_TRITON_HEAD = 128  # channels: the product of more does not fit a program

OP = Op(
    "cell_scan",
    _empty_outputs,
    reference=cell_scan_reference,
    chunked=cell_scan_chunked,
    kernels=("native", "triton"),
    backward_reads_outputs=True,
)


def cell_scan(
    cell: str,
    x: Tensor,
    recurrent: Tensor,
    bias: Tensor | None,
    state: tuple[Tensor, ...],
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    kernels: str = "auto",
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a cell over a batch of sequences; differentiable in `x`, `recurrent`, `bias` and `state`.

    The running maximum m of the sLSTM is a gauge, it changes no output: no form carries a gradient through it.

    Args:
        cell: `lstm`, `gru` or `slstm`.
        x: the input's part of the gates, (b t h g*d), gate after gate in each head: i, f, g, o of the LSTM, r, z, n of
            the GRU, i, f, z, o of the sLSTM.
        recurrent: the recurrent weights of each head, (h d g*d), applied as `h @ recurrent`.
        bias: added to the recurrent part, (h g*d); it differs from one added to `x` in the GRU's n alone.
        state: before the first token, (b h d) each, in float32 (float64 where the inputs are): h, c of the LSTM, h of
            the GRU, h, c, n, m of the sLSTM. Zeros start a sequence.
        mask: (b t), False at padding: the state stays as it is there and the output is 0. None: no padding.
        segments: (b t) ids of the documents packed in a row; each starts from a state of zeros, but the row's first,
            which continues `state`. None: one document a row.
        kernels: which form runs (`zoo.ops.dispatch`). The Triton kernel holds heads of at most 128 channels; wider
            ones need `chunked` there.

    Returns:
        h at every token, (b t h d), and the state after the last one, both in the dtype of the state.

    Raises:
        ValueError: if the cell is unknown, the shapes do not agree, or the form asked for cannot run.
    """
    parts = {f"state[{i}]": part for i, part in enumerate(state)}
    shapes = {"recurrent": "h d gd", "x": "b t h gd", "bias": "h gd", **dict.fromkeys(parts, "b h d")}
    check_shapes("cell_scan", shapes, recurrent=recurrent, x=x, bias=bias, **parts)
    (x,) = fill_padding(mask, 0.0, x)
    y, end = OP(
        x, recurrent, bias, torch.stack(state, dim=1), mask, segment_starts(segments, mask, x), cell, kernels=kernels
    )
    end = end.unbind(1)
    if cell == "slstm":
        end = *end[:3], end[3].detach()
    return *fill_padding(mask, 0.0, y), end
