"""How an op is put to the test: cases drawn at random, every form against the reference in float64.

An op lists its cases in `zoo/ops/<op>/cases.py` as `CASES`; `tests/test_ops.py` and `zoo selftest` run them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo.ops
from zoo.ops.dispatch import use_backend

Inputs = dict[str, Tensor | tuple[Tensor, ...] | None]

# Largest allowed difference from the reference in float64, relative to the largest entry: by the dtype of the inputs.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def op_names() -> list[str]:
    """The ops there are: the folders of `zoo.ops` with a reference."""
    (folder,) = zoo.ops.__path__
    return sorted(path.parent.name for path in Path(folder).glob("*/reference.py"))


class Draw:
    """Random inputs in float64, the same for the same seed.

    Args:
        seed: of the generator.
        random_sizes: sizes are drawn too.
        small: sizes are at most 3, random ones at most 6.
    """

    def __init__(self, seed: int, random_sizes: bool = False, small: bool = False):
        self.generator = torch.Generator().manual_seed(seed)
        self.random_sizes, self.small = random_sizes, small

    def size(self, usual: int) -> int:
        """The usual size of a dimension; where sizes are random, one from 1 to twice that."""
        usual = min(usual, 3) if self.small else usual
        if self.random_sizes:
            return int(torch.randint(1, 2 * usual + 1, (), generator=self.generator))
        return usual

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, dtype=torch.float64, generator=self.generator)

    def log_decay(self, *shape: int) -> Tensor:
        """From 0 down to -60, both and -inf among them, most of them near 0."""
        x = self.uniform(*shape)
        logs = (-60 * x.pow(8)).masked_fill(x < 0.03, 0.0).masked_fill(x > 0.97, -60.0)
        return logs.masked_fill(x > 0.985, -torch.inf)

    def gate(self, *shape: int, high: float = 1.0) -> Tensor:
        """From 0 to the highest, both among them."""
        return high * self.uniform(*shape, low=-0.1, high=1.1).clamp(0.0, 1.0)

    def unit(self, *shape: int) -> Tensor:
        """Vectors of length 1 along the last dimension."""
        return torch.nn.functional.normalize(self.normal(*shape), dim=-1)

    def mask(self, b: int, t: int) -> Tensor:
        """(b t), about three of four True, padding anywhere; the first row has none, of three the last is all of it."""
        mask = self.uniform(b, t) < 0.75
        mask[0] = True
        if b > 2:
            mask[-1] = False
        return mask

    def segments(self, b: int, t: int) -> Tensor:
        """(b t) ids of documents, some one token long, none in the first row."""
        segments = (self.uniform(b, t) < 0.1).cumsum(1)
        segments[0] = 0
        return segments


@dataclass(frozen=True, eq=False)
class Case:
    """A way to call an op.

    Args:
        name: of the case among those of its op.
        run: the public function; it takes the inputs by name, `mask`, `segments` and `kernels`, and returns
            `(y, state)`, or one value where the op has no state.
        draw: from a `Draw` and a length t, its inputs in float64, three rows each, of sizes that are no powers of two.
        sequences: which of the inputs have a token dimension, the second. An input named `state` is carried.
        options: further arguments.
        splits: whether a sequence may be cut into calls that carry the state.
        gauge: whether the last tensor of the state is a running maximum that the others are relative to. Outputs do not
            depend on it and it carries no gradient, so the gradients of the state are not those of finite differences.
    """

    name: str
    run: Callable[..., Any]
    draw: Callable[[Draw, int], Inputs]
    sequences: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    splits: bool = True
    gauge: bool = False

    def call(self, inputs: Inputs, form: str, **packing: Tensor | None) -> Any:
        """Run the case in one form; `packing` are mask and segments."""
        with use_backend(form):
            return self.run(**inputs, **self.options, **packing)

    def with_run(self, run: Callable[..., Any]) -> "Case":
        """The same case of another function."""
        return replace(self, run=run)


def to_dtype(inputs: Inputs, dtype: torch.dtype, keep: tuple[str, ...] = ("state",)) -> Inputs:
    """The inputs rounded to a dtype; those in `keep` at least in float32."""

    def convert(name: str, x: Tensor) -> Tensor:
        if not (x.is_floating_point() or x.is_complex()):
            return x
        wanted = torch.promote_types(dtype, torch.float32) if name in keep else dtype
        return x.detach().to(wanted.to_complex() if x.is_complex() else wanted)

    return {name: map_tensors(lambda x, name=name: convert(name, x), value) for name, value in inputs.items()}


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The function of each tensor of a value, which is a tensor, a tuple of them or None."""
    if isinstance(value, tuple):
        return tuple(map_tensors(function, x) for x in value)
    return None if value is None else function(value)


