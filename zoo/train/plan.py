"""What a run will cost, before anything runs: parameters, steps, operations, memory, hours."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch
from transformers import PreTrainedModel

from zoo.errors import unknown_name
from zoo.inspection import embedding_parameters
from zoo.moe import Experts
from zoo.ops.dispatch import gpu_target
from zoo.ops.linear import linear
from zoo.registry import create_model
from zoo.train.config import TrainConfig
from zoo.train.memory import measure_micro_batch, without_numbers
from zoo.train.model import check_model
from zoo.train.optimizer import muon_matrices
from zoo.train.tokenizer import TRAINED_ON_THE_SPOT, count_entries, load_tokenizer


class Device(NamedTuple):
    """A device by what its maker says of it: dense bf16 products and memory."""

    flops: float
    """Operations a second."""
    memory: float
    """Bytes."""
    target: str | None
    """Architecture of a GPU, as `zoo.ops.dispatch.gpu_target` names it; None: a CPU."""


DEVICES = {
    "A100": Device(312e12, 80e9, "sm_80"),
    "H100": Device(989e12, 80e9, "sm_90"),
    "H200": Device(989e12, 141e9, "sm_90"),
    "B200": Device(2250e12, 192e9, "sm_100"),
    "L40S": Device(362e12, 48e9, "sm_89"),
    "RTX 4090": Device(165e12, 24e9, "sm_89"),
    "MI300X": Device(1307e12, 192e9, "gfx942"),
}

ASSUMED_MFU = 0.4
"""Part of a device's peak that a run is expected to reach."""

USABLE_MEMORY = 0.94
"""Part of a device's memory that a run can count on: libraries, what kernels work in, and gaps take the rest."""


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
    recomputes: bool
    """Whether the forward pass runs a second time, in the backward pass."""
    state_memory: int
    """Bytes of weights, gradients and moments, in one process."""
    bucket_memory: int
    """Bytes of DDP's copies of the gradients; none in one process."""

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def flops(self) -> float:
        return self.flops_per_token * self.tokens

    def hours(self, peak: float, devices: int = 1) -> float:
        """Hours at `ASSUMED_MFU` of a peak in operations a second, on so many devices.

        Of the 6 operations a parameter and token 2 are of the forward pass, and are done again where it runs twice.
        """
        return self.flops * (8 / 6 if self.recomputes else 1) / (peak * ASSUMED_MFU * devices) / 3600


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
    with without_numbers():
        model = create_model(config.model.preset, **overrides)
    name, found = (device, DEVICES[device]) if device else this_device()
    plan = make_plan(config, model, devices)
    lines = describe_plan(plan, name, found.flops, devices)
    return [*lines, *describe_memory(config, model, plan, found, devices)]


def make_plan(config: TrainConfig, model: PreTrainedModel, processes: int = 1) -> Plan:
    """Count what a run will take.

    Args:
        config: the recipe.
        model: of the run, with or without its weights.
        processes: that the rows of a step are divided among.
    """
    data, settings = config.data, config.train
    tokens_per_step = data.batch_size * data.sequence_length
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    matrices = muon_matrices(model) if settings.optimizer == "muon" else []
    moments = 2 * trained - sum(p.numel() for p in matrices)
    return Plan(
        parameters=model.num_parameters(),
        embedding_parameters=embedding_parameters(model),
        flops_per_token=6 * multiplied_parameters(model),
        tokens_per_step=tokens_per_step,
        steps=max(1, round(settings.tokens / tokens_per_step)),
        recomputes=settings.gradient_checkpointing,
        state_memory=4 * (model.num_parameters() + trained + moments),
        bucket_memory=4 * trained if processes > 1 else 0,
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
    hours = plan.hours(peak, devices)
    on = f"{devices} x {name}" if devices > 1 else name
    length = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    twice = ", each forward pass twice" if plan.recomputes else ""
    yield f"{'time':<16}{length} on {on} at {ASSUMED_MFU:.0%} of {peak / 1e12:,.3g} TFLOP/s{twice}"


def describe_memory(
    config: TrainConfig, model: PreTrainedModel, plan: Plan, device: Device, devices: int
) -> Iterable[str]:
    """What each of so many devices has to hold, in lines for a person; where that is too much, what to change.

    Args:
        config: the recipe.
        model: of it, made in a block of `without_numbers`.
        plan: of the run.
        device: the facts of one of the devices.
        devices: how many there are.
    """
    data, settings = config.data, config.train
    share = data.batch_size // devices
    rows = min(data.micro_batch_size or share, share)
    is_gpu = device.target is not None
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and is_gpu)
    peak = measure_micro_batch(
        *(model, rows, data.sequence_length),
        packed=data.isolate_documents,
        bf16=bf16,
        checkpointing=settings.gradient_checkpointing,
        gpu=device.target,
    )
    state = plan.state_memory + plan.bucket_memory
    what = f"weights, gradients, {'buckets of DDP, ' if plan.bucket_memory else ''}moments"
    passes = f"forward and backward pass of {rows} x {data.sequence_length:,} tokens"
    if peak is None:
        yield f"{'memory':<16}{_gigabytes(state)} GB {what}; {passes}: unknown, as numbers decide what runs"
        return
    whole, shared_out = state + peak.memory, plan.state_memory / devices + peak.memory
    of = f"of {_gigabytes(device.memory)} GB"
    yield f"{'memory':<16}{_gigabytes(whole)} {of}: {_gigabytes(state)} {what}; {_gigabytes(peak.memory)} {passes}"
    if devices > 1:
        yield f"{'':<16}{_gigabytes(shared_out)} {of} under FSDP2 or ZeRO-3, beside the layer that is gathered"
    products = "products in bf16 (autocast)" if bf16 else "all in float32"
    kernels = "Triton kernels, PyTorch's norms and gates" if is_gpu else "the kernels of this CPU"
    documents = "several documents a row" if peak.is_packed else "one document a row"
    if data.isolate_documents and not peak.is_packed:
        documents += " (several may take more)"
    yield f"{'':<16}assumed: {products}, {kernels}, {documents}, not compiled"
    usable = USABLE_MEMORY * device.memory
    if whole > usable:
        needs_sharing = devices > 1 and shared_out <= usable
        label = "NEEDS FSDP2" if needs_sharing else "DOES NOT FIT"
        ways = ", or ".join(_ways_to_save(rows, settings.gradient_checkpointing, needs_sharing))
        yield f"{label:<16}more than {_gigabytes(usable)} GB, all that a run can count on: {ways}"


def _ways_to_save(rows: int, is_checkpointed: bool, is_sharing_enough: bool) -> Iterable[str]:
    if is_sharing_enough:
        yield "launch with recipes/launch/fsdp2.yaml"
    if rows > 1:
        yield f"lower data.micro_batch_size from {rows}"
    if not is_checkpointed:
        yield "set train.gradient_checkpointing=true"
    if not is_sharing_enough:
        yield "share weights and moments among more devices (recipes/launch/fsdp2.yaml)"


def _gigabytes(size: float) -> str:
    """Three digits of a size in bytes, as 38.9 or 0.153."""
    return f"{size / 1e9:.3g}"


def this_device() -> tuple[str, Device]:
    """The name of the device that a run on this machine takes, and its facts."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, peak = peak_of(device)
    if device.type == "cpu":
        return name, Device(peak, psutil.virtual_memory().total, None)
    return name, Device(peak, torch.cuda.get_device_properties(device).total_memory, gpu_target())


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
