"""What comes out of a bench: rows, the targets they are held against, and the table they make.

A ratio says how many times faster a row's contender is than the one in the column's name, at the same size and in the
same pass; `loop` is the op's reference form, one step after the other in PyTorch, `chunked` its other one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from zoo.bench.workload import BOTH, FORWARD, Workload
from zoo.tables import Row

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

# What an op has to reach on one thread of a CPU, by op, variant and pass.
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
    ("memory_gd", "", FORWARD): {"ratio_to_loop": 12, "ratio_to_chunked": 3},
    ("memory_gd", "", BOTH): {"ratio_to_loop": 12, "ratio_to_chunked": 3},
}
_AT_MOST = ("peak_megabytes", "loader")  # the targets of these columns; those of others are at least


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


def make_rows(
    workload: Workload,
    which: str,
    measurements: list[Measurement],
    least_seconds: float,
    targets: dict[str, float],
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
        rows.append(
            {
                "op": workload.op,
                "size": workload.size,
                "pass": which,
                "contender": x.contender,
                **judge(figures, targets if x is measurements[0] else {}),
                "difference": f"{x.difference:.0e}",
                "repeats": x.repeats,
            }
        )
    return rows


def judge(figures: dict[str, float | None], targets: dict[str, float]) -> Row:
    """The figures that are known, in three digits; the targets; and whether they are met.

    That is `yes`, `no`, or `unknown` where a figure is missing; nothing without targets.
    """
    return {
        **{column: short(figure) for column, figure in figures.items() if figure is not None},
        "target": ", ".join(
            f"{column} {'<=' if column in _AT_MOST else '>='} {bound:g}" for column, bound in targets.items()
        ),
        "met": _verdict(figures, targets),
    }


def _verdict(figures: dict[str, float | None], targets: dict[str, float]) -> str:
    if not targets:
        return ""
    if any(figures.get(column) is None for column in targets):
        return "unknown"
    met = (
        figures[column] <= bound if column in _AT_MOST else figures[column] >= bound
        for column, bound in targets.items()
    )
    return "yes" if all(met) else "no"


def format_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows for people; columns without any figure are left out."""
    shown = [column for column in columns if any(row.get(column) for row in rows)]
    return align([shown, *([str(row.get(column, "")) for column in shown] for row in rows)])


def align(lines: list[list[str]]) -> str:
    """Cells in columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (map(str.ljust, line, widths) for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def short(x: float) -> str:
    """Three digits, never an exponent for a large number."""
    return f"{x:.0f}" if x >= 1000 else f"{x:.3g}"
