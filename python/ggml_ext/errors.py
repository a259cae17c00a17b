"""The one exception that users see."""

from __future__ import annotations


class GgmlExtError(Exception):
    """An error that a user can act on; its text is one line, "what: where; remedy".

    The command line prints it after "ggml-ext: error: " and exits with status 1.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
