"""What is measured: an op at a size, and who else computes the same."""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zoo.ops.testing import Draw, to_dtype

FORWARD, BOTH = "forward", "forward+backward"
PASSES = (FORWARD, BOTH)

CPU_FORMS = {"native": PASSES, "chunked": PASSES, "reference": PASSES}
GPU_FORMS = {"triton": PASSES, "chunked": PASSES}

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Contender:
    """Code that computes what an op computes.

    Args:
        name: `native`, `transformers`, ...
        run: from its inputs to the output.
        prepare: from the op's inputs to its own: another layout, another parametrisation. Differentiable; it runs once,
            before the clock does.
        restore: from its output to the op's.
        passes: those that it is measured in.
        package: what must be installed for it.
    """

    name: str
    run: Callable[..., Tensor]
    prepare: Callable[..., Inputs] = dict
    restore: Callable[[Tensor], Tensor] = lambda y: y
    passes: tuple[str, ...] = PASSES
    package: str = "torch"


@dataclass(frozen=True)
class Workload:
    """An op at a size.

    Args:
        op: its name.
        sizes: by letter, as in the op's documentation.
        draw: inputs by name in float64, of a `Draw` and the sizes.
        run: the op, of the inputs and `kernels`; it returns the output without the last state.
        variant: which of the op's computations, where there are several.
        passes: forward, forward and backward, or both.
        forms: the op's forms that are measured, and in which passes.
        peers: others that compute the same.
        fixed: inputs that get no gradient: the state that a sequence begins with.
        precise: inputs that stay in float32 where the others are in bfloat16.
        flops: floating-point operations that no form of the forward pass can do without, of the sizes.
        peak_memory: measure that too.
    """

    op: str
    sizes: dict[str, int]
    draw: Callable[..., Inputs]
    run: Callable[..., Tensor]
    variant: str = ""
    passes: tuple[str, ...] = PASSES
    forms: dict[str, tuple[str, ...]] = field(default_factory=CPU_FORMS.copy)
    peers: tuple[Contender, ...] = ()
    fixed: tuple[str, ...] = ("state",)
    precise: tuple[str, ...] = ("state", "log_decay")
    flops: Callable[..., float] = lambda **sizes: 0.0
    peak_memory: bool = False

    @property
    def size(self) -> str:
        """As `normalized b4 t1024 h8 d64 e64`."""
        return " ".join(filter(None, [self.variant, *(f"{letter}{size}" for letter, size in self.sizes.items())]))

    def inputs(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Inputs:
        """The same at every call; those that get a gradient are leaves."""
        drawn = to_dtype(self.draw(Draw(0), **self.sizes), dtype, keep=self.precise)
        inputs = {name: x.to(device).contiguous() for name, x in drawn.items()}
        for name, x in inputs.items():
            x.requires_grad_(x.is_floating_point() and name not in self.fixed)
        return inputs


def known_ops() -> list[str]:
    """The ops that there are workloads for: the modules of `zoo.bench.workloads`."""
    folder = importlib.import_module("zoo.bench.workloads").__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder))


def workloads_of(op: str, device: str) -> list[Workload]:
    """The workloads of an op on a kind of device, `cpu` or `cuda`."""
    module = importlib.import_module(f"zoo.bench.workloads.{op}")
    return module.ON_CPU if device == "cpu" else module.ON_GPU


def optional(path: str) -> Callable[..., Any]:
    """A function of a package that may be absent, as `fla.ops.gla:chunk_gla`, imported when it is first called."""
    module, name = path.split(":")

    @functools.cache
    def load() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), name)

    return lambda *args, **options: load()(*args, **options)
