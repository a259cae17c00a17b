"""How a command that Ctrl-C ends tells its parent so."""

from __future__ import annotations

import signal

INTERRUPTED = (130, -signal.SIGINT)
"""``returncode`` of ``python -m MODULE``. A shell says 130 of both: CPython ends such a process by the signal
itself if it came while ``exec`` ran a string, as importing a dataclass does, even though the module caught
the KeyboardInterrupt and exited (``unhandled_keyboard_interrupt`` in Python/pythonrun.c)."""
