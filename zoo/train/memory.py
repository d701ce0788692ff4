"""The memory that a micro-batch takes, found without its device: the model is run on tensors that have no numbers.

They pretend to lie on a CPU, since PyTorch pretends to be a GPU only where it was built for one. What a GPU does
otherwise is put in its place: the forms of the ops, the operations that autocast takes in float32 there, and the RMS
norm in one kernel. Not seen is what kernels allocate to work in, and what Liger-Kernel and compilers save.
"""

import weakref
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from zoo.ops.dispatch import planned_for

without_numbers = FakeTensorMode
"""Make the model that is to be measured in such a block: its weights then take no memory."""


class Peak(NamedTuple):
    """What forward and backward pass of a micro-batch take at most."""

    memory: int
    """Bytes beside weights and gradients; the copies of weights that autocast makes are among them."""
    is_packed: bool
    """Whether the rows hold several documents."""


def measure_micro_batch(
    model: PreTrainedModel, rows: int, length: int, *, packed: bool, bf16: bool, checkpointing: bool, gpu: str | None
) -> Peak | None:
    """Run forward and backward pass of a micro-batch without numbers.

    Args:
        model: made in a block of `without_numbers`; it is left in training mode, with gradients.
        rows, length: of the micro-batch, (b t).
        packed: whether rows hold several documents. A model that has to know where they begin is run with one a row.
        bf16: whether products are taken in bf16, by autocast.
        checkpointing: whether layers are computed again in the backward pass.
        gpu: architecture of the GPU whose kernels run, as `sm_90`; None: those of this machine's CPU.

    Returns:
        None if what runs depends on numbers that nobody has here.
    """
    model.train()
    operations = nullcontext if gpu is None else _OperationsOfGPU
    if checkpointing:  # PyTorch turns function modes off in a backward pass: what runs again there brings its own
        options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), operations())}
        model.activation_checkpointing_enable(options)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)  # as another micro-batch of the step left it
    with ExitStack() as stack:
        if gpu is not None:
            stack.enter_context(planned_for(gpu))
        stack.enter_context(model.get_input_embeddings().weight.fake_mode)
        stack.enter_context(operations())
        for is_packed in (True, False) if packed else (False,):
            try:
                return Peak(_run(model, rows, length, is_packed, bf16), is_packed)
            except (DataDependentOutputException, DynamicOutputShapeException):
                continue
    return None


def _run(model: PreTrainedModel, rows: int, length: int, packed: bool, bf16: bool) -> int:
    """Bytes at the peak."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    batch = {"input_ids": ids, "shift_labels": ids, "num_items_in_batch": torch.ones(())}
    if packed:
        batch["position_ids"] = ids
    else:  # masks that are given need no look at numbers
        batch["attention_mask"] = dict.fromkeys(model.config.layer_types)
    with _MemoryInUse() as memory:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch, use_cache=False, skip_logits=True).loss
        loss.backward()
    return memory.peak


class _MemoryInUse(TorchDispatchMode):
    """Bytes of what operations in the block allocate, now and at most.

    Yes is the answer to every question about numbers: whether the rows hold several documents is what models ask.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, operation: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if operation is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return True
        outputs = operation(*args, **(kwargs or {}))
        for x in tree_leaves(outputs):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage())
        return outputs

    def _count(self, storage: torch.UntypedStorage) -> None:
        identity, size = storage._cdata, storage.nbytes()
        if identity in self._alive:
            return
        self._alive.add(identity)
        weakref.finalize(storage, self._forget, identity, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, identity: int, size: int) -> None:
        self._alive.remove(identity)
        self.now -= size


class _OperationsOfGPU(TorchFunctionMode):
    """What differs on a GPU from a CPU in what is saved for the backward pass."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cpu") and getattr(function, "__name__", None) in _FLOAT32_ON_GPU:
            args, kwargs = tree_map_only(Tensor, _to_float32, (args, kwargs))
        if function is F.rms_norm:
            return _rms_norm(*args, **kwargs)
        return function(*args, **kwargs)


_FLOAT32_ON_GPU = {
    *("exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "pow", "__pow__", "__rpow__", "softplus"),
    *("acos", "asin", "cosh", "erfinv", "sinh", "tan", "layer_norm", "rms_norm", "group_norm", "softmax"),
    *("log_softmax", "logsumexp", "cumprod", "cumsum", "prod", "sum", "norm", "vector_norm"),
}
"""What CUDA's autocast takes in float32 and a CPU's leaves in bf16 (ATen/autocast_mode.h), but for losses."""


def _to_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    if weight is None or weight.dtype != x.dtype:  # PyTorch has no kernel for these on a GPU either
        return F.rms_norm(x, normalized_shape, weight, eps)
    return _RMSNormOfGPU.apply(x, weight)


class _RMSNormOfGPU(torch.autograd.Function):
    """What the kernel saves: a number for each token besides its inputs. On a CPU PyTorch normalises step by step."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
