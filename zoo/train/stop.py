"""Asked to stop, by a person (Ctrl-C) or by a scheduler (SIGTERM), a run ends its step and saves."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class StopRequest:
    """Whether the process was asked to stop."""

    requested = False


@contextmanager
def stop_requests(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT instead of dying of them; a second one interrupts at once."""
    stop = StopRequest()

    def note(number: int, frame: Any) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        say("stopping after this step; once more to stop at once, without a checkpoint")

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
