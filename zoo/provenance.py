"""Which code, on which device: what a figure must be able to say of itself."""

import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from zoo.layout import shelf


def commit() -> str:
    """Of the checkout, with `-dirty` where files differ from it; the version where the zoo is installed."""
    root = shelf("evals").parent
    if not (root / ".git").exists():
        return f"v{version('sequence-zoo')}"
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def device_name(device: torch.device) -> str:
    """A GPU as its driver names it; a CPU as /proc/cpuinfo has it, and its vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.processor() or platform.machine()} ({instructions})"
