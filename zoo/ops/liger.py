"""Fused kernels that are not ours: RMS norm, SwiGLU and cross entropy of Liger-Kernel, on GPUs where it is installed.

https://github.com/linkedin/Liger-Kernel (Hsu et al., 2024, arXiv:2410.10989): `pip install 'sequence-zoo[gpu]'`. A
compiler fuses the first two itself, so inside `torch.compile` they stay PyTorch's.
"""

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from zoo.ops.dispatch import Choice, requested

LIGER_OPS = ("rms_norm", "swiglu")
"""Those that modules of a model run; the cross entropy belongs to training."""


def choose_liger(device: torch.device | str, kernels: str = "auto") -> Choice:
    """`liger` or `torch` for tensors on a device, and why; `kernels` is what the caller asks for, as of any op."""
    if torch.device(device).type != "cuda":
        return Choice("torch", f"Liger-Kernel runs on a GPU, not on {torch.device(device).type}")
    if (form := requested(kernels)) in ("reference", "chunked"):
        return Choice("torch", f"{form!r} was asked for")
    if not _is_installed():
        return Choice("torch", "Liger-Kernel is not installed")
    return Choice("liger", "installed")


def rms_norm(x: Tensor, weight: Tensor, eps: float, kernels: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension d of x (... d), weight (d)."""
    if _goes_to_liger(x, kernels):
        return _functional().liger_rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(gate: Tensor, up: Tensor, kernels: str = "auto") -> Tensor:
    """silu(gate) * up, both (... d)."""
    if _goes_to_liger(gate, kernels):
        return _functional().liger_swiglu(gate, up)
    return F.silu(gate) * up


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, z_loss: float
) -> Tensor:
    """`zoo.ops.linear_cross_entropy` on a GPU: hidden (n d), weight (v d), bias (v), labels (n) -> the total."""
    return _functional().liger_fused_linear_cross_entropy(
        *(hidden, weight, labels, bias),
        ignore_index=ignore_index,
        lse_square_scale=z_loss,
        reduction="sum",
        accum_dtype=torch.float32,
    )


def _goes_to_liger(x: Tensor, kernels: str) -> bool:
    if torch.compiler.is_compiling() or isinstance(x, DTensor):
        return False
    return choose_liger(x.device, kernels).backend == "liger"


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _functional() -> ModuleType:
    return importlib.import_module("liger_kernel.transformers.functional")
