"""Checkpoints of a run: Hugging Face folders that load as they are, with what the run needs to go on beside the model.

    <output>/step-00000100/   config.json, model.safetensors, tokenizer: a model for `from_pretrained`
                              recipe.yaml    the resolved recipe
                              training.json  where the weights come from: steps, tokens, data, scores, versions
                              trainer/       optimizer.pt, of each process rank-00000/, state.json, digests.json
    <output>/latest           a link to the newest

A folder is written under another name and renamed when it is whole; `trainer/digests.json` tells whether it still is.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from zoo.cache import load_state, save_state
from zoo.train.engine import Engine

_STATE, _DIGESTS = "trainer/state.json", "trainer/digests.json"
_END = 2**24  # bytes of a file that are read at either end


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    """Steps without finite gradients."""
    skipped_in_a_row: int = 0
    world_size: int = 1
    hours: float = 0.0
    data_sha256: str = ""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """The newest validation."""
    best_loss: float | None = None
    """The lowest mean validation loss so far, and the step it was at."""
    best_step: int | None = None


def save_checkpoint(
    output: Path,
    progress: Progress,
    accelerator: Accelerator,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str],
    carried: list[Cache],
    keep: int,
) -> Path:
    """Write `step-<number>` and point `latest` at it; every process calls this, the main one writes the model.

    Args:
        output: folder of the run, which all processes see.
        progress: how far the run has come.
        accelerator: the processes.
        engine: what is trained.
        tokenizer: of the run.
        texts: further files, by name.
        carried: states that the next step goes on from, of this process.
        keep: newest checkpoints that are left in the folder, beside the best.
    """
    folder = output / f"step-{progress.step:08d}"
    partial = output / f".{folder.name}.partial"
    weights, moments = engine.weights(), engine.moments()
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "trainer").mkdir(parents=True)
    accelerator.wait_for_everyone()
    _save_rank(_rank_folder(partial, accelerator.process_index), carried)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        raw = accelerator.unwrap_model(engine.model)
        for tied in raw.all_tied_weights_keys:  # a sharded model gives them once more, under their own name
            weights.pop(tied, None)
        try:
            raw.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
            for name, text in texts.items():
                (partial / name).write_text(text)
            torch.save(moments, partial / "trainer" / "optimizer.pt")
            (partial / _STATE).write_text(json.dumps(asdict(progress), indent=2) + "\n")
            digests = {str(path.relative_to(partial)): _digest(path) for path in _files(partial)}
            (partial / _DIGESTS).write_text(json.dumps(digests, indent=2) + "\n")
            _write_through(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk gets its room back
            raise
        remove_folder(folder)
        partial.rename(folder)
        point_latest(output, folder)
        _prune(output, progress.step, keep, progress.best_step)
    accelerator.wait_for_everyone()
    return folder


def find_checkpoint(output: Path, say: Callable[[str], None]) -> tuple[Path, Progress] | None:
    """The newest whole checkpoint of a run, and how far it had come; None if there is none.

    One that is damaged is passed over, and `say` gets a line that names the file. Noticed is a file that is missing,
    has another length, or differs in its first or last 16 MiB, where all is that a file of tensors has beside them.
    Damage amid the tensors of a larger file is not: to read all of it would take as long as to load it.

    Raises:
        ValueError: if there are checkpoints, and all of them are damaged.
    """
    for folder in sorted(_checkpoints(output), reverse=True):
        if damage := _find_damage(folder):
            say(f"{folder} is not whole: {damage}")
        else:
            return folder, Progress(**json.loads((folder / _STATE).read_text()))
    if damaged := _checkpoints(output):
        raise ValueError(f"none of the {len(damaged)} checkpoints in {output} is whole: remove them to start anew")
    return None


def load_checkpoint(folder: Path, accelerator: Accelerator, engine: Engine) -> list[Cache] | None:
    """Restore optimizers, random numbers and carried states of this process; the model has its weights already.

    Returns:
        The carried states; None if another number of processes wrote the checkpoint, so that neither random numbers nor
        carried states could be restored.
    """
    engine.load_moments(folder / "trainer" / "optimizer.pt")
    written_by = len(list((folder / "trainer").glob("rank-*")))
    if written_by != accelerator.num_processes:
        return None
    return _load_rank(_rank_folder(folder, accelerator.process_index), accelerator.unwrap_model(engine.model))


def point_latest(output: Path, folder: Path) -> None:
    """Make `<output>/latest` a link to a checkpoint; there is one at every moment."""
    link = output / ".latest"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(output / "latest")


def remove_partial(output: Path) -> None:
    """Remove what a killed process was writing."""
    for partial in output.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a checkpoint, under another name first: nothing half removed has a checkpoint's name."""
    if folder.exists():
        dying = folder.with_name(f".{folder.name}.old.partial")
        folder.rename(dying)
        shutil.rmtree(dying)


def _checkpoints(output: Path) -> list[Path]:
    return [path for path in output.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]


def _prune(output: Path, step: int, keep: int, best_step: int | None) -> None:
    """Leave the newest up to a step, and the best; what is behind that step is damaged, and the run went around it."""
    numbers = {int(folder.name.removeprefix("step-")): folder for folder in _checkpoints(output)}
    kept = [*sorted(number for number in numbers if number <= step)[-keep:], best_step]
    for number, folder in numbers.items():
        if number not in kept:
            remove_folder(folder)


def _write_through(folder: Path) -> None:
    """Have the disk hold what was written, before anything older is removed."""
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _find_damage(folder: Path) -> str | None:
    """Which file of a checkpoint is not as it was written; None: all seem to be."""
    try:
        digests = json.loads((folder / _DIGESTS).read_text())
    except (OSError, ValueError):
        digests = None
    if not isinstance(digests, dict) or _STATE not in digests:
        return f"{_DIGESTS} is missing or damaged"
    for name, digest in digests.items():
        try:
            if _digest(folder / name) != digest:
                return f"{name} is not as it was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _digest(path: Path) -> str:
    """A hash of a file's length and of its two ends; of most files they are all there is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_END)
        file.seek(max(_END, size - _END))
        return sha256(b"%d:" % size + head + file.read()).hexdigest()


def _rank_folder(checkpoint: Path, rank: int) -> Path:
    return checkpoint / "trainer" / f"rank-{rank:05d}"


def _save_rank(folder: Path, carried: list[Cache]) -> None:
    folder.mkdir()
    random: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    torch.save(random, folder / "random.pt")
    for index, cache in enumerate(carried):
        save_state(cache, folder / f"carried-{index:03d}.safetensors")


def _load_rank(folder: Path, model: PreTrainedModel) -> list[Cache]:
    random = torch.load(folder / "random.pt", weights_only=True)
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    return [load_state(path, model) for path in sorted(folder.glob("carried-*.safetensors"))]
