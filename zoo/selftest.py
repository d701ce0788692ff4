"""Prove the kernels where they will run: every op and form on a device, against the reference in float64.

zoo selftest                  # the CPU
zoo selftest --device cuda    # the GPU, in float32 and bfloat16
"""

import importlib
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

from zoo.ops.dispatch import KERNEL_FOR, choose
from zoo.ops.testing import TOLERANCE, Draw, op_names, worst_error

LENGTHS = (1, 65, 200)
ROWS = 3


class Verdict(NamedTuple):
    """What a form of an op was found to be worth on a device."""

    op: str
    case: str
    backend: str
    dtype: str
    error: float
    """Largest difference from the reference in float64, relative to the largest entry; NaN where it did not run."""
    tolerance: float
    verdict: str
    """`ok`, `wrong`, `failed: ...` with the error, or `not run: ...` with the reason."""

    @property
    def passed(self) -> bool:
        return not self.verdict.startswith(("wrong", "failed"))


def selftest(device: torch.device | str = "cpu", ops: list[str] | None = None) -> Iterator[Verdict]:
    """Run every case of every op (or of those named) in every form for a device; a row for each, as it is known.

    Outputs, final state and gradients are compared, at lengths 1, 65 and 200, with and without padding and packed
    documents. Float32 everywhere; bfloat16 inputs too on a GPU.
    """
    device = torch.device(device)
    for op in ops or op_names():
        forms = importlib.import_module(f"zoo.ops.{op}").OP.forms
        for case in importlib.import_module(f"zoo.ops.{op}.cases").CASES:
            for form in ("chunked", KERNEL_FOR.get(device.type)):
                if form not in forms:
                    continue
                for dtype in (torch.float32,) if device.type == "cpu" else (torch.float32, torch.bfloat16):
                    error, verdict = _judge(op, forms, case, form, dtype, device)
                    name = str(dtype).removeprefix("torch.")
                    yield Verdict(op, case.name, form, name, error, TOLERANCE[dtype], verdict)


def _judge(op, forms, case, form, dtype, device) -> tuple[float, str]:
    try:
        choose(op, forms, device, kernels=form)
    except ValueError as error:
        return float("nan"), f"not run: {str(error).split(': ', 1)[-1]}"
    worst = 0.0
    try:
        for t in LENGTHS:
            draw = Draw(t)
            packing = {"mask": draw.mask(ROWS, t), "segments": draw.segments(ROWS, t)}
            for arguments in ({}, packing):
                errors = worst_error(case, case.draw(Draw(t), t), form, dtype, device, **arguments)
                worst = max(worst, *errors.values())
    except Exception as error:  # whatever a compiler or a driver raises is the finding
        text = " ".join(str(error).split()) or type(error).__name__
        return float("nan"), f"failed: {type(error).__name__}: {text[:200]}"
    return worst, "ok" if worst <= TOLERANCE[dtype] else "wrong"


def describe_environment(device: torch.device | str = "cpu") -> str:
    """The device and the versions that a result holds for, in one line."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = ", ".join(f"{package} {_version(package)}" for package in ("sequence-zoo", "torch", "triton"))
    return f"{device.type} ({name}), Python {platform.python_version()}, {versions}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
