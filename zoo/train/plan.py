"""What a run will cost, before anything runs: parameters, steps, operations, memory, hours."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zoo.errors import unknown_name
from zoo.inspection import embedding_parameters
from zoo.moe import Experts
from zoo.ops.linear import linear
from zoo.registry import create_model
from zoo.train.config import TrainConfig
from zoo.train.model import check_model
from zoo.train.optimizer import muon_matrices
from zoo.train.tokenizer import TRAINED_ON_THE_SPOT, count_entries, load_tokenizer


class Device(NamedTuple):
    """A device by what its maker says of it: dense bf16 products and memory."""

    flops: float
    """Operations a second."""
    memory: float
    """Bytes."""


DEVICES = {
    "A100": Device(312e12, 80e9),
    "H100": Device(989e12, 80e9),
    "H200": Device(989e12, 141e9),
    "B200": Device(2250e12, 192e9),
    "L40S": Device(362e12, 48e9),
    "RTX 4090": Device(165e12, 24e9),
    "MI300X": Device(1307e12, 192e9),
}

ASSUMED_MFU = 0.4
"""Part of a device's peak that a run is expected to reach."""


@dataclass(frozen=True)
class Plan:
    """A run in numbers."""

    parameters: int
    embedding_parameters: int
    """In the embedding and the head, of `parameters`."""
    flops_per_token: float
    """6 N, N the parameters that a token is multiplied with (Kaplan et al., 2020, arXiv:2001.08361, section 2.1)."""
    tokens_per_step: int
    steps: int
    state_memory: int
    """Bytes of weights, gradients and moments, in one process."""
    activation_memory: int | None
    """Bytes that the backward pass of one micro-batch keeps; None: the model cannot be run without its weights."""

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def flops(self) -> float:
        return self.flops_per_token * self.tokens

    def hours(self, peak: float, devices: int = 1) -> float:
        """Hours at `ASSUMED_MFU` of a peak in operations a second, on so many devices."""
        return self.flops / (peak * ASSUMED_MFU * devices) / 3600


def plan_run(config: TrainConfig, device: str | None = None, devices: int = 1) -> list[str]:
    """What a recipe will take, in lines for a person; nothing is read or trained.

    Args:
        config: the recipe.
        device: a name of `DEVICES`; None: what is there.
        devices: how many of them, among which the rows of a step are divided.

    Raises:
        ValueError: on an unknown device, if rows do not divide among so many, or if the model cannot be built.
    """
    if device is not None and device not in DEVICES:
        raise unknown_name("device", device, DEVICES)
    if devices < 1 or config.data.batch_size % devices:
        raise ValueError(f"data.batch_size is {config.data.batch_size}, which does not divide among {devices} devices")
    check_model(config)
    overrides = dict(config.model.overrides)
    if "vocab_size" not in overrides:
        trained = config.data.tokenizer in TRAINED_ON_THE_SPOT
        overrides["vocab_size"] = (
            config.data.vocab_size if trained else count_entries(load_tokenizer(config.data.tokenizer))
        )
    with torch.device("meta"):
        model = create_model(config.model.preset, **overrides)
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, peak = (device, DEVICES[device].flops) if device else peak_of(here)
    return list(describe_plan(make_plan(config, model, devices), name, peak, devices))


def make_plan(config: TrainConfig, model: PreTrainedModel, processes: int = 1) -> Plan:
    """Count what a run will take.

    Args:
        config: the recipe.
        model: of the run, on the meta device to have activations counted.
        processes: that the rows of a step are divided among.
    """
    data, settings = config.data, config.train
    tokens_per_step = data.batch_size * data.sequence_length
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    matrices = muon_matrices(model) if settings.optimizer == "muon" else []
    moments = 2 * trained - sum(p.numel() for p in matrices)
    rows = data.micro_batch_size or data.batch_size // processes
    return Plan(
        parameters=model.num_parameters(),
        embedding_parameters=embedding_parameters(model),
        flops_per_token=6 * multiplied_parameters(model),
        tokens_per_step=tokens_per_step,
        steps=max(1, round(settings.tokens / tokens_per_step)),
        state_memory=4 * (2 * trained + moments),
        activation_memory=_activation_memory(model, rows, data.sequence_length, settings.gradient_checkpointing),
    )


