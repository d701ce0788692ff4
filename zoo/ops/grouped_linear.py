"""Linear layers of groups of rows, each group with a matrix of its own: the experts of a mixture.

On GPUs, in bfloat16 with rows of whole 16 bytes, it is one `torch.nn.functional.grouped_mm`. Everywhere else it is a
linear layer for each group that has rows: PyTorch's function does the same, but not in float64 nor by `zoo.ops.linear`.
A compiler, which cannot know how many rows there will be, is shown one operator.

Letters: n rows, g groups, d width of a row, e width of a result.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.checks import has_values
from zoo.ops.dispatch import Choice, requested
from zoo.ops.linear import linear
from zoo.ops.precision import autocast_dtype

_ALIGNMENT = 16
"""Bytes that rows must be a multiple of, for PyTorch's grouped product."""


def choose_grouped_linear(device: torch.device | str, dtype: torch.dtype = torch.float32) -> Choice:
    """`grouped_mm` or `loop` on a device, and why."""
    if torch.device(device).type != "cuda":
        return Choice("loop", f"PyTorch has a grouped product for GPUs, not for {torch.device(device).type}")
    if dtype != torch.bfloat16:
        return Choice("loop", f"PyTorch's grouped product is for bfloat16, not {str(dtype).removeprefix('torch.')}")
    if (form := requested()) in ("reference", "chunked"):
        return Choice("loop", f"{form!r} was asked for")
    return Choice("grouped_mm", "one product for all groups")


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each group of rows with its matrix, x[ends[i - 1] : ends[i]] weight[i]^T; under autocast in its dtype.

    Args:
        x: rows, those of a group behind each other, (n d).
        weight: a matrix for each group, (g e d).
        ends: where each group ends, (g), integers that do not decrease.

    Returns:
        (n e); rows behind the last group are 0, and so are their gradients.
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is not None and weight.dtype != torch.float64:
        x, weight = x.to(dtype), weight.to(dtype)
    if choose_grouped_linear(x.device, x.dtype).backend == "grouped_mm" and _is_aligned(weight):
        return _multiply_at_once(x, weight, ends)
    return _multiply_each(x, weight, ends) if has_values(x) else _operator(x, weight, ends)


def _is_aligned(weight: Tensor) -> bool:
    return all(size * weight.itemsize % _ALIGNMENT == 0 for size in weight.shape[1:])


def _multiply_at_once(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """PyTorch's product, which leaves rows behind the last group as they are in memory, in the backward pass too."""
    behind = (torch.arange(len(x), device=x.device) >= ends[-1])[:, None]
    y = F.grouped_mm(x.masked_fill(behind, 0.0), weight.mT, offs=ends.to(torch.int32))
    return y.masked_fill(behind, 0.0)


def _multiply_each(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    *groups, rest = x.split(_sizes(ends, len(x)))  # a slice at a time would make a gradient of the whole for each
    y = [linear(rows, matrix) for rows, matrix in zip(groups, weight.unbind(), strict=True) if len(rows)]
    if len(rest) or not y:
        y.append(rest.new_zeros(len(rest), weight.shape[1]))
    return torch.cat(y)


def _sizes(ends: Tensor, n: int) -> list[int]:
    """Rows of each group, and behind the last."""
    return [stop - start for start, stop in pairwise([0, *ends.tolist(), n])]


# -- one operator, for compilers ---------------------------------------------------------------------------------------

_operator = torch.library.custom_op("zoo::grouped_linear", _multiply_each, mutates_args=())


@torch.library.custom_op("zoo::grouped_outer", mutates_args=())
def _outer(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The sum over each group's rows of y (n e) x (n d)^T, (g e d)."""
    groups = list(zip(y.split(_sizes(ends, len(x))), x.split(_sizes(ends, len(x))), strict=True))[:-1]
    return torch.stack([linear(y.t(), x.t()) for y, x in groups])


@_operator.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_outer.register_fake
def _(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], y.shape[1], x.shape[1])


def _save(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ends = ctx.saved_tensors
    grad_x = _operator(grad, weight.mT, ends) if ctx.needs_input_grad[0] else None
    return grad_x, _outer(grad, x, ends) if ctx.needs_input_grad[1] else None, None


_operator.register_autograd(_differentiate, setup_context=_save)
