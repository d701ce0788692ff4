"""What commands check of their arguments, and of what is installed."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def extra(name: str, purpose: str) -> Iterator[None]:
    """Around imports: where a package is missing, a ValueError says which extra of the zoo brings it.

    Args:
        name: of the extra.
        purpose: what needs it, as the subject of "needs".
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"{purpose} needs {error.name}: pip install 'sequence-zoo[{name}]'") from error


def check_checkpoint(name: str) -> None:
    """Raise ValueError unless `name` may be a checkpoint of the zoo, or one on the Hub."""
    folder = Path(name).expanduser()
    is_on_hub = not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)
    if not is_on_hub and not (folder / "config.json").is_file():
        hint = f"; did you mean {folder / 'latest'}?" if (folder / "latest").is_dir() else ""
        raise ValueError(f"{name} is no checkpoint: it has no config.json{hint}")


def find_device(name: str) -> torch.device:
    """The device of that name; ValueError if this machine has none."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r}: {str(error).splitlines()[0]}") from error
    return device
