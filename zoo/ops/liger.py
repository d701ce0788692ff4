"""Fused kernels that are not ours: norm, gates and cross entropy of Liger-Kernel, on GPUs where it is installed.

https://github.com/linkedin/Liger-Kernel (Hsu et al., 2024, arXiv:2410.10989): `pip install 'sequence-zoo[gpu]'`.
"""

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from zoo.ops.dispatch import Choice, requested


def choose_liger(device: torch.device | str, kernels: str = "auto") -> Choice:
    """`liger` or `torch` for tensors on a device, and why; `kernels` is what the caller asks for, as of any op."""
    if torch.device(device).type != "cuda":
        return Choice("torch", f"Liger-Kernel runs on a GPU, not on {torch.device(device).type}")
    if (form := requested(kernels)) in ("reference", "chunked"):
        return Choice("torch", f"{form!r} was asked for")
    if not _is_installed():
        return Choice("torch", "Liger-Kernel is not installed")
    return Choice("liger", "installed")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`zoo.ops.fused.rms_norm` on a GPU."""
    return _functional().liger_rms_norm(x, weight, eps)


def gated(name: str, gate: Tensor, up: Tensor) -> Tensor:
    """`zoo.ops.fused.swiglu` or `geglu`, by name, on a GPU."""
    return getattr(_functional(), f"liger_{name}")(gate, up)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    z_loss: float,
    soft_cap: float | None,
) -> Tensor:
    """`zoo.ops.linear_cross_entropy` on a GPU: hidden (n d), weight (v d), bias (v), labels (n) -> the total."""
    return _functional().liger_fused_linear_cross_entropy(
        *(hidden, weight, labels, bias),
        ignore_index=ignore_index,
        lse_square_scale=z_loss,
        softcap=soft_cap,
        reduction="sum",
        accum_dtype=torch.float32,
    )


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _functional() -> ModuleType:
    return importlib.import_module("liger_kernel.transformers.functional")
