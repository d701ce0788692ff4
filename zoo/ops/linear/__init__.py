"""Linear layers on CPUs, in float32, where PyTorch's own products are slow.

For many tokens: PyTorch multiplies with MKL, which on AMD's processors with AVX-512 uses half of the vector width.
There oneDNN, which PyTorch carries for lower precisions, is about twice as fast.

For a single token, without a gradient: all that counts is how fast the weights are read, and C++ (`native.cpp`) reads
them two to three times as fast as PyTorch's product.

Everywhere else, and for small layers, the product is PyTorch's.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops import native
from zoo.ops.checks import is_plain_cpu_call
from zoo.ops.dispatch import Choice, requested

_LEAST_PRODUCT = 2**21
"""Multiplications that make up for oneDNN's preparations."""

_LEAST_ROW = 2**14
"""Weights that make up for a call of C++."""


def choose_linear(device: torch.device | str, dtype: torch.dtype = torch.float32) -> Choice:
    """`onednn` or `torch` for linear layers of many tokens on a device, and why."""
    if torch.device(device).type != "cpu":
        return Choice("torch", f"oneDNN runs on a CPU, not on {torch.device(device).type}")
    if dtype != torch.float32:
        return Choice("torch", f"PyTorch chooses well in {str(dtype).removeprefix('torch.')}")
    if (form := requested()) in ("reference", "chunked", "triton"):
        return Choice("torch", f"{form!r} was asked for")
    if not _outruns_mkl():
        return Choice("torch", "PyTorch's own product is as fast on this processor")
    return Choice("onednn", "twice as fast as MKL on this processor")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, for x (... d), weight (e d), bias (e): `torch.nn.functional.linear`."""
    is_row = x.numel() == weight.shape[1]
    if is_row and _goes_to_native(x, weight, bias):
        return _multiply_row(x, weight, bias)
    if not is_row and _goes_to_onednn(x, weight, bias):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def _multiply_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    native.call(*("linear", "linear_row", torch.float32), *weight.shape, x.contiguous(), weight, bias, y)
    return y


class _Linear(torch.autograd.Function):
    """Three products; those of the backward pass are linear layers again, and so differentiable."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(_dense(x), _dense(weight), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = linear(rows.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product by oneDNN, which copies an x that lies column by column: the other way round where that copies less.

    Such are the gradients of weights, x those of the outputs; of a head with a large vocabulary it is half of the time.
    """
    if x.dim() == 2 and not x.is_contiguous():
        copied = len(x) * len(weight) + (0 if weight.is_contiguous() else weight.numel())
        if bias is None and copied < x.numel():
            return _lay_out(torch.ops.mkldnn._linear_pointwise(weight, x, None, "none", [], "").t())
        x = _lay_out(x)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _lay_out(x: Tensor) -> Tensor:
    """A matrix that lies column by column, row by row: PyTorch takes four times as long as C++."""
    if native.obstacle("linear") is not None:
        return x.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    native.call("linear", "linear_transpose", torch.float32, *x.t().shape, x.t(), y)
    return y


def _dense(x: Tensor) -> Tensor:
    """A tensor without gaps, row by row or column by column: of others oneDNN makes ten times the work."""
    return x if x.is_contiguous() or (x.dim() == 2 and x.t().is_contiguous()) else x.contiguous()


def _goes_to_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.numel() * weight.shape[0] >= _LEAST_PRODUCT
        and x.dim() >= 2
        and is_plain_cpu_call((x, weight, bias), torch.float32)
        and choose_linear(x.device).backend == "onednn"
    )


def _goes_to_native(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        weight.numel() >= _LEAST_ROW
        and weight.is_contiguous()
        and is_plain_cpu_call((x, weight, bias), torch.float32)
        and not (torch.is_grad_enabled() and any(y.requires_grad for y in (x, weight, bias) if y is not None))
        and requested() in ("auto", "require", "native")
        and native.obstacle("linear") is None
    )


@functools.cache
def _outruns_mkl() -> bool:
    """Whether this is one of AMD's processors with AVX-512, and PyTorch has both libraries."""
    info = Path("/proc/cpuinfo")
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and "AVX512" in torch.backends.cpu.get_cpu_capability()
        and info.is_file()
        and "AuthenticAMD" in info.read_text()
    )
