"""How fast the ops are, beside other code that computes the same: `zoo bench ops`."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

from zoo.bench import cpu, gpu
from zoo.bench.results import (
    COLUMNS,
    TARGETS,
    Row,
    RowFile,
    check_request,
    format_table,
    make_rows,
    provenance,
)
from zoo.bench.trial import bytes_moved, make_trials
from zoo.bench.workload import BOTH, PASSES, Workload, known_ops, workloads_of


def bench_ops(ops: Sequence[str] = (), device: str = "cpu", repeats: int = 20, output: Path | None = None) -> None:
    """Time ops in all their forms, forward and backward, beside other libraries' code, and print a table.

    Args:
        ops: their names; all, where there is none.
        device: `cpu` or `cuda`.
        repeats: rounds at most.
        output: a CSV file. Rows go there as they are finished; those of other ops stay in it.

    Raises:
        ValueError: on an unknown op, where there is no such device, or if a contender computes something else.
    """
    check_request(ops, known_ops(), "op", repeats)
    workloads = [workload for op in sorted(set(ops)) or known_ops() for workload in workloads_of(op, device)]
    run(workloads, device, repeats, output)


def run(workloads: list[Workload], device: str, repeats: int, output: Path | None) -> None:
    """Time workloads; whatever stops it, the finished rows are printed, and in the file if there is one."""
    if "ZOO_KERNELS" in os.environ:
        raise ValueError("ZOO_KERNELS asks for one form of every op, the bench compares them: unset it")
    clock = {"cpu": cpu, "cuda": gpu}[device]
    source = provenance(clock.device_name(), threads=1, allocator=clock.allocator())
    if clock.allocator() == "default" and device == "cpu":
        print("zoo: THP_MEM_ALLOC_ENABLE=1 spares large tensors page faults; it is not set", file=sys.stderr)
    file = RowFile(output, COLUMNS)
    steps = [(workload, which) for workload in workloads for which in PASSES if which in workload.passes]
    try:
        with tqdm(steps, unit="size", leave=False) as bar:
            for workload, which in bar:
                bar.set_description(f"{workload.op} {workload.size} {which}")
                file.add(_measure(clock, workload, which, device, repeats, source))
    finally:
        if file.rows:
            print(format_table(file.rows))
            print(", ".join(f"{name} {value}" for name, value in source.items()))
    wrong = Counter(row["contender"] for row in file.rows if "milliseconds" not in row)
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: no time where the difference from the op is too large")


def _measure(clock: ModuleType, workload: Workload, which: str, device: str, repeats: int, source: Row) -> list[Row]:
    trials = make_trials(workload, which, device, clock.DTYPE)
    if not trials:
        return []
    least = clock.peaks().least_seconds(
        bytes_moved(trials[0], which == BOTH), workload.flops(**workload.sizes) * (3 if which == BOTH else 1)
    )
    measurements = clock.measure(trials, repeats, workload.peak_memory)
    targets = TARGETS.get((workload.op, workload.variant, which), {}) if device == "cpu" else {}
    return make_rows(workload, which, measurements, least, targets, source)
