"""Which form of an op runs: the choice has a name and a reason, and is never changed silently.

    reference   the equation, one step after the other, in PyTorch
    chunked     PyTorch in large products: any device
    native      C++, built on first use: CPUs
    triton      Triton: GPUs (and CPUs under TRITON_INTERPRET=1, to test it)

`auto` takes the fastest that runs on the device; where that is not the one meant for the device, `kernel_report` says
why. `require` takes the one meant for the device or raises. `ZOO_KERNELS=chunked` in the environment, or
`use_backend("chunked")` around a call, asks for one form by name: an op that lacks it, or cannot run it there, raises.
"""

import csv
import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from zoo.errors import unknown_name
from zoo.layout import shelf
from zoo.ops import native

FORMS = ("reference", "chunked", "native", "triton")
NAMES = ("auto", "require", *FORMS)

KERNEL_FOR = {"cpu": "native", "cuda": "triton"}
"""By type of device, the form made for it."""


class Choice(NamedTuple):
    """One form of an op, and why it was taken."""

    backend: str
    reason: str


def _checked(name: str) -> str:
    if name not in NAMES:
        raise unknown_name("kernel backend", name, NAMES)
    return name


_requested = os.environ.get("ZOO_KERNELS") or "auto"  # checked where it is used: importing the zoo shall not fail


def requested(kernels: str = "auto") -> str:
    """What `use_backend` asks for, or else the environment, or else the caller: a name in `NAMES`.

    Raises:
        ValueError: if that is an unknown name.
    """
    return _checked(kernels) if _checked(_requested) == "auto" else _requested


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op in the given form inside the block, in all threads of the process.

    Raises:
        ValueError: on an unknown name here, or at an op that has no such form or cannot run it.
    """
    global _requested
    before, _requested = _requested, _checked(name)
    try:
        yield
    finally:
        _requested = before


_planned: str | None = None


@contextmanager
def planned_for(target: str) -> Iterator[None]:
    """Choose as on a GPU that need not be here, of an architecture as `gpu_target` names it, in all threads.

    For tensors that have no numbers: forms that are chosen for it do not run.
    """
    global _planned
    before, _planned = _planned, target
    try:
        yield
    finally:
        _planned = before


def choose(
    op: str,
    forms: tuple[str, ...],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    kernels: str = "auto",
) -> Choice:
    """Pick the form of `op` for tensors on `device`.

    Args:
        op: name of the op.
        forms: the forms that it has.
        device: where its tensors are.
        dtype: what it computes in: float32, float64 or complex64, complex128.
        kernels: what the caller asks for; what `use_backend` or the environment ask for goes before it.

    Raises:
        ValueError: if a form was asked for by name and cannot run, or `require` cannot be met. It says why.
    """
    where = torch.device(device).type if _planned is None else "cuda"
    return _choose(op, tuple(forms), where, str(dtype), requested(kernels), _planned)


@torch.compiler.assume_constant_result  # a compiled graph depends on the arguments only, and is told of each
def _choose(op: str, forms: tuple[str, ...], device: str, dtype: str, requested: str, planned: str | None) -> Choice:
    return _choose_once(op, forms, device, dtype, requested, planned)


@functools.cache
def _choose_once(
    op: str, forms: tuple[str, ...], device: str, dtype: str, requested: str, planned: str | None
) -> Choice:
    if requested in FORMS:
        if requested not in forms:
            raise ValueError(f"{op} has no {requested!r} backend; it has {', '.join(forms)}")
        if obstacle := _obstacle(op, requested, device, dtype, planned):
            raise ValueError(f"{op} cannot run its {requested!r} backend: {obstacle}")
        return Choice(requested, "asked for by name")
    meant = KERNEL_FOR.get(device)
    if meant is None:
        reason = f"there are no kernels for {device}"
    elif meant not in forms:
        return Choice("chunked", f"the form of {op} for {device}: it has no {meant} one")
    else:
        reason = _obstacle(op, meant, device, dtype, planned)
        if reason is None:
            return Choice(meant, f"the kernel of {op} for {device}")
    if requested == "require":
        raise ValueError(f"kernels='require', but {reason}; kernels='auto' would run 'chunked'")
    return Choice("chunked", reason)


def _obstacle(op: str, form: str, device: str, dtype: str, planned: str | None) -> str | None:
    """Why a form cannot run, or None."""
    if form == "native":
        return f"C++ runs on a CPU, not on {device}" if device != "cpu" else native.obstacle(op)
    if form == "triton":
        return _obstacle_to_triton(op, device, dtype, planned)
    return None


def _obstacle_to_triton(op: str, device: str, dtype: str, planned: str | None) -> str | None:
    if planned is None and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "Triton runs on a GPU, or on a CPU under TRITON_INTERPRET=1"
    if device != "cuda":
        return f"Triton does not run on {device}"
    if dtype in ("torch.float64", "torch.complex128"):
        return f"the Triton kernels compute in float32, not {dtype.removeprefix('torch.')}"
    target = planned or gpu_target()
    if (op, target) in targets_listed_as_chunked():
        return f"evals/results/kernels_aot.csv lists {op} on {target} as chunked"
    return None


def choose_native(library: str, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...], kernels: str = "auto") -> Choice:
    """`native` or `torch` on a CPU, and why, for a function of C++ that is no op, with `dtypes`."""
    if (form := requested(kernels)) not in ("auto", "require", "native"):
        return Choice("torch", f"{form!r} was asked for")
    if dtype not in dtypes:
        return Choice("torch", f"no C++ for {str(dtype).removeprefix('torch.')}")
    if obstacle := native.obstacle(library):
        return Choice("torch", obstacle)
    return Choice("native", "the kernel for cpu")


def gpu_target() -> str:
    """The architecture of the current GPU, as `sm_90` or `gfx942`."""
    properties = torch.cuda.get_device_properties()
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def targets_listed_as_chunked() -> frozenset[tuple[str, str]]:
    """The (op, target) for which the kernels, compiled ahead of time, did not come out as they should."""
    path = shelf("evals") / "results" / "kernels_aot.csv"
    if not path.is_file():
        return frozenset()
    with path.open(newline="") as lines:
        return frozenset((row["op"], row["target"]) for row in csv.DictReader(lines) if row["verdict"] == "chunked")
