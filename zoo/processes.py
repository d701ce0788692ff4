"""The processes of a run: one, or those that a launcher started (`accelerate launch`, `torchrun`), on GPUs or CPUs."""

import atexit
import os
import time

import torch
from accelerate import PartialState

_PAUSE = 0.2  # seconds, many times what a thread needs to free a tensor


def connect_processes() -> PartialState:
    """Connect this process with the others, as the launcher's environment says; whoever does it first decides.

    Raises:
        ValueError: if not as many processes are connected as were started.
    """
    processes = PartialState(cpu=not torch.accelerator.is_available())  # without a word they stay apart on a CPU
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if processes.num_processes != started:
        raise ValueError(f"{started} processes were started, {processes.num_processes} are connected")
    if started > 1 and "gloo" in processes.backend:
        atexit.unregister(_let_gloo_finish)  # once is enough
        atexit.register(_let_gloo_finish)
    return processes


def _let_gloo_finish() -> None:
    """Give gloo's threads the time to free what was exchanged last.

    Tensors have Python objects, and a thread that asks for the interpreter once it finalizes is ended by it, up to
    Python 3.13, in a destructor of C++: the process aborts (github.com/pytorch/pytorch/issues/190489). To destroy the
    process group does not stop the threads, for DDP, FSDP2 and DeepSpeed keep it.
    """
    time.sleep(_PAUSE)
