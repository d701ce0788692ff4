"""What tests of training share: a small recipe on files, and what a run left."""

import json
import math
from pathlib import Path

from safetensors.torch import load_file

LICENSE = (Path(__file__).parents[1] / "LICENSE").read_text()
TEXTS = ["\n\n".join(LICENSE.split("\n\n")[i : i + 3]) for i in range(0, LICENSE.count("\n\n"), 3)]


def write_recipe(folder: Path, preset: str = "retnet-tiny") -> Path:
    """A recipe of 20 steps on a file of texts in a folder, whose run and cache are there as well."""
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {{preset: {preset}}}\n"
        "data:\n"
        f"  sources: {{code: {{dataset: json, files: [{texts}], held_out: 2}}}}\n"
        f"  cache: {folder / 'cache'}\n"
        "  vocab_size: 300\n"
        "  sequence_length: 32\n"
        "  batch_size: 4\n"
        "train:\n"
        f"  output: {folder / 'run'}\n"
        "  tokens: 2560\n"
        "  save_every: 7\n"
        "  evaluate_rows: 4\n"
        "  trackers: []\n"
        "  sample_prompt: null\n"
    )
    return recipe


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[tuple]:
    """What must be the same in runs that are the same, a tuple a step."""
    return [tuple(row[name] for name in ("step", "loss", "grad_norm", "lr")) for row in read_log(run)]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if path.is_dir() and path.name.startswith("step-"))


def assert_same_curve(run: Path, other: Path, tolerance: float) -> None:
    """Losses, gradient norms and learning rates agree, relatively."""
    mine, theirs = curve(run), curve(other)
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert all(math.isclose(x, y, rel_tol=tolerance) for x, y in zip(a, b, strict=True)), (a, b)


def assert_same_weights(run: Path, other: Path, tolerance: float) -> None:
    """The newest checkpoints hold the same tensors, relative to the largest entry of each."""
    mine, theirs = (load_file(path / "latest" / "model.safetensors") for path in (run, other))
    assert mine.keys() == theirs.keys()
    for name, x in mine.items():
        assert (x - theirs[name]).abs().max() <= tolerance * x.abs().max(), name
