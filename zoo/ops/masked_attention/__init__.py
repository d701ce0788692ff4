"""Softmax attention under a mask that is no plain triangle: C++ (`native.cpp`) on CPUs, PyTorch's SDPA elsewhere.

PyTorch computes all scores, those that nobody sees too, and in products that are slow on AMD's processors
(`zoo.ops.linear`).

Letters: b batch, t queries, s keys, h heads of queries, g groups of them, each with keys and values, d width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.ops import native
from zoo.ops.checks import check_shapes, is_plain_cpu_call, once_per_look
from zoo.ops.dispatch import Choice, choose_native
from zoo.ops.op import differentiable_gradients

_DTYPES = (torch.float32, torch.float64)

_LEAST_QUERIES = 8
"""Queries that make up for keys being laid out for the kernel."""


def choose_masked_attention(
    device: torch.device | str, dtype: torch.dtype = torch.float32, kernels: str = "auto"
) -> Choice:
    """`native` or `torch` for tensors on a device, and why; `kernels` is what the caller asks for."""
    if torch.device(device).type != "cpu":
        return Choice("torch", "PyTorch's SDPA")
    return choose_native("masked_attention", dtype, _DTYPES, kernels)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, kernels: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the keys that a query sees; 0 for one that sees none.

    Args:
        q: queries, (b t h d).
        k, v: keys and values, (b s g d), where g divides h.
        visible: whether a query sees a key, (b|1 t s) bool.
        kernels: what the caller asks for (`zoo.ops.dispatch`).

    Returns:
        (b t h d).

    Raises:
        ValueError: if the shapes do not agree.
    """
    _check(q, k, v, visible)
    if q.shape[1] >= _LEAST_QUERIES and _goes_to_native(q, k, v, visible, kernels):
        return _Attention.apply(q, k, v, visible)
    return _attend(q, k, v, visible)


@once_per_look
def _check(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> None:
    shapes = {"q": "b t h d", "k": "b s g d", "v": "b s g d", "visible": "m t s"}
    sizes = check_shapes("masked_attention", shapes, q=q, k=k, v=v, visible=visible)
    if sizes["m"] not in (1, sizes["b"]):
        raise ValueError(f"masked_attention: {sizes['m']} masks for {sizes['b']} rows, wanted one or one each")
    if sizes["h"] % sizes["g"]:
        raise ValueError(f"masked_attention: {sizes['g']} groups do not divide {sizes['h']} heads")


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], enable_gqa=k.shape[1] != q.shape[1])
    return y.transpose(1, 2)


def _goes_to_native(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, kernels: str) -> bool:
    return (
        is_plain_cpu_call((q, k, v), *_DTYPES)
        and is_plain_cpu_call((visible,), torch.bool)
        and q.dtype is k.dtype is v.dtype
        and choose_masked_attention("cpu", q.dtype, kernels).backend == "native"
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        inputs = tuple(x.contiguous() for x in (q, k, v, visible))
        b, t, h, d = q.shape
        y, normaliser = torch.empty_like(inputs[0]), q.new_empty(b, h, t)
        ctx.sizes = len(visible), b, t, k.shape[1], h, k.shape[2], d
        native.call("masked_attention", "attention_forward", q.dtype, *ctx.sizes, *inputs, y, normaliser)
        ctx.save_for_backward(*inputs, y, normaliser)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            with sdpa_kernel(SDPBackend.MATH):  # PyTorch's other forms have no second derivative
                return *differentiable_gradients(lambda *x: _attend(*x, inputs[3]), inputs[:3], grad), None
        found = [torch.empty_like(x) for x in inputs[:3]]
        arguments = (*ctx.sizes, *inputs, grad.contiguous(), *found)
        native.call("masked_attention", "attention_backward", grad.dtype, *arguments)
        return *found, None
