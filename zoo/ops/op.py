"""What an op is: one equation, and the forms it is computed in.

The PyTorch forms are plain functions: autograd, `torch.func` and compilers see through them. The kernels, C++ and
Triton, stand behind one custom operator `torch.ops.zoo.<name>` and its backward, so that compilers, FSDP and
checkpointing see one node. A backward keeps inputs and, where it wants them, outputs; whatever else it needs it
computes again.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from zoo.ops.checks import check_devices, check_dtypes, is_plain_call, once_per_look
from zoo.ops.dispatch import choose
from zoo.ops.precision import without_autocast


class Op:
    """An op and its forms.

    Args:
        name: of its folder in `zoo.ops` and its operator.
        empty_outputs: a function of the op's inputs that makes its outputs, contiguous, without computing them. Its
            annotated signature is the op's: `Tensor`, `Tensor | None`, and behind them options (`int`, `str`, ...).
            It raises ValueError where the inputs do not agree.
        reference, chunked: the PyTorch forms, of the same inputs.
        states: names of the inputs that are in the dtype of the state whatever the others are, in every form.
        kernels: which of `native` and `triton` there are. Each is a module of the op's folder with
            `forward(*inputs) -> outputs` and `backward(grads, outputs, *inputs) -> grads`, the latter in the order of
            the tensor inputs, None for those that are absent or have no gradient. Forward gets contiguous tensors.
        backward_reads_outputs: keep the outputs for the backward.
        takes_complex: whether inputs may be complex.
        compiled_whole: compilers take the chunked form as one node too, as a loop that they would unroll into
            thousands of nodes; its module then has `forward` and `backward` as those of the kernels.
        has_own_operator: the op is called by a function of its own, whose operator this does not define.
    """

    def __init__(
        self,
        name: str,
        empty_outputs: Callable[..., tuple[Tensor, ...]],
        *,
        reference: Callable,
        chunked: Callable,
        states: tuple[str, ...] = ("state",),
        kernels: tuple[str, ...] = (),
        backward_reads_outputs: bool = False,
        takes_complex: bool = False,
        compiled_whole: bool = False,
        has_own_operator: bool = False,
    ):
        self.name = name
        self.forms = ("reference", "chunked", *kernels)
        self._torch_forms = {"reference": reference, "chunked": chunked}
        self._empty_outputs = empty_outputs
        parameters = inspect.signature(empty_outputs).parameters.values()
        self._names = tuple(parameter.name for parameter in parameters)
        self._are_required = tuple(parameter.annotation is Tensor for parameter in parameters)
        self._are_states = tuple(name in states for name in self._names)
        self._takes_complex = takes_complex
        self._compiled_whole = compiled_whole
        self._examine = once_per_look(self._examine_once)
        if kernels and not has_own_operator:
            self._operator = self._define(backward_reads_outputs)

    def __call__(self, *inputs: Any, kernels: str = "auto") -> tuple[Tensor, ...]:
        """Compute the op in the form that `zoo.ops.dispatch` picks.

        PyTorch forms and C++ get every floating tensor in the dtype of the state: float32, or float64 where one of the
        inputs is. Triton reads lower precisions as they are.

        Raises:
            ValueError: if the inputs do not agree, or the form asked for cannot run.
        """
        dtype, is_empty = self._examine(*inputs)
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        backend = choose(self.name, self.forms, tensors[0].device, dtype, kernels).backend
        inputs = tuple(
            _convert(x, dtype) if is_state or backend != "triton" else x
            for x, is_state in zip(inputs, self._are_states, strict=True)
        )
        is_node = self._compiled_whole and backend == "chunked" and torch.compiler.is_compiling()
        if backend in self._torch_forms and not is_node:
            with without_autocast(tensors[0].device.type):  # products of the state stay in the state's precision
                return self._torch_forms[backend](*inputs)
        _refuse_tangents(self.name, tensors)
        if not is_plain_call(tensors) or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            return self._operator(*inputs, backend)
        # Nobody has to see the call as one node; in decoding the operator would be most of what a token costs.
        return self._empty_outputs(*inputs) if is_empty else self._run_kernel(backend, inputs)

    def _examine_once(self, *inputs: Any) -> tuple[torch.dtype, bool]:
        """Refuse inputs that do not agree; the dtype of the state, and whether nothing is to be computed."""
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        self._check(*inputs)
        check_devices(self.name, tensors)
        return compute_dtype(*tensors), all(x.numel() == 0 for x in self._empty_outputs(*inputs))

    def _check(self, *inputs: Any) -> None:
        """Refuse what a kernel would misread."""
        for name, is_required, x in zip(self._names, self._are_required, inputs, strict=True):
            if x is None and is_required:
                raise ValueError(f"{self.name}: {name} is missing")
        named = {name: x for name, x in zip(self._names, inputs, strict=True) if isinstance(x, Tensor)}
        check_dtypes(self.name, self._takes_complex, **named)

    def form_for(self, *inputs: Any, kernels: str = "auto") -> str:
        """The form that would compute such inputs."""
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        check_devices(self.name, tensors)
        return choose(self.name, self.forms, tensors[0].device, compute_dtype(*tensors), kernels).backend

    def _run_kernel(self, backend: str, inputs: Iterable[Any]) -> tuple[Tensor, ...]:
        return _kernel(self.name, backend).forward(*(_plain(x) if isinstance(x, Tensor) else x for x in inputs))

    def _define(self, backward_reads_outputs: bool) -> Callable:
        """Register `zoo::<name>` and `zoo::<name>_backward`, whose last argument is the kernel to run."""
        parameters = inspect.signature(self._empty_outputs).parameters.values()
        tensor_count = sum(p.annotation in (Tensor, Tensor | None) for p in parameters)
        schema = torch.library.infer_schema(self._empty_outputs, mutates_args=())
        arguments, returns = schema.split(" -> ")
        options = ", ".join([*arguments[1:-1].split(", ")[tensor_count:], "str backend"])

        def forward(*inputs):
            *inputs, backend = inputs
            self._check(*inputs)  # who calls the operator by its name comes straight here
            outputs = self._empty_outputs(*inputs)
            return outputs if all(x.numel() == 0 for x in outputs) else self._run_kernel(backend, inputs)

        def backward(grads, tensors, outputs, *options):
            *options, backend = options
            if all(x.numel() == 0 for x in grads):
                return [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in tensors if _has_gradient(x)]
            tensors = [None if x is None else _plain(x) for x in tensors]
            grads, outputs = ([_plain(x) for x in group] for group in (grads, outputs))
            found = _kernel(self.name, backend).backward(grads, outputs, *tensors, *options)
            return [grad for grad, x in zip(found, tensors, strict=True) if _has_gradient(x)]

        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs[:tensor_count], *(output if backward_reads_outputs else ()))
            ctx.options = inputs[tensor_count:]

        def differentiate(ctx, *grads):
            saved = ctx.saved_tensors  # once: activation checkpointing computes them again to unpack them
            tensors, outputs = saved[:tensor_count], saved[tensor_count:]
            found = iter(backward_operator(list(grads), list(tensors), list(outputs), *ctx.options))
            return *(next(found) if _has_gradient(x) else None for x in tensors), *(None for _ in ctx.options)

        operator = torch.library.custom_op(
            f"zoo::{self.name}", forward, mutates_args=(), schema=f"{arguments[:-1]}, str backend) -> {returns}"
        )
        operator.register_fake(lambda *inputs: self._empty_outputs(*inputs[:-1]))
        operator.register_autograd(differentiate, setup_context=setup_context)
        backward_operator = torch.library.custom_op(
            f"zoo::{self.name}_backward",
            backward,
            mutates_args=(),
            schema=f"(Tensor[] grads, Tensor?[] tensors, Tensor[] outputs, {options}) -> Tensor[]",
        )
        backward_operator.register_fake(
            lambda grads, tensors, *rest: [x.new_empty(x.shape) for x in tensors if _has_gradient(x)]
        )
        return operator


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of a recurrent state for such inputs: float32, float64 where one of them is, complex likewise."""
    dtype = torch.float32
    for x in tensors:
        if x.is_floating_point() or x.is_complex():
            dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def differentiable_gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of a function of PyTorch, differentiable once more; None where none is wanted."""
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)


_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def _convert(x: Any, dtype: torch.dtype) -> Any:
    if not isinstance(x, Tensor) or x.dtype == dtype:
        return x
    if x.is_complex():
        return x.to(dtype)
    return x.to(_REAL.get(dtype, dtype)) if x.is_floating_point() else x


def _refuse_tangents(op: str, tensors: list[Tensor]) -> None:
    """A custom operator would lose the tangents of forward-mode differentiation without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise ValueError(f"{op}: kernels have no forward-mode derivative; kernels='chunked' has")


@functools.cache
def _kernel(op: str, backend: str) -> Any:
    return importlib.import_module(f"zoo.ops.{op}.{backend}")


def _plain(x: Tensor) -> Tensor:
    """The numbers as they lie in memory: contiguous, and without a conjugate or a sign that is still to be taken."""
    if x.is_contiguous() and not (x.is_conj() or x.is_neg()):
        return x
    return x.resolve_conj().resolve_neg().contiguous()


def _has_gradient(x: Tensor | None) -> bool:
    return x is not None and (x.is_floating_point() or x.is_complex())
