"""How fast the ops are, beside other code that computes the same: `zoo bench ops`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from zoo.bench import cpu, gpu
from zoo.bench.results import COLUMNS, TARGETS, make_rows
from zoo.bench.runner import choose, run_cases
from zoo.bench.trial import bytes_moved, make_trials
from zoo.bench.workload import BOTH, PASSES, Workload, known_ops, workloads_of
from zoo.tables import Row


def bench_ops(names: Sequence[str] = (), device: str = "cpu", repeats: int = 20, output: Path | None = None) -> None:
    """Time ops in all their forms, forward and backward, beside other libraries' code.

    Args:
        names: of ops.
        device: `cpu` or `cuda`.
        repeats, output: as of every bench (`zoo.bench.runner`).

    Raises:
        ValueError: on an unknown op, where there is no such device, or if a contender computes something else.
    """
    workloads = [workload for op in choose(names, known_ops(), "op") for workload in workloads_of(op, device)]
    run(workloads, device, repeats, output)


def run(workloads: list[Workload], device: str, repeats: int, output: Path | None) -> None:
    """Time workloads."""
    clock = {"cpu": cpu, "cuda": gpu}[device]
    cases = [
        (f"{workload.op} {workload.size} {which}", partial(_measure, clock, workload, which, device))
        for workload in workloads
        for which in PASSES
        if which in workload.passes
    ]
    run_cases(cases, COLUMNS, repeats, output, clock, unprinted=("difference", "target"))


def _measure(clock: ModuleType, workload: Workload, which: str, device: str, repeats: int) -> list[Row]:
    trials = make_trials(workload, which, device, clock.DTYPE)
    if not trials:
        return []
    least = clock.peaks().least_seconds(
        bytes_moved(trials[0], which == BOTH), workload.flops(**workload.sizes) * (3 if which == BOTH else 1)
    )
    measurements = clock.measure(trials, repeats, workload.peak_memory)
    targets = TARGETS.get((workload.op, workload.variant, which), {}) if device == "cpu" else {}
    return make_rows(workload, which, measurements, least, targets)
