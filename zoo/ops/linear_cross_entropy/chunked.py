"""Linear cross-entropy over some tokens at a time, gradients and all, so that logits are never kept.

In two forms, which differ in who takes the softmax: PyTorch (`chunked`) or C++ (`native`).

The loss's gradient at the logits, (1 + 2 z_loss normaliser) softmax - one_hot(label), is there as soon as the logits
are; behind a soft cap it is times the slope of that, 1 - tanh^2. The gradients that are wanted are computed from it at
once, as those of the sum, and scaled in the backward.

Letters: n tokens, d features, v words of the vocabulary, c tokens of a chunk.
"""

import torch
from torch import Tensor

from zoo.ops import native
from zoo.ops.linear import linear
from zoo.ops.linear_cross_entropy.labels import check_labels
from zoo.ops.op import compute_dtype
from zoo.ops.precision import autocast_dtype

# Memory for the logits of a chunk: 250 tokens and 32,000 words on a CPU; a GPU wants larger products.
CHUNK_BYTES = {"cpu": 32 << 20}
CHUNK_BYTES_ELSEWHERE = 256 << 20


def linear_cross_entropy_chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    z_loss: float,
    soft_cap: float | None,
    form: str = "chunked",
) -> Tensor:
    """hidden (n d), weight (v d), bias (v), labels (n) -> the sum of the tokens' losses."""
    dtype = autocast_dtype(hidden.device.type) or torch.promote_types(hidden.dtype, weight.dtype)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    total, *_ = _operator(hidden, weight, bias, labels, ignore_index, z_loss, soft_cap, wanted, form)
    return total


@torch.library.custom_op("zoo::linear_cross_entropy", mutates_args=())
def _operator(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    z_loss: float,
    soft_cap: float | None,
    wanted: list[bool],
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The total and the gradients of hidden, weight and bias, those that are `wanted`; the others are empty."""
    v = len(weight)
    check_labels(labels, ignore_index, v)
    total, of_hidden, of_weight, of_bias = (x.zero_() for x in _empty_outputs(hidden, weight, bias, wanted))
    dtype = total.dtype
    of_weight, of_bias = of_weight.to(dtype), of_bias.to(dtype)  # sums over all chunks
    counted = (labels != ignore_index).nonzero().squeeze(1)
    chunk = max(1, CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES_ELSEWHERE) // (v * dtype.itemsize))
    for tokens in counted.split(chunk):
        x, label = hidden[tokens], labels[tokens, None]
        logits = linear(x, weight).to(dtype)  # c v
        if bias is not None:
            logits += bias
        if soft_cap is not None:
            tanh = logits.div_(soft_cap).tanh_()
            logits = soft_cap * tanh
        at_label = logits.gather(1, label)
        probability, normaliser = _SOFTMAX[form](logits)
        total += (normaliser - at_label + z_loss * normaliser.square()).sum()
        if not any(wanted):
            continue
        gradient = probability.mul_(1 + 2 * z_loss * normaliser) if z_loss else probability
        gradient.scatter_add_(1, label, gradient.new_full(label.shape, -1.0))
        if soft_cap is not None:
            gradient = torch.ops.aten.tanh_backward(gradient, tanh)
        if wanted[2]:
            of_bias += gradient.sum(dim=0)
        gradient = gradient.to(x.dtype)
        if wanted[0]:
            of_hidden[tokens] = linear(gradient, weight.t())
        if wanted[1]:
            of_weight += linear(gradient.t(), x.t())
    return total, of_hidden, of_weight.to(weight.dtype), of_bias.to(weight.dtype)


@_operator.register_fake
def _(hidden, weight, bias, labels, ignore_index, z_loss, soft_cap, wanted, form):
    return _empty_outputs(hidden, weight, bias, wanted)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of logits (c v), which it writes over them, and its log-normaliser, (c 1)."""
    shift = logits.amax(dim=1, keepdim=True)
    norm = logits.sub_(shift).exp_().sum(dim=1, keepdim=True)
    return logits.div_(norm), shift + norm.log()


def _softmax_in_cpp(logits: Tensor) -> tuple[Tensor, Tensor]:
    normaliser = logits.new_empty(len(logits), 1)
    native.call("linear_cross_entropy", "softmax", logits.dtype, *logits.shape, logits, normaliser)
    return logits, normaliser


_SOFTMAX = {"chunked": _softmax, "native": _softmax_in_cpp}


def _empty_outputs(hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]) -> tuple[Tensor, ...]:
    gradients = (
        x.new_empty(x.shape if want else 0) if x is not None else hidden.new_empty(0)
        for x, want in zip((hidden, weight, bias), wanted, strict=True)
    )
    return hidden.new_empty((), dtype=compute_dtype(hidden, weight)), *gradients


def _setup_context(ctx, inputs, output):
    *_, ctx.wanted, _ = inputs
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, gradient, *_):
    if gradient is None:
        return (None,) * 9
    of_hidden, of_weight, of_bias = (
        x if want else None for x, want in zip(_scale(gradient, ctx.saved_tensors), ctx.wanted, strict=True)
    )
    return of_hidden, of_weight, of_bias, *[None] * 6


_operator.register_autograd(_differentiate, setup_context=_setup_context)


@torch.library.custom_op("zoo::linear_cross_entropy_backward", mutates_args=())
def _scale(gradient: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    """An operator that has no derivative: a second one is refused, instead of found to be 0."""
    return [x * gradient for x in gradients]


@_scale.register_fake
def _(gradient, gradients):
    return [torch.empty_like(x) for x in gradients]
