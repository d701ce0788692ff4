"""The processes of a run: one, or those that `accelerate launch` started, on CPUs or GPUs."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration

from zoo.processes import connect_processes


def make_accelerator(output: str, trackers: list[str]) -> Accelerator:
    """Connect this process with the others of the run, as the launcher's environment says.

    Precision is not left to Accelerate: with FSDP2 it would round parameters to bf16, decays and gates among them.

    Args:
        output: folder of the run, where trackers write.
        trackers: names of trackers.

    Raises:
        ValueError: if the launcher's file asks for another precision, or not as many processes are connected as were
            started.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise ValueError(
            f"the launch file says mixed_precision: {precision}; say train.precision in the recipe instead"
        )
    on_cpu = not torch.cuda.is_available()
    state = connect_processes()
    if on_cpu and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state.distributed_type = DistributedType.MULTI_GPU  # Accelerate shards these only; gloo does so too
    folders = ProjectConfiguration(project_dir=output, logging_dir=str(Path(output) / "trackers"))
    return Accelerator(cpu=on_cpu, mixed_precision="no", log_with=trackers or None, project_config=folders)


def is_main_process() -> bool:
    """Whether this is the process of a run that speaks, also before it is connected with the others."""
    return os.environ.get("RANK", "0") == "0"
