"""What the loop trains: a model and its optimizers, whole in every process or shared out among them."""

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from zoo.modeling import ZooPreTrainedModel
from zoo.segments import SegmentedModel
from zoo.train.config import TrainSection
from zoo.train.optimizer import make_optimizers

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_FROM_MAIN = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def make_engine(accelerator: Accelerator, model: ZooPreTrainedModel, settings: TrainSection) -> "Engine":
    """Make the optimizers of a model that every process has whole, and share both out as the launcher's file says."""
    optimizers = make_optimizers(model, settings)
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return Engine(accelerator, model, optimizers, settings.max_grad_norm)
    from zoo.train.zero import ZeroEngine  # noqa: PLC0415 (DeepSpeed is an extra)

    return ZeroEngine(accelerator, model, optimizers, settings.max_grad_norm)


class Engine:
    """A model that is whole in every process (one process, DDP) or sharded by FSDP2, and its optimizers.

    `model` is called as the model is, `optimizers` have its parameter groups. All processes call every method.
    """

    def __init__(
        self, accelerator: Accelerator, model: ZooPreTrainedModel, optimizers: list[Optimizer], max_norm: float
    ):
        self.accelerator = accelerator
        self.max_norm = max_norm
        # Rows decide what it uses: full segments write to a memory. Of a step that uses all of it PyTorch warns, once.
        if isinstance(model.base_model, SegmentedModel):
            accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.model, *self.optimizers = accelerator.prepare(model, *optimizers)
        if isinstance(self.model, FSDPModule):
            self.model.set_reduce_scatter_unused_params(True)

    def micro_batch(self, is_last: bool) -> AbstractContextManager:
        """What forward and backward of a part of a step's rows run in; the last is the one that exchanges gradients."""
        return nullcontext() if is_last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, averaged over the processes, to those of the step."""
        self.accelerator.backward(loss)

    def step(self, loss: float) -> tuple[float, bool]:
        """Clip the gradients, update the weights, and clear the gradients.

        Args:
            loss: of the step, the same in all processes.

        Returns:
            The norm of the gradients, and whether weights were updated: only if loss and norm are finite.
        """
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_norm)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        for optimizer in self.optimizers:
            if is_finite:
                optimizer.step()
            optimizer.zero_grad()
        return norm, is_finite

    def weights(self) -> dict[str, Tensor]:
        """All weights on the CPU, by name; processes other than the main one may get none."""
        return get_model_state_dict(self.model, options=_WHOLE)

    def moments(self) -> dict[str, Any]:
        """The state of the optimizers on the CPU, as `get_optimizer_state_dict` gives it for a model that is whole.

        Processes other than the main one may get less.
        """
        return get_optimizer_state_dict(self.model, self._bare_optimizers(), options=_WHOLE)

    def load_moments(self, path: Path) -> None:
        """Take over what `moments` gave in a run, however that one was shared out."""
        moments = {}
        if self.accelerator.is_main_process:
            moments = torch.load(path, map_location="cpu", weights_only=True)
        options = _FROM_MAIN if self.accelerator.num_processes > 1 else _WHOLE
        set_optimizer_state_dict(self.model, self._bare_optimizers(), moments, options=options)

    def _bare_optimizers(self) -> list[Optimizer]:
        return [optimizer.optimizer for optimizer in self.optimizers]
