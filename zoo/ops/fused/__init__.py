"""RMS norm, SwiGLU and GeGLU as one kernel each: in C++ (`native.cpp`) on CPUs, of Liger-Kernel on GPUs that have it.
The rotation of the rotary embedding and unit vectors too, in C++ on CPUs, and PyTorch's elsewhere.

PyTorch passes over memory for each of their operations. A compiler fuses them by itself: inside `torch.compile`
they stay PyTorch's, as they do for tensors that a transform or a tracer looks at.
"""

import functools

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from zoo.ops import liger, native
from zoo.ops.checks import is_plain_cpu_call
from zoo.ops.dispatch import Choice, choose_native
from zoo.ops.op import differentiable_gradients

FUSED = ("rms_norm", "swiglu", "geglu")
"""What modules of a model name in their `ops`."""

_DTYPES = (torch.float32, torch.float64)

_LEAST_GATES = 2**12
"""Elements of a gate that make up for a call of C++."""

_LEAST_NORM = 1e-12


def choose_fused(device: torch.device | str, dtype: torch.dtype = torch.float32, kernels: str = "auto") -> Choice:
    """`native`, `liger` or `torch` for tensors on a device, and why; `kernels` is what the caller asks for."""
    if torch.device(device).type != "cpu":
        return liger.choose_liger(device, kernels)
    return choose_native("fused", dtype, _DTYPES, kernels)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, kernels: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension d of x (... d), weight (d); None: of ones."""
    if _goes_to_native((x, weight), kernels):
        if not (torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad))):
            return _forward_rms_norm(x.contiguous(), weight, eps)[0]
        return _RMSNorm.apply(x, weight, eps)
    if weight is not None and _goes_to_liger(x, kernels):
        return liger.rms_norm(x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def normalize(x: Tensor, kernels: str = "auto") -> Tensor:
    """x / max(|x|, 1e-12), the norm over the last dimension of x (... d): `torch.nn.functional.normalize`."""
    if _goes_to_native((x,), kernels):
        return _Normalize.apply(x)
    return F.normalize(x, dim=-1, eps=_LEAST_NORM)


def swiglu(gate: Tensor, up: Tensor, kernels: str = "auto") -> Tensor:
    """silu(gate) * up, both (... d)."""
    return _gated("swiglu", gate, up, kernels)


def geglu(gate: Tensor, up: Tensor, kernels: str = "auto") -> Tensor:
    """gelu(gate) * up, both (... d), with the tanh form of GELU."""
    return _gated("geglu", gate, up, kernels)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor, kernels: str = "auto") -> Tensor:
    """Rotate the leading r features of x (b t h d), i together with i + r/2; cosines and sines are (b|1 t r)."""
    (b, t, _, d), r = x.shape, cos.shape[-1]
    if r % 2:
        raise ValueError(f"rotate_halves: features turn in pairs, and there are {r} cosines of a token")
    fits = cos.shape == sin.shape and cos.shape[:2] in ((1, t), (b, t)) and r <= d
    has_constant_angles = not (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad))
    if fits and has_constant_angles and _goes_to_native((x, cos, sin), kernels):  # PyTorch refuses what does not fit
        return _Rotation.apply(x, cos.contiguous(), sin.contiguous(), False)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1)


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
            return *differentiable_gradients(
                lambda x, w: F.rms_norm(x, x.shape[-1:], w, ctx.eps), (x, weight), grad
            ), None
        found = torch.empty_like(x), None if weight is None else torch.empty_like(weight)
        sizes = len(inverse), x.shape[-1]
        native.call("fused", "rms_norm_backward", x.dtype, *sizes, x, weight, inverse, grad.contiguous(), *found)
        return *found, None


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        d = x.shape[-1]
        y, inverse = torch.empty_like(x), x.new_empty(x.numel() // d)
        native.call("fused", "normalize_forward", x.dtype, len(inverse), d, _LEAST_NORM, x, y, inverse)
        ctx.save_for_backward(x, y, inverse)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor | None:
        x, y, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable_gradients(lambda x: F.normalize(x, dim=-1, eps=_LEAST_NORM), (x,), grad)[0]
        found, sizes = torch.empty_like(y), (len(inverse), y.shape[-1])
        native.call("fused", "normalize_backward", y.dtype, *sizes, _LEAST_NORM, y, inverse, grad.contiguous(), found)
        return found


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
            return None, *differentiable_gradients(lambda gate, up: activation(gate) * up, (gate, up), grad)
        found = torch.empty_like(gate), torch.empty_like(up)
        native.call("fused", f"{ctx.name}_backward", gate.dtype, gate.numel(), gate, up, grad.contiguous(), *found)
        return None, *found


class _Rotation(torch.autograd.Function):
    """Its derivative is the transpose, whose derivative is the rotation."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, is_back: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.is_back = is_back
        x = x.contiguous()
        y, table_batch = torch.empty_like(x), cos[0].numel() if len(cos) > 1 else 0
        name = "rotate_back" if is_back else "rotate"
        native.call("fused", name, x.dtype, *x.shape, cos.shape[-1], table_batch, x, cos, sin, y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Rotation.apply(grad, *ctx.saved_tensors, not ctx.is_back), None, None, None
