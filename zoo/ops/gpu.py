"""Launching Triton kernels, and recording the launches instead, to compile them for GPUs that are not there."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.dispatch import gpu_target


class Launch(NamedTuple):
    """A launch that was recorded: enough to compile the kernel as it would have been."""

    kernel: Any
    arguments: tuple[Tensor | int | float | None, ...]
    constants: dict[str, Any]
    warps: int
    stages: int


class _Recording:
    target: str | None = None
    launches: list[Launch]


_recording = _Recording()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Tensor | int | float | None,
    warps: int = 4,
    stages: int = 2,
    **constants: Any,
) -> None:
    """Run a Triton kernel over a grid.

    Args:
        kernel: the `@triton.jit` function.
        grid: how many programs, in up to three dimensions; the first may be large, the others at most 65535.
        arguments: its tensors and numbers, in order; None for a tensor that is absent.
        warps, stages: how many warps a program has, and how deep its loops are pipelined.
        constants: its `tl.constexpr` parameters.
    """
    if _recording.target is not None:
        _recording.launches.append(Launch(kernel, arguments, constants, warps, stages))
        return
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages)


def target() -> str:
    """The architecture that launches are for: `sm_90`, `gfx942`, ...; `cpu` where Triton is interpreted."""
    if _recording.target is not None:
        return _recording.target
    return gpu_target() if torch.cuda.is_available() else "cpu"


@contextmanager
def record_launches(for_target: str) -> Iterator[list[Launch]]:
    """Inside, kernels are not run: their launches, as they would be on the given architecture, go into the list."""
    _recording.target, _recording.launches = for_target, []
    try:
        yield _recording.launches
    finally:
        _recording.target = None


def on_nvidia() -> bool:
    """Whether launches are for a GPU of NVIDIA, whose registers and tensor cores differ from AMD's."""
    return target().startswith("sm_")


def dot_precision() -> str:
    """The `input_precision` of a `tl.dot` of float32: as three of TF32 on NVIDIA's tensor cores, elsewhere as it is."""
    return "tf32x3" if on_nvidia() else "ieee"


def next_power_of_2(n: int) -> int:
    """Tiles of Triton have sizes that are powers of two."""
    return 1 << max(0, n - 1).bit_length()
