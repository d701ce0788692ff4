"""Asked to stop, by a person (Ctrl-C), a scheduler (SIGTERM) or a hang-up (SIGHUP), a run ends its step and saves."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_PATIENCE = 3.0  # seconds in which further signals are the same request: a launcher may pass on what workers got too


class StopRequest:
    """Whether the process was asked to stop."""

    requested = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note the signals instead of dying of them; another one, some seconds later, interrupts at once."""
    stop, first = StopRequest(), 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal first
        if stop.requested and time.monotonic() > first + _PATIENCE:
            raise KeyboardInterrupt
        if not stop.requested:
            stop.requested, first = True, time.monotonic()

    with handling_stops(note):
        yield stop


@contextmanager
def handling_stops(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Call a handler for the signals that ask to stop. A lost terminal that `nohup` lets one ignore stays ignored."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
