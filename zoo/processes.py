"""The processes of a run: one, or those that a launcher started (`accelerate launch`, `torchrun`), on GPUs or CPUs."""

import os

import torch
from accelerate import PartialState


def connect_processes() -> PartialState:
    """Connect this process with the others, as the launcher's environment says; whoever does it first decides.

    Raises:
        ValueError: if not as many processes are connected as were started.
    """
    processes = PartialState(cpu=not torch.accelerator.is_available())  # without a word they stay apart on a CPU
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if processes.num_processes != started:
        raise ValueError(f"{started} processes were started, {processes.num_processes} are connected")
    return processes
