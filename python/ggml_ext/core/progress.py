"""Progress of long work: a bar on a terminal, plain lines elsewhere; always on standard error. Also how
sizes and durations are written."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL = 10.0  # seconds between two plain lines


class Advance(Protocol):
    """Says that n more units are done; ``note``: a few words on what was found, such as a loss."""

    def __call__(self, n: float, note: str = "", /) -> None: ...


@contextmanager
def track(total: float, description: str, unit: str) -> Iterator[Advance]:
    """Yields ``advance(n)``, to be called when n more units are done. ``total`` is in units."""
    console = Console(stderr=True)
    if console.is_terminal:
        with _bar(console, total, description, unit) as advance:
            yield advance
    else:
        yield _plain(total, description, unit)


@contextmanager
def _bar(console: Console, total: float, description: str, unit: str) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=total, rate="", note="")

        def advance(n: float, note: str = "") -> None:
            speed = progress.tasks[0].speed
            progress.update(task, advance=n, rate=f"{speed:,.4g} {unit}/s" if speed else "", note=note)

        yield advance


def _plain(total: float, description: str, unit: str) -> Advance:
    start = last = time.monotonic()
    done = 0.0

    def advance(n: float, note: str = "") -> None:
        nonlocal last, done
        done += n
        now = time.monotonic()
        if now - last < PLAIN_INTERVAL or done >= total:
            return
        last = now
        rate = done / (now - start)
        left = (total - done) / rate if rate > 0 else float("inf")
        print(
            f"{description}: {100 * done / total:.0f} %, {rate:,.4g} {unit}/s, {left:.0f} s left"
            + (f"; {note}" if note else ""),
            file=sys.stderr,
            flush=True,
        )

    return advance


def size_text(n_bytes: float) -> str:
    """A size for people."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def duration_text(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
