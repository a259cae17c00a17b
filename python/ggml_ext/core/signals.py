"""SIGTERM and SIGHUP end a command as Ctrl-C does, so that it leaves nothing behind.

Batch systems, ``docker stop``, systemd and closed terminals send them; Python's default for both is to end
at once, without any cleaning up.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """``number``: the signal that came."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def as_interrupts() -> Iterator[list[int]]:
    """Raise Terminated where one of ENDING comes; one that was ignored before (nohup) stays ignored.

    Yields the numbers of the signals that came.

    Only in the main thread. A closed terminal sends several at once: more of them within a second do not
    disturb the cleaning up that the first has begun.
    """
    latest = -math.inf
    came: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal latest
        if time.monotonic() - latest > 1:
            latest = time.monotonic()
            came.append(number)
            raise Terminated(number)

    previous = {
        number: signal.signal(number, handle)
        for number in ENDING
        if signal.getsignal(number) is signal.SIG_DFL
    }
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
