"""What every bench does: measure one thing after the other, keep the rows, print them.

Every bench takes

- `names` of what it measures: all there is, where there is none;
- `repeats`, rounds of each at most, of which the median counts;
- `output`, a CSV file (`zoo.tables`): rows go there as they are finished, those of other names stay in it.
"""

import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import torch
import transformers
from tqdm import tqdm

from zoo.bench import cpu
from zoo.bench.results import format_table
from zoo.errors import unknown_name
from zoo.provenance import commit
from zoo.tables import Row, read_table, update_table

Case = tuple[str, Callable[[int], list[Row]]]
"""What is measured, and a call that measures it in so many rounds at most."""


def run_cases(
    cases: Iterable[Case],
    columns: Sequence[str],
    repeats: int,
    output: Path | None,
    clock: ModuleType = cpu,
    unprinted: Collection[str] = (),
) -> None:
    """Measure cases; whatever stops it, the finished rows are printed, and in the file if there is one.

    Args:
        cases: one after the other.
        columns: of the file. The first is a name; from `repeats` on they say how and where the rows came to be.
        repeats, output: as of every bench.
        clock: `zoo.bench.cpu` or `zoo.bench.gpu`.
        unprinted: columns in front of `repeats` that are in the file only.

    Raises:
        ValueError: if `repeats` is below 1, the file is of another kind or there is no such device; after all cases if
            a contender got no time, since it computes something else.
    """
    if repeats < 1:
        raise ValueError(f"--repeats must be 1 or more, got {repeats}")
    if "ZOO_KERNELS" in os.environ:
        raise ValueError("ZOO_KERNELS asks for one form of every op, a bench leaves the choice to the zoo: unset it")
    if output:
        read_table(output, columns)  # a file of another kind is found now, not when there are rows
    source = _provenance(clock)
    rows: list[Row] = []
    try:
        with tqdm(list(cases), leave=False) as bar:
            for name, measure in bar:
                bar.set_description(name)
                rows += [row | source for row in measure(repeats)]
                if output:
                    update_table(output, columns, columns[:1], rows)
    finally:
        if rows:
            print(format_table(rows, [name for name in columns[: columns.index("repeats")] if name not in unprinted]))
            print(", ".join(f"{name} {value}" for name, value in source.items()))
    untimed = [f"{row[columns[0]]} {row['contender']}" for row in rows if "milliseconds" not in row]
    if untimed:
        raise ValueError(f"{', '.join(dict.fromkeys(untimed))}: no time, the difference from the zoo's is too large")


def choose(names: Sequence[str], known: Sequence[str], kind: str) -> list[str]:
    """Those that are named, or all that there are, in the order of the latter.

    Raises:
        ValueError: on a name that there is nothing for.
    """
    for name in names:
        if name not in known:
            raise unknown_name(kind, name, known)
    return [name for name in known if name in names or not names]


def _provenance(clock: ModuleType) -> Row:
    """Where, when and with what rows came to be."""
    if clock is cpu and clock.allocator() == "default":
        print("zoo: THP_MEM_ALLOC_ENABLE=1 spares large tensors page faults; it is not set", file=sys.stderr)
    return {
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "device": clock.device_name(),
        "threads": 1,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "allocator": clock.allocator(),
    }
