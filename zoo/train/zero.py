"""Training under DeepSpeed's ZeRO-3 (Rajbhandari et al., 2020, arXiv:1910.02054): one more engine of the loop."""

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_local_optimizer_state
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from zoo.modeling import ZooPreTrainedModel
from zoo.train.engine import Engine

# At every step: DeepSpeed calls them by their old names.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each number of a parameter, beside its count of steps."""


class ZeroEngine(Engine):
    """A model of whose parameters, flattened, each process has a part, with the gradients and moments of that part."""

    def __init__(
        self, accelerator: Accelerator, model: ZooPreTrainedModel, optimizers: list[Optimizer], max_norm: float
    ):
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = optimizers[0].param_groups
        self._groups = [[self._names[id(parameter)] for parameter in group["params"]] for group in groups]
        if accelerator.device.type == "cpu":  # gloo reduces; DeepSpeed's own for CPUs would have to be compiled first
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        super().__init__(accelerator, model, optimizers, max_norm)
        self._adamw: AdamW = self.model.optimizer.optimizer
        for flat in self.model.optimizer.fp32_partitioned_groups_flat:  # as AdamW would with the first step
            zeros = {name: torch.zeros_like(flat, requires_grad=False) for name in _MOMENTS}
            self._adamw.state[flat] = {"step": torch.zeros((), device=flat.device), **zeros}

    def micro_batch(self, is_last: bool) -> AbstractContextManager:
        self.model.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def step(self, loss: float) -> tuple[float, bool]:
        if not math.isfinite(loss):
            self.model.optimizer.zero_grad()
            return math.nan, False
        self.model.step()  # clips; leaves weights and moments alone where the norm is not finite
        return float(self.model.get_global_grad_norm()), self.model.was_step_applied()

    def weights(self) -> dict[str, Tensor]:
        return self.accelerator.get_state_dict(self.model) or {}

    def moments(self) -> dict[str, Any]:
        step = next(iter(self._adamw.state.values()))["step"].cpu()
        state = {}
        for parameter in self.model.module.parameters():
            whole = {name: safe_get_full_optimizer_state(parameter, name) for name in _MOMENTS}
            if self.accelerator.is_main_process:
                moments = {name: x.cpu() for name, x in whole.items()}
                state[self._names[id(parameter)]] = {"step": step.clone(), **moments}
        groups = zip(self._adamw.param_groups, self._groups, strict=True)
        return {"state": state, "param_groups": [{**group, "params": names} for group, names in groups]}

    def load_moments(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state"]
        rank = self.accelerator.process_index
        for parameter in self.model.module.parameters():
            moments, size = state[self._names[id(parameter)]], parameter.partition_numel()
            for name in _MOMENTS:
                part = moments[name].flatten()[rank * size : (rank + 1) * size]
                safe_set_local_optimizer_state(parameter, F.pad(part, (0, size - len(part))), name)
        for kept in self._adamw.state.values():
            kept["step"].copy_(moments["step"])
