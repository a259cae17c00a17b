"""The one exception that users see, how its messages list names, what is said of all others, and remarks."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "unable to allocate")

Warn = Callable[[str], None]
"""Gets one line at a time of what did not go as asked, or may surprise."""


def warn(line: str) -> None:
    """A line of a command's remarks on standard error."""
    print(f"ggml-ext: {line}", file=sys.stderr, flush=True)


class GgmlExtError(Exception):
    """An error that a user can act on; its text is one line, "what: where; remedy".

    The command line prints it after "ggml-ext: error: " and exits with status 1.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def listed(names: Sequence[str], most: int = 6) -> str:
    """A count and the first names, for a line of a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} tensor{'s' * (len(names) != 1)}: {', '.join(names[:most])}{more}"


def one_line(error: BaseException) -> str:
    """One line for an unexpected exception: that memory ran out, or what went wrong where in this package."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in _MEMORY):
        on = " of the device" if "cuda" in text.lower() or "hip" in text.lower() else ""
        return f"out of memory{on}; close other programs, or use a smaller --ctx or fewer --threads"
    package = Path(__file__).parents[1]
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(package)] or frames
    where = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    what = f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__
    return f"unexpected {what}{where}; please report it with the command that was run"
