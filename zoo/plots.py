"""Pictures and tables of what was measured, made of the CSV files in a folder: `zoo plots`.

    columns of the file             what is made of it
    run, data, split, tokens, loss  for each kind of data, loss curves; `add_runs` writes such a file
    task, setting, state_bytes      for each task, quality against the state of a sequence (`zoo eval --results`)
    length, tokens_per_second       speed against length (`zoo bench length`)

A picture has in its metadata the hash of the rows that it shows, so that a stale one can be found. A table stands in a
page between two lines, `<!-- zoo plots NAME -->` and `<!-- end of table -->`; it has the name of its picture. If its
second column is `expected`, that is written by hand and stays, as do rows of models that are not measured yet.
"""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from zoo import charts
from zoo.checkpoint import read_json
from zoo.errors import unknown_name
from zoo.files import whole_file
from zoo.layout import shelf
from zoo.tables import update_table
from zoo.train.report import read_log

RUN_COLUMNS = ("run", "data", "split", "step", "tokens", "loss", "parameters", "commit", "seed", "device", "date")

_HASH = "Rows"  # the name of the hash in a picture's metadata
_POINTS = 100  # of a loss curve
_EXPECTED = "expected"
_TABLE = re.compile(r"(<!-- zoo plots (\S+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


@dataclass(frozen=True)
class Kind:
    """What is made of files with certain columns."""

    name: str
    columns: tuple[str, ...]
    source: str
    """The command that writes such a file."""
    draw: Callable[[list[charts.Row]], Figure]
    tabulate: Callable[[list[charts.Row]], list[list[str]]]
    """Rows of the table, the header first."""
    split_by: str | None = None
    """The column of which every value gets a picture and a table of its own."""


KINDS = (
    Kind(
        "loss curves",
        ("run", "data", "split", "tokens", "loss", "parameters"),
        "zoo plots --runs",
        charts.draw_losses,
        charts.tabulate_losses,
        split_by="data",
    ),
    Kind(
        "quality against state",
        ("model", "task", "setting", "metric", "value", "stderr", "state_bytes", "parameters"),
        "zoo eval --results",
        charts.draw_quality,
        charts.tabulate_quality,
        split_by="task",
    ),
    Kind(
        "speed against length",
        ("model", "parameters", "pass", "length", "tokens_per_second"),
        "zoo bench length --output",
        charts.draw_speed,
        charts.tabulate_speed,
    ),
)


@dataclass(frozen=True)
class Exhibit:
    """A picture and a table."""

    name: str
    kind: Kind
    rows: list[charts.Row]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()

    def markdown(self, expected: Mapping[str, str]) -> str:
        """The table, as lines of Markdown; with what is expected of each name in its first column, if that is known."""
        header, *rows = self.kind.tabulate(self.rows)
        if expected:
            rows += [[name, *[""] * (len(header) - 1)] for name in expected if name not in {row[0] for row in rows}]
            rows = [[row[0], expected.get(row[0], ""), *row[1:]] for row in rows]
            header = [header[0], _EXPECTED, *header[1:]]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *rows))


def exhibits(folder: Path) -> dict[str, Exhibit]:
    """All that can be made of the CSV files in a folder, by its name.

    Raises:
        ValueError: if two have the same name.
    """
    found = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for kind in KINDS:
            if not rows or not set(kind.columns) <= rows[0].keys():
                continue
            if kind.split_by is None:
                found.append(Exhibit(path.stem, kind, rows))
                continue
            for value in dict.fromkeys(row[kind.split_by] for row in rows):
                own = [row for row in rows if row[kind.split_by] == value]
                found.append(Exhibit(f"{path.stem}_{value}", kind, own))
    if twice := [name for name, count in Counter(exhibit.name for exhibit in found).items() if count > 1]:
        raise ValueError(f"two files in {folder} make a {twice[0]}.png: rename one of them")
    return {exhibit.name: exhibit for exhibit in found}


def pages() -> list[Path]:
    """The README of the checkout and those of the tasks, which may hold tables."""
    return [path for path in (shelf("evals").parent / "README.md", *shelf("evals").rglob("README.md")) if path.exists()]