def multiplied_parameters(model: PreTrainedModel) -> float:
    """The parameters that a token is multiplied with: not a table it is looked up in, nor experts it does not take."""
    count = float(model.num_parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding is not head:
        count -= embedding.numel()
    for module in model.modules():
        if isinstance(module, Experts):
            taken = model.config.num_experts_per_tok / model.config.num_experts
            count -= (1 - taken) * sum(p.numel() for p in module.parameters())
    return count


def describe_plan(plan: Plan, name: str, peak: float, devices: int) -> Iterable[str]:
    """The plan in lines for a person."""
    yield f"{'parameters':<16}{plan.parameters:,}, {plan.parameters - plan.embedding_parameters:,} not embedding"
    yield f"{'tokens':<16}{plan.tokens:,} in {plan.steps:,} steps of {plan.tokens_per_step:,}"
    yield f"{'operations':<16}{plan.flops:.2e}, {plan.flops_per_token:.2e} a token"
    activations = "unknown activations"
    if plan.activation_memory is not None:
        activations = f"{plan.activation_memory / 1e9:.2f} GB activations of a micro-batch"
    room = f", of {DEVICES[name].memory / 1e9:.0f} GB" if name in DEVICES else ""
    state = f"{plan.state_memory / 1e9:.2f} GB weights, gradients and moments (shared out under FSDP2 and ZeRO-3)"
    yield f"{'memory':<16}{state}, {activations}{room}"
    hours = plan.hours(peak, devices)
    on = f"{devices} x {name}" if devices > 1 else name
    length = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    yield f"{'time':<16}{length} on {on} at {ASSUMED_MFU:.0%} of {peak / 1e12:,.3g} TFLOP/s"


def peak_of(device: torch.device) -> tuple[str, float]:
    """The name of a device, and its operations a second in products of large matrices.

    Of a GPU in the table what its maker says, else measured, in float32 on a CPU and bf16 on a GPU.
    """
    name = "this CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    for known, facts in DEVICES.items():
        if known in name:
            return known, facts.flops
    return name, measure_peak(device)


def measure_peak(device: torch.device, seconds: float = 0.3) -> float:
    """Operations a second of a linear layer on square matrices, the best of some."""
    n, dtype = (1024, torch.float32) if device.type == "cpu" else (8192, torch.bfloat16)
    a = torch.ones(n, n, device=device, dtype=dtype)  # no random numbers: a run that goes on must draw the same
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds or best == float("inf"):
        before = time.perf_counter()
        linear(a, a)
        if device.type != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - before)
    return 2 * n**3 / best


def memory_in_use(device: torch.device) -> int:
    """Bytes that this process has taken: on the GPU at most so far, else of main memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def _activation_memory(model: PreTrainedModel, rows: int, length: int, checkpointing: bool) -> int | None:
    """Bytes of the tensors that a forward pass keeps for the backward pass, without the weights among them."""
    if model.device.type != "meta":
        return None
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(x)
        return x

    alive: list[Tensor] = []  # a storage that is freed would give its identity to another
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            _forward(model, ids, checkpointing)
    except (RuntimeError, NotImplementedError):  # a value was asked for, and nothing has one here
        return None
    return rows * sum(kept.values())


def _forward(model: nn.Module, ids: Tensor, checkpointing: bool) -> None:
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Masks that are given need no look at values. The head's loss keeps a gradient, no activations.
    model.base_model(input_ids=ids, attention_mask=dict.fromkeys(model.config.layer_types), use_cache=False)
