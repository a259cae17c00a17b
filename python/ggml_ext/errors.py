"""The one exception that users see, and how its messages list names."""

from __future__ import annotations

from collections.abc import Sequence


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
