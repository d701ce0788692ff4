"""Which code, on which device: what a figure must be able to say of itself."""

import os
import subprocess
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """A GPU by its name, a CPU by its cores."""
    return torch.cuda.getdevice_name(device) if device.type == "cuda" else f"{device.type}, {os.cpu_count()} cores"


def commit() -> str | None:
    """The commit of the checkout that runs, with a + where files differ from it; None outside of one."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD").strip()
        return head + "+" if _git("status", "--porcelain") else head
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    folder = Path(__file__).parent
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout
