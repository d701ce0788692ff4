"""What comes out: rows, the targets they are held against, and the table they make.

A ratio says how many times faster a row's contender is than the one in the column's name, at the same size and in the
same pass; `loop` is the op's reference form, one step after the other in PyTorch, `chunked` its other one.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from zoo.bench.workload import BOTH, FORWARD, Workload
from zoo.errors import unknown_name
from zoo.files import whole_file
from zoo.provenance import commit

Row = dict[str, str | int]

_RATIOS = {
    "ratio_to_transformers": "transformers",
    "ratio_to_torch": "torch",
    "ratio_to_loop": "reference",
    "ratio_to_chunked": "chunked",
    "ratio_to_fla": "fla",
    "ratio_to_mamba_ssm": "mamba_ssm",
}
PROVENANCE = ("commit", "date", "device", "threads", "torch", "transformers", "allocator")
COLUMNS = (
    *("op", "size", "pass", "contender", "milliseconds", *_RATIOS),
    "of_ceiling",  # the time that memory and multiplier need at least, over the time taken
    "speedup_2_threads",  # wall time with one thread over that with two
    "peak_megabytes",  # beyond what was there before the call
    "difference",  # from the first contender, relative to the largest entry
    *("target", "met", "repeats", *PROVENANCE),
)

# What an op has to reach on one thread of a CPU: at least, but for memory at most. By op, variant and pass.
TARGETS = {
    ("linear_scan", "", FORWARD): {"ratio_to_transformers": 8, "of_ceiling": 0.5},
    ("linear_scan", "", BOTH): {"ratio_to_loop": 5},
    ("selective_scan", "", FORWARD): {"ratio_to_transformers": 6, "ratio_to_loop": 5},
    ("selective_scan", "", BOTH): {"ratio_to_loop": 5},
    ("selective_scan", "long", BOTH): {"peak_megabytes": 100},
    ("decay_attention", "", FORWARD): {"ratio_to_transformers": 6},
    ("decay_attention", "", BOTH): {"ratio_to_transformers": 4.5},
    ("decay_attention", "normalized", FORWARD): {"ratio_to_transformers": 2.4},
    ("decay_attention", "normalized", BOTH): {"ratio_to_transformers": 2.4},
    ("delta_rule", "gated", FORWARD): {"ratio_to_transformers": 4},
    ("delta_rule", "gated", BOTH): {"ratio_to_transformers": 3.5},
    ("delta_rule", "dplr", FORWARD): {"ratio_to_loop": 12},
    ("cell_scan", "slstm", FORWARD): {"ratio_to_loop": 4, "ratio_to_chunked": 4},
    ("cell_scan", "slstm", BOTH): {"ratio_to_loop": 4, "ratio_to_chunked": 4},
    ("cell_scan", "lstm", FORWARD): {"ratio_to_loop": 4, "ratio_to_chunked": 4},
    ("cell_scan", "lstm", BOTH): {"ratio_to_loop": 4, "ratio_to_chunked": 4},
    ("cell_scan", "gru", FORWARD): {"ratio_to_loop": 4, "ratio_to_chunked": 4},
    ("cell_scan", "gru", BOTH): {"ratio_to_loop": 4, "ratio_to_chunked": 4},
    ("memory_gd", "", FORWARD): {"ratio_to_loop": 12},
    ("memory_gd", "", BOTH): {"ratio_to_loop": 12},
}


@dataclass
class Measurement:
    """One contender in one pass; no seconds where it does not agree with the op."""

    contender: str
    difference: float
    seconds: float | None = None
    repeats: int = 0
    speedup_2_threads: float | None = None
    peak_megabytes: float | None = None


class Peaks(NamedTuple):
    """What a device can do at most, measured."""

    bytes_per_second: float
    flops_per_second: float

    def least_seconds(self, bytes_moved: float, flops: float) -> float:
        return max(bytes_moved / self.bytes_per_second, flops / self.flops_per_second)


class RowFile:
    """Rows by their first column, in a CSV file too: those of a name take the place of what the file had of it.

    Args:
        path: the file; None: there is none.
        columns: of it.
    """

    def __init__(self, path: Path | None, columns: Sequence[str]):
        self.rows: list[Row] = []
        self._path, self._columns = path, columns
        self._before = read_csv(path, columns) if path else []

    def add(self, rows: Iterable[Row]) -> None:
        """Take in rows that are finished."""
        self.rows += rows
        if self._path:
            key = self._columns[0]
            measured = {row[key] for row in self.rows}
            kept = (row for row in self._before if row[key] not in measured)
            write_csv([*kept, *self.rows], self._path, self._columns)


def check_request(names: Sequence[str], known: Sequence[str], kind: str, repeats: int) -> None:
    """Raise ValueError on a name that there is nothing for, or less than one round."""
    check_names(names, known, kind)
    if repeats < 1:
        raise ValueError(f"--repeats must be 1 or more, got {repeats}")


def check_names(names: Sequence[str], known: Sequence[str], kind: str = "op") -> None:
    """Raise ValueError on a name that there is nothing for."""
    for name in names:
        if name not in known:
            raise unknown_name(kind, name, known)


def provenance(device_name: str, threads: int, allocator: str) -> Row:
    """Where, when and with what the rows came to be."""
    return {
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name,
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "allocator": allocator,
    }


def make_rows(
    workload: Workload,
    which: str,
    measurements: list[Measurement],
    least_seconds: float,
    targets: dict[str, float],
    provenance: Row,
) -> list[Row]:
    """The rows of a workload in a pass. The first measurement is the op's own: the targets are for that."""
    seconds = {x.contender: x.seconds for x in measurements if x.seconds is not None}
    rows = []
    for x in measurements:
        figures: dict[str, float | None] = {
            "speedup_2_threads": x.speedup_2_threads,
            "peak_megabytes": x.peak_megabytes,
        }
        if x.seconds is not None:
            figures["milliseconds"] = 1e3 * x.seconds
            figures["of_ceiling"] = least_seconds / x.seconds
            for column, other in _RATIOS.items():
                if other in seconds and other != x.contender:
                    figures[column] = seconds[other] / x.seconds
        own = targets if x is measurements[0] else {}
        rows.append(
            {
                "op": workload.op,
                "size": workload.size,
                "pass": which,
                "contender": x.contender,
                **{column: short(figure) for column, figure in figures.items() if figure is not None},
                "difference": f"{x.difference:.0e}",
                "target": describe_targets(own),
                "met": verdict(own, figures),
                "repeats": x.repeats,
                **provenance,
            }
        )
    return rows


def read_csv(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a file, none where there is no file.

    Raises:
        ValueError: if it is another kind of file.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(columns):
            raise ValueError(f"{path} has other columns than are written to it: remove it, or name another file")
        return list(reader)


def write_csv(rows: Iterable[Row], path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """Write rows by their first column, in the order of measurement, under a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row[columns[0]]))


def format_columns(rows: list[Row], columns: Sequence[str]) -> str:
    """The figures of rows for people, without what stands beside every row's."""
    shown = columns[: columns.index("repeats")]
    return align([list(shown), *([str(row[column]) for column in shown] for row in rows)])


def format_table(rows: list[Row]) -> str:
    """Rows for people: what stands beside every row's figures, and columns without any, are left out."""
    shown = [column for column in COLUMNS[: COLUMNS.index("difference")] if any(row.get(column) for row in rows)]
    return align([[*shown, "met"], *([str(row.get(column, "")) for column in [*shown, "met"]] for row in rows)])


def align(lines: list[list[str]]) -> str:
    """Cells in columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (map(str.ljust, line, widths) for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def short(x: float) -> str:
    """Three digits, never an exponent for a large number."""
    return f"{x:.0f}" if x >= 1000 else f"{x:.3g}"


def describe_targets(targets: dict[str, float]) -> str:
    return ", ".join(f"{column} {'<=' if _is_most(column) else '>='} {bound:g}" for column, bound in targets.items())


def verdict(targets: dict[str, float], figures: dict[str, float | None]) -> str:
    """`yes`, `no`, or `unknown` where a figure is missing; nothing without targets."""
    if not targets:
        return ""
    if any(figures.get(column) is None for column in targets):
        return "unknown"
    met = (
        figures[column] <= bound if _is_most(column) else figures[column] >= bound for column, bound in targets.items()
    )
    return "yes" if all(met) else "no"


def _is_most(column: str) -> bool:
    return column in ("peak_megabytes", "loader")
