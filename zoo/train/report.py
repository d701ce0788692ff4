"""What a run shows: the log, the progress bar, the trackers, pictures."""

import json
import math
import reprlib
import sys
from collections.abc import Iterable, Mapping
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from zoo.files import whole_file
from zoo.train.validation import Baseline, Score

_SMOOTHING = 0.95  # of the loss in the progress bar and of the line in the plot


class RunLog:
    """`log.jsonl`, a line a step; it is appended to, after what a resumed run does again is cut off.

    Args:
        path: the file.
        step: steps that are done.
    """

    def __init__(self, path: Path, step: int):
        kept = [row for row in read_log(path) if row["step"] <= step] if path.exists() else []
        with whole_file(path) as partial:
            partial.write_text("".join(map(_line, kept)))
        self._file = path.open("a")

    def write(self, **values: Any) -> None:
        """Append a line; numbers that are not finite become null, which JSON has no other word for."""
        self._file.write(_line(values))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(values: Mapping[str, Any]) -> str:
    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({name: plain(value) for name, value in values.items()}) + "\n"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that a killed process or a full disk left half written is left out.

    Raises:
        ValueError: if another line is none of a log, as after damage to the disk; the file and the line are named.
    """
    *lines, _ = path.read_text(errors="replace").split("\n")
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or "step" not in row:
        raise ValueError(f"{where}: {reprlib.repr(line)} is no line of a log; remove it")
    return row


class ProgressBar:
    """Tokens, smoothed loss, speed, MFU, memory, and the time that is left."""

    def __init__(self, name: str, tokens: int, done: int, enabled: bool):
        self._bar = tqdm(
            total=tokens,
            initial=done,
            desc=name,
            unit="tok",
            unit_scale=True,
            disable=not enabled,
            mininterval=0.2 if sys.stderr.isatty() else 10,  # a log file gets a line now and then
        )
        self._loss = math.nan

    def update(self, tokens: int, loss: float, **figures: str) -> None:
        """Go on by a step's tokens."""
        if math.isfinite(loss):
            self._loss = smooth(self._loss, loss)
        shown = {"loss": f"{self._loss:.3f}", **figures}
        self._bar.set_postfix_str(", ".join(f"{name} {value}" for name, value in shown.items()), refresh=False)
        self._bar.update(tokens)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if not self._bar.disable:
            self._bar.write(line)

    def close(self) -> None:
        self._bar.close()


def smooth(average: float, value: float) -> float:
    """The running average after another value; the first one starts it."""
    return value if math.isnan(average) else _SMOOTHING * average + (1 - _SMOOTHING) * value


def describe_scores(scores: Mapping[str, Score], baselines: Mapping[str, Baseline]) -> Iterable[str]:
    """A table of the validation sets, in lines."""
    yield f"{'held-out text, never trained on':<42}nats a token   bits per byte   accuracy"
    for name, score in scores.items():
        baseline = baselines[name]
        yield f"  {name + ' loss':<40}{score.loss:12.3f}{_cell(score.bits_per_byte)}{score.accuracy:11.3f}"
        yield f"  {'its unigram entropy':<40}{baseline.loss:12.3f}{_cell(baseline.bits_per_byte)}".rstrip()


def _cell(bits_per_byte: float | None) -> str:
    return f"{'-':>16}" if bits_per_byte is None else f"{bits_per_byte:16.3f}"


def plot_run(log: Path, folder: Path, baselines: Mapping[str, Baseline]) -> None:
    """Draw `loss.png`, `learning_rate.png` and `grad_norm.png` from a log."""
    rows = read_log(log)
    steps = [row for row in rows if "loss" in row and row["loss"] is not None]
    if not steps:
        return
    numbers = [row["step"] for row in steps]
    colors = ("tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")

    figure, axes = _figure("nats a token")
    losses = [row["loss"] for row in steps]
    axes.plot(numbers, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(numbers, list(accumulate(losses, smooth)), color="tab:blue", label="training")
    for (name, baseline), color in zip(baselines.items(), cycle(colors), strict=False):
        found = [(row["step"], row["validation"][name]["loss"]) for row in rows if name in row.get("validation", {})]
        if found:
            axes.plot(*zip(*found, strict=True), color=color, marker="o", markersize=3, label=f"held-out {name}")
        axes.axhline(baseline.loss, color=color, linestyle=":", linewidth=1, label=f"unigram entropy of {name}")
    axes.legend(frameon=False)
    _save(figure, folder / "loss.png")
    for key, label in (("lr", "learning rate"), ("grad_norm", "gradient norm before clipping")):
        figure, axes = _figure(label)
        axes.plot(numbers, [row[key] for row in steps], color="tab:blue", linewidth=0.8)
        _save(figure, folder / ("learning_rate.png" if key == "lr" else f"{key}.png"))


def _figure(label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.add_subplot()
    axes.set(xlabel="step", ylabel=label)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
