"""Asked to stop, by a person (Ctrl-C) or by a scheduler (SIGTERM), a run ends its step and saves."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_PATIENCE = 3.0  # seconds in which further signals are the same request: a launcher may pass on what workers got too


class StopRequest:
    """Whether the process was asked to stop."""

    requested = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT instead of dying of them; another one, some seconds later, interrupts at once."""
    stop, first = StopRequest(), 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal first
        if stop.requested and time.monotonic() > first + _PATIENCE:
            raise KeyboardInterrupt
        if not stop.requested:
            stop.requested, first = True, time.monotonic()

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
