"""The clock of a CPU: processor time of one thread, contenders interleaved round by round."""

import ctypes
import functools
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch.nn import functional as F

from zoo import provenance
from zoo.bench.results import Measurement, Peaks
from zoo.bench.trial import AGREEMENT, Trial, difference

DTYPE = torch.float32

Result = TypeVar("Result")

_BUDGET = 1.5  # seconds that a contender gets for its rounds
_TOO_LONG = 10.0  # seconds after which a first call, page faults included, counts as the only one
_LEAST = 5e-3  # seconds between two looks at the clock


def measure(trials: list[Trial], repeats: int, peak_memory: bool, budget: float | None = None) -> list[Measurement]:
    """Time the contenders of a workload in one pass.

    Args:
        trials: the contenders, the op as it runs by itself first: the others shall agree with it, and it is timed with
            two threads too.
        repeats: rounds, at most: a slow contender gets fewer.
        peak_memory: measure that of each too.
        budget: seconds that a contender gets for its rounds.
    """
    budget = budget or _BUDGET
    with _one_thread():
        measurements, clocked, expected = [], {}, None
        for trial in trials:
            start = time.process_time()
            result, peak = _watch_memory(trial)
            seconds = time.process_time() - start
            found = trial.as_op(result)
            expected = found if expected is None else expected
            measurements.append(Measurement(trial.name, difference(found, expected)))
            if peak_memory and seconds > _TOO_LONG:  # else of a later call, when there is nothing to set up
                measurements[-1].peak_megabytes = peak
            if measurements[-1].difference <= AGREEMENT[DTYPE]:
                clocked[trial.name] = _Clocked(trial, seconds, budget)
        for turn in range(repeats):
            for contender in clocked.values():
                contender.take(turn)
        for trial, measurement in zip(trials, measurements, strict=True):
            if trial.name in clocked:
                measurement.seconds, measurement.repeats = clocked[trial.name].median()
                if trial is trials[0]:
                    measurement.speedup_2_threads = _speedup_2_threads(trial, repeats)
                if peak_memory and measurement.peak_megabytes is None:
                    _, measurement.peak_megabytes = _watch_memory(trial)
    return measurements


def median_time(call: Callable[[], object], repeats: int, budget: float) -> tuple[float, int]:
    """Processor time of a call on one thread, in seconds, and in how many rounds: as many as the budget allows."""
    with _one_thread():
        clocked = _Clocked(call, _processor_time(call), budget)
        for turn in range(repeats):
            clocked.take(turn)
    return clocked.median()


@functools.cache
def peaks() -> Peaks:
    """What one core reads from memory in a second, and multiplies, in the faster of BLAS and oneDNN."""
    with _one_thread():
        x = torch.ones(2**26)
        a = torch.ones(1024, 1024)
        read, product = _least_time(x.sum), _least_time(lambda: a @ a)
        if torch.backends.mkldnn.is_available():
            a = a.to_mkldnn()
            product = min(product, _least_time(lambda: F.linear(a, a)))
    return Peaks(bytes_per_second=x.nbytes / read, flops_per_second=2 * 1024**3 / product)


def device_name() -> str:
    """Of the CPU."""
    return provenance.device_name(torch.device("cpu"))


def allocator() -> str:
    """How large tensors are allocated: PyTorch reads this variable once."""
    return "huge pages" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "default"


class _Clocked:
    """Rounds of a contender, as many as its budget allows."""

    def __init__(self, trial: Callable[[], object], first_seconds: float, budget: float):
        self._trial, self._samples = trial, []
        self._number, self._rounds = 1, 0
        if first_seconds > _TOO_LONG:
            self._samples.append(first_seconds)
            return
        seconds = first_seconds if first_seconds > budget else _processor_time(trial)  # the first warmed up
        self._number = max(1, round(_LEAST / seconds))
        self._rounds = max(1, int(budget / (seconds * self._number)))

    def take(self, turn: int) -> None:
        if turn < self._rounds:
            self._samples.append(_processor_time(self._trial, self._number))

    def median(self) -> tuple[float, int]:
        """Seconds a call, and in how many rounds."""
        return statistics.median(self._samples), len(self._samples)


def _processor_time(call: Callable[[], object], number: int = 1) -> float:
    start = time.process_time()
    for _ in range(number):
        call()
    return (time.process_time() - start) / number


def _least_time(call: Callable[[], object]) -> float:
    return min(_processor_time(call) for _ in range(10))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread, and no garbage collection while the clock runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        torch.set_num_threads(threads)


def _speedup_2_threads(call: Callable[[], object], repeats: int) -> float | None:
    """Wall time with one thread over that with two; None where there is one processor."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if processors < 2:
        return None
    samples = {1: [], 2: []}
    try:
        while len(samples[2]) < repeats and sum(samples[1]) < _BUDGET:
            for threads, seconds in samples.items():
                torch.set_num_threads(threads)
                call()  # the threads start here
                seconds.append(_wall_time(call))
    finally:
        torch.set_num_threads(1)
    one, two = (statistics.median(seconds) for seconds in samples.values())
    return one / two


def _wall_time(call: Callable[[], object]) -> float:
    """Of a call, from as many as take a few milliseconds."""
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < _LEAST:
        call()
        count += 1
    return elapsed / count


def _watch_memory(call: Callable[[], Result]) -> tuple[Result, float | None]:
    """What a call gives, and the megabytes that it takes beyond what the process has.

    These come from the kernel's own mark; None where there is none (it is Linux that has it).
    """
    if sys.platform != "linux":
        return call(), None
    ctypes.CDLL(None).malloc_trim(0)  # what was freed shall not serve the call
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again
    before = _kilobytes("VmRSS")
    result = call()
    return result, (_kilobytes("VmHWM") - before) / 1e3


def _kilobytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {name}")
