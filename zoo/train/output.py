"""The folder of a run: one run at a time, and the run that it was begun with."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from zoo.train.checkpoint import remove_partial
from zoo.train.config import TrainConfig

_SAME = ("seed", "carry_state", "optimizer", "learning_rate", "weight_decay", "beta1", "beta2", "epsilon")
"""Keys of `train` that a run cannot change on its way: an optimizer's state has them in it."""


@contextmanager
def claimed(output: Path, accelerator: Accelerator) -> Iterator[None]:
    """Keep the folder of a run from other runs, and clear away what a killed one was writing.

    A folder that was made for a run which left nothing in it is removed again.

    Raises:
        ValueError: if another run has the folder; in all processes.
    """
    made = [path for path in (output, *output.parents) if not path.exists()]
    lock, is_free = FileLock(output / ".lock"), [True]
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
            remove_partial(output)
        except Timeout:
            is_free = [False]
    if not broadcast_object_list(is_free)[0]:
        raise ValueError(f"{output} is in use by another run: choose another train.output")
    try:
        yield
    finally:
        if accelerator.is_main_process:
            if made and [path.name for path in output.iterdir()] == [".lock"]:
                (output / ".lock").unlink()
                for path in made:
                    path.rmdir()
            lock.release()


def check_recipe(config: TrainConfig, checkpoint: Path) -> None:
    """Raise unless a checkpoint is of the model and the data that a recipe describes."""
    written = OmegaConf.to_container(OmegaConf.load(checkpoint / "recipe.yaml"))
    wanted = OmegaConf.to_container(OmegaConf.structured(config))
    carries = config.train.carry_state  # then states are kept a micro-batch
    for section, free in (("model", ()), ("data", ("cache",) if carries else ("cache", "micro_batch_size"))):
        before, now = flat(written[section], keep_lists=True), flat(wanted[section], keep_lists=True)
        for key in {**before, **now}:
            if key not in free and before.get(key) != now.get(key):
                raise ValueError(
                    f"{checkpoint} is of another run: its {section}.{key} is {before.get(key)!r}, the recipe says "
                    f"{now.get(key)!r}; choose another train.output"
                )
    for key in _SAME:
        if written["train"][key] != wanted["train"][key]:
            raise ValueError(f"{checkpoint} is of another run: its train.{key} is {written['train'][key]!r}")


def flat(nested: Any, keep_lists: bool = False, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; what trackers take are numbers, texts and booleans."""
    found = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            found |= flat(value, keep_lists, f"{prefix}{key}.")
        elif keep_lists or isinstance(value, (bool, int, float, str)):
            found[prefix + str(key)] = value
        elif value is not None:
            found[prefix + str(key)] = str(value)
    return found
