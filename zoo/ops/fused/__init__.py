"""RMS norm, SwiGLU and GeGLU as one kernel each: in C++ (`native.cpp`) on CPUs, of Liger-Kernel on GPUs that have it.

PyTorch passes over memory for each of their operations. A compiler fuses them by itself: inside `torch.compile`
they stay PyTorch's, as they do for tensors that a transform or a tracer looks at.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from zoo.ops import liger, native
from zoo.ops.checks import is_plain_cpu_call
from zoo.ops.dispatch import Choice, requested

FUSED = ("rms_norm", "swiglu", "geglu")
"""What modules of a model name in their `ops`."""

_DTYPES = (torch.float32, torch.float64)

_LEAST_GATES = 2**12
"""Elements of a gate that make up for a call of C++."""


def choose_fused(device: torch.device | str, dtype: torch.dtype = torch.float32, kernels: str = "auto") -> Choice:
    """`native`, `liger` or `torch` for tensors on a device, and why; `kernels` is what the caller asks for."""
    if torch.device(device).type != "cpu":
        return liger.choose_liger(device, kernels)
    if (form := requested(kernels)) not in ("auto", "require", "native"):
        return Choice("torch", f"{form!r} was asked for")
    if dtype not in _DTYPES:
        return Choice("torch", f"no C++ for {str(dtype).removeprefix('torch.')}")
    if obstacle := native.obstacle("fused"):
        return Choice("torch", obstacle)
    return Choice("native", "the kernel for cpu")


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, kernels: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension d of x (... d), weight (d); None: of ones."""
    if _goes_to_native((x, weight), kernels):
        if not (torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad))):
            return _forward_rms_norm(x.contiguous(), weight, eps)[0]
        return _RMSNorm.apply(x, weight, eps)
    if weight is not None and _goes_to_liger(x, kernels):
        return liger.rms_norm(x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def swiglu(gate: Tensor, up: Tensor, kernels: str = "auto") -> Tensor:
    """silu(gate) * up, both (... d)."""
    return _gated("swiglu", gate, up, kernels)


def geglu(gate: Tensor, up: Tensor, kernels: str = "auto") -> Tensor:
    """gelu(gate) * up, both (... d), with the tanh form of GELU."""
    return _gated("geglu", gate, up, kernels)


_ACTIVATIONS = {"swiglu": F.silu, "geglu": functools.partial(F.gelu, approximate="tanh")}


def _gated(name: str, gate: Tensor, up: Tensor, kernels: str) -> Tensor:
    if gate.numel() >= _LEAST_GATES and gate.shape == up.shape and _goes_to_native((gate, up), kernels):
        return _Gated.apply(name, gate, up)
    if _goes_to_liger(gate, kernels):
        return liger.gated(name, gate, up)
    return _ACTIVATIONS[name](gate) * up


def _goes_to_native(tensors: tuple[Tensor | None, ...], kernels: str) -> bool:
    dtype = tensors[0].dtype
    return (
        is_plain_cpu_call(tensors, *_DTYPES)
        and all(x is None or x.dtype is dtype for x in tensors)
        and choose_fused("cpu", dtype, kernels).backend == "native"
    )


def _goes_to_liger(x: Tensor, kernels: str) -> bool:
    if torch.compiler.is_compiling() or isinstance(x, DTensor):
        return False
    return choose_fused(x.device, x.dtype, kernels).backend == "liger"


def _forward_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    d = x.shape[-1]
    rows = x.numel() // d
    y, inverse = torch.empty_like(x), x.new_empty(rows)
    native.call("fused", "rms_norm_forward", x.dtype, rows, d, x, weight, float(eps), y, inverse)
    return y, inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        x = x.contiguous()
        y, inverse = _forward_rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable(lambda x, w: F.rms_norm(x, x.shape[-1:], w, ctx.eps), (x, weight), grad), None
        found = torch.empty_like(x), None if weight is None else torch.empty_like(weight)
        sizes = len(inverse), x.shape[-1]
        native.call("fused", "rms_norm_backward", x.dtype, *sizes, x, weight, inverse, grad.contiguous(), *found)
        return *found, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name: str, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.name = name
        y = torch.empty_like(gate)
        native.call("fused", f"{name}_forward", gate.dtype, gate.numel(), gate, up, y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            activation = _ACTIVATIONS[ctx.name]
            return None, *_differentiable(lambda gate, up: activation(gate) * up, (gate, up), grad)
        found = torch.empty_like(gate), torch.empty_like(up)
        native.call("fused", f"{ctx.name}_backward", gate.dtype, gate.numel(), gate, up, grad.contiguous(), *found)
        return None, *found


def _differentiable(
    function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of a function in a form that can be differentiated once more: through PyTorch."""
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)
