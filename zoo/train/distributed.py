"""The processes of a run: one, or those that `accelerate launch` started, on CPUs or GPUs."""

import importlib.util
import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration

from zoo.processes import connect_processes


def make_accelerator(output: Path, trackers: list[str]) -> Accelerator:
    """Connect this process with the others of the run, as the launcher's environment says.

    On a CPU the state that Accelerate keeps of the processes is told that they are GPUs', which is what it shards.
    Precision is not left to Accelerate: with FSDP2 it would round parameters to bf16, decays and gates among them.

    Args:
        output: folder of the run, where trackers write.
        trackers: names of trackers.

    Raises:
        ValueError: if the launcher's file asks for what the recipe decides, or for DeepSpeed; if a tracker is not
            installed; if not as many processes are connected as were started.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ValueError("DeepSpeed is not supported: recipes/launch/fsdp2.yaml shares out the same with FSDP2")
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        raise ValueError("the launch file accumulates gradients; say data.micro_batch_size in the recipe instead")
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ValueError(f"train.trackers: {tracker} is not installed: pip install {tracker}, or leave it out")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise ValueError(
            f"the launch file says mixed_precision: {precision}; say train.precision in the recipe instead"
        )
    state = connect_processes()
    on_cpu = state.device.type == "cpu"
    if on_cpu and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state.distributed_type = DistributedType.MULTI_GPU  # Accelerate shards these only; gloo does so too
    folders = ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "trackers"))
    return Accelerator(cpu=on_cpu, mixed_precision="no", log_with=trackers or None, project_config=folders)
