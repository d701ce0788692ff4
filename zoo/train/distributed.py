"""The processes of a run: one, or those that `accelerate launch` started, on CPUs or GPUs."""

import importlib.util
import os
from pathlib import Path

from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DistributedType, ProjectConfiguration
from transformers.integrations import unset_hf_deepspeed_config

from zoo.processes import connect_processes
from zoo.train.config import TrainSection

_LAUNCH_FILE = (
    # variable of the launcher, key, what it has to be, what to say otherwise
    ("MIXED_PRECISION", "mixed_precision", "no", "train.precision in the recipe"),
    ("GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", "1", "data.micro_batch_size in the recipe"),
    ("GRADIENT_CLIPPING", "gradient_clipping", "auto", "train.max_grad_norm in the recipe"),
    ("DEEPSPEED_CONFIG_FILE", "deepspeed_config_file", "none", "deepspeed_config"),
    ("DEEPSPEED_ZERO_STAGE", "zero_stage", "3", "3"),
    ("DEEPSPEED_ZERO3_INIT", "zero3_init_flag", "false", "false"),
    ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "offload_optimizer_device", "none", "none"),
    ("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "offload_param_device", "none", "none"),
)


def make_accelerator(output: Path, settings: TrainSection) -> Accelerator:
    """Connect this process with the others of the run, as the launcher's environment says.

    Accelerate starts FSDP2 and DeepSpeed on GPUs only. gloo does what they need, so on a CPU the state that it keeps of
    the processes is told what it would be there. Precision is not left to Accelerate: with either it would round
    parameters to bf16, decays and gates among them.

    Args:
        output: folder of the run, where trackers write.
        settings: of the run.

    Raises:
        ValueError: if the launcher's file says what is the recipe's, or asks for what is not supported with it; if a
            tracker is not installed; if not as many processes are connected as were started.
    """
    for variable, key, needed, instead in _LAUNCH_FILE:
        if (found := os.environ.get(f"ACCELERATE_{variable}", needed)) != needed:
            raise ValueError(f"the launch file says {key}: {found}; say {instead} instead")
    for tracker in settings.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ValueError(f"train.trackers: {tracker} is not installed: pip install {tracker}, or leave it out")
    zero3 = _zero3(settings) if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" else None
    state = connect_processes()
    on_cpu = state.device.type == "cpu"
    if on_cpu and zero3:
        state.distributed_type = DistributedType.DEEPSPEED
    elif on_cpu and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state.distributed_type = DistributedType.MULTI_GPU
    accelerator = Accelerator(
        cpu=on_cpu and not zero3,
        mixed_precision="no",
        deepspeed_plugin=zero3,
        log_with=settings.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "trackers")),
    )
    if zero3:
        unset_hf_deepspeed_config()  # Accelerate set it; transformers would make models in pieces
    return accelerator


def _zero3(settings: TrainSection) -> DeepSpeedPlugin:
    """ZeRO-3 for a recipe, with buffers of a size that suits the model.

    Raises:
        ValueError: if the optimizer needs matrices, or the model shall be compiled.
    """
    if settings.optimizer == "muon":
        raise ValueError("train.optimizer: Muon needs matrices, and ZeRO-3 flattens them; take adamw or fsdp2.yaml")
    if settings.compile:
        raise ValueError("train.compile: ZeRO-3 has hooks between all modules; take false or fsdp2.yaml")
    plugin = DeepSpeedPlugin(
        zero_stage=3,
        zero3_init_flag=False,  # every process draws the whole model, the same as any other launch file's
        zero3_save_16bit_model=True,  # whole weights for checkpoints, in the precision they have: float32
        gradient_clipping=settings.max_grad_norm,
    )
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1  # for its reports only; losses are sums over tokens
    sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    plugin.deepspeed_config["zero_optimization"] |= dict.fromkeys(sizes, "auto")
    return plugin
