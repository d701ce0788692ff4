"""Short convolution: each channel filtered along the tokens by a few weights of its own, causally.

    y_t = bias + sum_j weight_j x_{t - w + 1 + j}

It stands before the recurrences of Mamba (Gu and Dao, 2023, arXiv:2312.00752), xLSTM, DeltaNet and Titans.
Its state are the last w - 1 inputs.

Letters: b batch, t tokens, d channels, w weights of a channel.
"""

import torch
from torch import Tensor

from zoo.ops.checks import check_shapes
from zoo.ops.op import Op
from zoo.ops.packing import fill_padding, move_padding_behind, reorder, restore_order, segment_starts
from zoo.ops.short_conv.chunked import keep_document, short_conv_chunked
from zoo.ops.short_conv.reference import short_conv_reference

_SHAPES = {"x": "b t d", "weight": "d w", "bias": "d", "state": "b k d", "starts": "b t"}


def _empty_outputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    sizes = check_shapes("short_conv", _SHAPES, x=x, weight=weight, bias=bias, state=state, starts=starts)
    if sizes["k"] != sizes["w"] - 1:
        raise ValueError(
            f"short_conv: state has shape {tuple(state.shape)}, wanted {sizes['w'] - 1} inputs for {sizes['w']} weights"
        )
    return x.new_empty(x.shape), state.new_empty(state.shape)


OP = Op("short_conv", _empty_outputs, reference=short_conv_reference, chunked=short_conv_chunked, kernels=("native",))


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Filter a batch of sequences; differentiable in `x`, `weight`, `bias` and `state`.

    Args:
        x: inputs, (b t d).
        weight: of each channel, (d w), that of the current token last, as in the (d 1 w) of `torch.nn.Conv1d`.
        bias: (d), or None.
        state: the w - 1 inputs before the first token, oldest first, (b w-1 d), in float32 (float64 where the inputs
            are); zeros at the start of a sequence.
        mask: (b t), False at padding: a token sees the real tokens before it, however much padding stands between, and
            the output at padding is 0. None: no padding.
        segments: (b t) ids of the documents packed in a row: what stands before a document reads as 0 in it. The row's
            first continues `state`. None: one document a row.
        kernels: which form runs (`zoo.ops.dispatch`).

    Returns:
        y, (b t d) in the dtype of `x`, and the last w - 1 inputs, (b w-1 d) in the dtype of the state.

    Raises:
        ValueError: if the shapes do not agree, or the form asked for cannot run.
    """
    if mask is None:
        y, end = OP(x, weight, bias, state, segment_starts(segments, None, x), kernels=kernels)
        return y.to(x.dtype), end

    order, lengths = move_padding_behind(mask)
    (aligned,) = fill_padding(mask, 0.0, x)
    aligned = reorder(aligned, order)
    starts = segment_starts(segments, mask, x)
    starts = None if starts is None else reorder(starts, order)
    y, end = OP(aligned, weight, bias, state, starts, kernels=kernels)
    (y,) = fill_padding(mask, 0.0, restore_order(y.to(x.dtype), order))
    inputs = torch.cat([state.to(end.dtype), aligned.to(end.dtype)], dim=1)
    return y, _last_inputs(inputs, state.shape[1], starts, lengths)


def _last_inputs(inputs: Tensor, kept: int, starts: Tensor | None, lengths: Tensor) -> Tensor:
    """The `kept` inputs before place `lengths` (b) of each row, of inputs (b kept+t d) that begin `kept` before it."""
    place = lengths[:, None] + torch.arange(kept, device=inputs.device)
    return keep_document(reorder(inputs, place), starts, lengths - kept)
