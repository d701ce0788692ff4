"""The clock of a GPU: CUDA events, contenders interleaved round by round. It has not run on a GPU yet."""

import functools
import statistics
from collections.abc import Callable

import torch

from zoo.bench.results import Measurement, Peaks
from zoo.bench.trial import AGREEMENT, Trial, difference

DTYPE = torch.bfloat16

_WARM_UP = 3  # calls: kernels are compiled in the first, and tuned by some libraries


def measure(trials: list[Trial], repeats: int, peak_memory: bool) -> list[Measurement]:
    """As `zoo.bench.cpu.measure`, by the GPU's own clock."""
    measurements, samples, expected = [], {}, None
    for trial in trials:
        found = trial.as_op(trial())
        expected = found if expected is None else expected
        measurements.append(Measurement(trial.name, difference=difference(found, expected)))
        if measurements[-1].difference <= AGREEMENT[DTYPE]:
            samples[trial.name] = []
            for _ in range(_WARM_UP):
                trial()
    for _ in range(repeats):
        for trial in trials:
            if trial.name in samples:
                samples[trial.name].append(_seconds(trial))
    for trial, measurement in zip(trials, measurements, strict=True):
        if trial.name in samples:
            measurement.seconds, measurement.repeats = statistics.median(samples[trial.name]), repeats
            if peak_memory:
                measurement.peak_megabytes = _peak_megabytes(trial)
    return measurements


@functools.cache
def peaks() -> Peaks:
    """What a copy moves in a second, and a large product of matrices multiplies."""
    source = torch.empty(2**29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    copy, multiply = (lambda: target.copy_(source)), (lambda: a @ a)
    for call in (copy, multiply) * _WARM_UP:
        call()
    copy_seconds = min(_seconds(copy) for _ in range(10))
    product_seconds = min(_seconds(multiply) for _ in range(10))
    return Peaks(2 * source.nbytes / copy_seconds, 2 * 8192**3 / product_seconds)


def device_name() -> str:
    """As the driver has it.

    Raises:
        ValueError: if there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device")
    return torch.cuda.get_device_name()


def allocator() -> str:
    return "default"


def _seconds(call: Callable[[], object]) -> float:
    """Time of one call, with nothing of its inputs in the cache."""
    _larger_than_cache().zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def _larger_than_cache() -> torch.Tensor:
    return torch.empty(2**28, dtype=torch.int8, device="cuda")


def _peak_megabytes(call: Callable[[], object]) -> float:
    """What a call takes beyond what is allocated."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