def flatten(value: Any) -> list[Tensor]:
    """The tensors of a value, of tuples of them, or of a dict."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple):
        return [x for item in value for x in flatten(item)]
    return [] if value is None else [value]


def differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def run_case(
    case: Case, inputs: Inputs, backend: str, mask: Tensor | None = None, segments: Tensor | None = None
) -> dict[str, list[Tensor]]:
    """Outputs, final state and the gradients of a random function of both, by the given form.

    Inputs that cannot carry a gradient get none; a state that is a gauge (the running maximum of a normaliser) may have
    no gradient in any form: then it is 0.
    """
    inputs = {
        name: map_tensors(lambda x: x.detach().requires_grad_() if differentiable(x) else x, value)
        for name, value in inputs.items()
    }
    results = flatten(case.call(inputs, backend, mask=mask, segments=segments))
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for x in results:
        if x.requires_grad:
            weight = torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.device)
            total = total + (x * weight.to(x.dtype)).real.sum()
    leaves = [x for x in flatten(inputs) if x.requires_grad]
    gradients = torch.autograd.grad(total, leaves, materialize_grads=True)
    return {"outputs": [x.detach() for x in results], "gradients": list(gradients)}


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry expected; infinite where one is not finite."""
    if not torch.equal(actual.isfinite().cpu(), expected.isfinite().cpu()):
        return float("inf")
    difference = (actual.to("cpu", expected.dtype) - expected.cpu()).abs()
    scale = expected.abs().max().clamp(min=1e-30) if expected.numel() else 1.0
    return (difference.max() / scale).item() if difference.numel() else 0.0


def worst_error(
    case: Case,
    inputs: Inputs,
    backend: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> dict[str, float]:
    """How far a form, given inputs of a dtype, is from the reference in float64, given the same inputs: by kind."""
    rounded = to_dtype(inputs, dtype)
    exact = run_case(case, to_dtype(rounded, torch.float64), "reference", mask, segments)
    moved = {name: map_tensors(lambda x: x.to(device), value) for name, value in rounded.items()}
    mask, segments = (None if x is None else x.to(device) for x in (mask, segments))
    return largest_errors(run_case(case, moved, backend, mask, segments), exact)


def largest_errors(found: dict[str, list[Tensor]], exact: dict[str, list[Tensor]]) -> dict[str, float]:
    """The largest `error` of each kind of results that `run_case` gives."""
    return {
        kind: max((error(x, y) for x, y in zip(found[kind], exact[kind], strict=True)), default=0.0) for kind in exact
    }


def split_case(case: Case, at: int) -> Case:
    """The same case in two calls, of the tokens before a cut and of those behind it; no document may begin there."""
    sequences = (*case.sequences, "mask", "segments")

    def run(**inputs: Any) -> Any:
        inputs = {name: x for name, x in inputs.items() if x is not None or name not in sequences}
        head = {name: x[:, :at] if name in sequences else x for name, x in inputs.items()}
        tail = {name: x[:, at:] if name in sequences else x for name, x in inputs.items()}
        first, state = case.run(**head)
        second, end = case.run(**tail | {"state": state})
        return torch.cat([first, second], dim=1), end

    return case.with_run(run)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise AssertionError with the error where it is larger than the tolerance."""
    assert (found := error(actual, expected)) <= tolerance, f"{found:.1e} is more than {tolerance:.0e}"
