"""A contender at a size, ready for the clock, and whether it computes what the op computes."""

import functools
import importlib
import importlib.util
import sys

import torch
from torch import Tensor

from zoo.bench.workload import BOTH, Contender, Inputs, Workload
from zoo.ops.dispatch import choose
from zoo.ops.testing import error

# How far contenders may be apart, relative to the largest entry, to be compared at all.
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


class Trial:
    """A contender with its own copy of the inputs; a call of it is what is timed.

    Args:
        contender: the code.
        inputs: of the op; those that get a gradient are leaves.
        weight: the gradient of the op's output, or None to measure the forward pass alone.
    """

    def __init__(self, contender: Contender, inputs: Inputs, weight: Tensor | None):
        self.name = contender.name
        self._contender, self._op_inputs = contender, inputs
        self._prepared = contender.prepare(**inputs)
        self.inputs = {
            name: x.detach().clone(memory_format=torch.contiguous_format).requires_grad_(x.requires_grad)
            for name, x in self._prepared.items()
        }
        self._leaves = [name for name, x in self.inputs.items() if x.requires_grad]
        self._weight = None
        if weight is not None:
            y = self._forward().requires_grad_()
            (self._weight,) = torch.autograd.grad(contender.restore(y), y, weight.to(y.dtype))

    def __call__(self) -> Tensor | tuple[Tensor, ...]:
        """The output, or the gradients of the inputs."""
        if self._weight is None:
            return self._forward()
        y = self._contender.run(**self.inputs)
        leaves = [self.inputs[name] for name in self._leaves]
        return torch.autograd.grad(y, leaves, self._weight, materialize_grads=True)

    def as_op(self, result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
        """A result of a call in the op's layout, or with respect to the op's inputs."""
        if self._weight is None:
            return [self._contender.restore(result)]
        prepared = [self._prepared[name] for name in self._leaves]
        op_leaves = [x for x in self._op_inputs.values() if x.requires_grad]
        return list(torch.autograd.grad(prepared, op_leaves, result, retain_graph=True, materialize_grads=True))

    @torch.no_grad()
    def _forward(self) -> Tensor:
        return self._contender.run(**self.inputs)


def make_trials(workload: Workload, which: str, device: str, dtype: torch.dtype) -> list[Trial]:
    """The contenders of a workload in a pass, those that can run here; the first is the op as it runs by itself."""
    inputs = workload.inputs(device, dtype)
    contenders = [x for x in _contenders(workload, device) if which in x.passes and which in workload.passes]
    if not contenders:
        return []
    weight = None
    if which == BOTH:
        with torch.no_grad():
            y = contenders[0].run(**inputs)
        generator = torch.Generator(y.device).manual_seed(0)
        weight = torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=generator)
    return [Trial(contender, inputs, weight) for contender in contenders]


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest, relative to the largest entry of what is expected; NaN where that is not finite."""
    return torch.tensor([0.0, *(error(x, y) for x, y in zip(actual, expected, strict=True))]).max().item()


def bytes_moved(trial: Trial, backward: bool) -> int:
    """Bytes that no form can do without: inputs in, outputs out; in the backward pass inputs and gradients."""
    inputs = sum(x.nbytes for x in trial.inputs.values())
    outputs = trial._forward().nbytes
    gradients = sum(x.nbytes for x in trial.inputs.values() if x.requires_grad)
    return inputs + outputs + (inputs + outputs + gradients if backward else 0)


def _contenders(workload: Workload, device: str) -> list[Contender]:
    """Those that can run here; first the form that the op takes by itself."""
    forms = importlib.import_module(f"zoo.ops.{workload.op}").OP.forms
    default = choose(workload.op, forms, device).backend
    contenders = []
    for form in sorted(workload.forms, key=lambda form: form != default):
        try:
            choose(workload.op, forms, device, kernels=form)
        except ValueError as reason:
            _say_once(f"left out: {reason}")
        else:
            run = functools.partial(workload.run, kernels=form)
            contenders.append(Contender(form, run, passes=workload.forms[form]))
    for peer in workload.peers:
        if importlib.util.find_spec(peer.package) is None:
            _say_once(f"left out: {peer.name} is not installed")
        else:
            contenders.append(peer)
    return contenders


@functools.cache
def _say_once(text: str) -> None:
    print(f"zoo: {text}", file=sys.stderr)