def make(folder: Path, pages: Iterable[Path] = ()) -> list[str]:
    """Draw what is missing or stale, and fill in the tables of pages; lines about what was done.

    Raises:
        ValueError: if a page asks for a table that there are no rows for.
    """
    shown = exhibits(folder)
    lines = []
    for kind in KINDS:
        if not any(exhibit.kind is kind for exhibit in shown.values()):
            lines.append(f"no {kind.name}: no CSV file in {folder} has such rows; `{kind.source}` writes them")
    for exhibit in shown.values():
        path = folder / f"{exhibit.name}.png"
        if _is_stale(path, exhibit):
            with whole_file(path) as partial:
                _save(exhibit.kind.draw(exhibit.rows), partial, exhibit.sha256)
            lines.append(f"drawn: {path}")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        if (filled := _fill(text, shown)) != text:
            with whole_file(page) as partial:
                partial.write_text(filled, encoding="utf-8")
            lines.append(f"filled in: {page}")
    return lines


def find_stale(folder: Path, pages: Iterable[Path] = ()) -> list[str]:
    """Pictures and pages that do not show what the CSV files say now, and pictures of rows that are gone.

    Raises:
        ValueError: if a page asks for a table that there are no rows for.
    """
    shown = exhibits(folder)
    stale = [f"{name}.png" for name, exhibit in shown.items() if _is_stale(folder / f"{name}.png", exhibit)]
    stale += [path.name for path in sorted(folder.glob("*.png")) if path.stem not in shown and _hash_in(path)]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    return stale + [str(page) for page, text in texts.items() if _fill(text, shown) != text]


def add_runs(runs: Sequence[Path], path: Path) -> None:
    """Add the loss curves of training runs to a CSV file, in place of older ones of runs of the same name.

    Args:
        runs: folders of runs, with `log.jsonl` and a checkpoint `latest`.
        path: the file.

    Raises:
        ValueError: if a folder is none of a run, two have the same name, or the file is of another kind.
    """
    curves = [row for run in runs for row in _curve(run.absolute())]
    names = {row["run"] for row in curves}
    if len(names) < len(runs):
        raise ValueError(f"{len(runs)} runs have {len(names)} names, {', '.join(sorted(names))}: rename their folders")
    update_table(path, RUN_COLUMNS, ("run",), curves)


def _curve(run: Path) -> Iterable[dict[str, Any]]:
    """Means of the training loss over stretches of a run, and the held-out losses."""
    if not (run / "log.jsonl").is_file() or not (run / "latest" / "training.json").is_file():
        raise ValueError(f"{run} is no training run: it has no log.jsonl or no latest/training.json")
    training = read_json(run / "latest" / "training.json")
    log = read_log(run / "log.jsonl")
    steps = [row for row in log if row.get("loss") is not None]
    stretch = -(-len(steps) // _POINTS)
    points = []
    for start in range(0, len(steps), stretch):
        part = steps[start : start + stretch]
        points.append(("training", part[-1]["step"], sum(row["loss"] for row in part) / len(part)))
    for row in log:
        points += [(name, row["step"], score["loss"]) for name, score in row.get("validation", {}).items()]
    for split, step, loss in points:
        yield {
            "run": run.name,
            "data": "+".join(training["data"]["sources"]),
            "split": split,
            "step": step,
            "tokens": round(step * training["tokens"] / training["step"]),
            "loss": f"{loss:.4f}",
            **{column: training[column] for column in ("parameters", "commit", "seed", "device", "date")},
        }


def _save(figure: Figure, path: Path, sha256: str) -> None:
    """Write a PNG file with the hash of its rows; of 256 colours, which makes it a third as large."""
    drawn, information = BytesIO(), PngInfo()
    figure.savefig(drawn, dpi=100, format="png")
    information.add_text(_HASH, sha256)
    with Image.open(drawn) as image:
        reduced = image.convert("RGB").quantize(dither=Image.Dither.NONE)
        reduced.save(path, format="png", optimize=True, pnginfo=information)


def _is_stale(path: Path, exhibit: Exhibit) -> bool:
    return not path.exists() or _hash_in(path) != exhibit.sha256


def _hash_in(path: Path) -> str | None:
    with Image.open(path) as image:
        return image.info.get(_HASH)


def _fill(text: str, shown: dict[str, Exhibit]) -> str:
    def table(found: re.Match) -> str:
        begin, name, before, end = found.groups()
        if name not in shown:
            raise unknown_name("table of `zoo plots`", name, shown)
        return begin + shown[name].markdown(_expected_in(before)) + end

    return _TABLE.sub(table, text)


def _expected_in(table: str) -> dict[str, str]:
    """What is written by hand in a table of Markdown, by the name in its first column."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1] for row in rows[2:]} if rows and rows[0][1:2] == [_EXPECTED] else {}
