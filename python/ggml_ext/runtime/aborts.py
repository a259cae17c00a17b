"""One line and status 1 where ggml or C++ would abort: GGML_ASSERT, GGML_ABORT and exceptions that nothing
catches end in a call of ours.

They are for bugs, but also all that llama.cpp says about a file whose sizes do not fit each other, which only
the graph of its architecture shows. The process cannot go on: no C++ destructor has run, locks may be held.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from ggml_ext.core import atomic, paths

_PLACE = re.compile(r"^(?P<file>.*?):(?P<line>\d+): ")

_running: list[Path] = []
"""The model that llama.cpp was called with last, in a list of at most one."""


def running(path: Path) -> None:
    """Notes which model the next calls are about."""
    _running[:] = [path]


@cache
def install() -> None:
    """From here on an abort of ggml ends the process with status 1, after one line on stderr: the model, the
    place in the source, the assertion. Temporary files are removed."""
    library, (abort, terminate) = ctypes.CDLL(str(paths.library("ggml-base"))), _callbacks()
    library.ggml_set_abort_callback(abort)
    with suppress(AttributeError):  # a C++ library that is linked statically, or has other names
        library._ZSt13set_terminatePFvvE(terminate)  # std::set_terminate


@cache
def _callbacks() -> tuple[Any, Any]:
    """What C calls with a message, and what C++ calls; cached because they hold on to them for ever."""
    return (
        ctypes.CFUNCTYPE(None, ctypes.c_char_p)(lambda message: _end(f"at {_readable(message)}")),
        ctypes.CFUNCTYPE(None)(lambda: _end("on a C++ exception that nothing caught")),
    )


def _readable(message: bytes) -> str:
    """The message, with the file's name for its path."""
    text = " ".join(message.decode("utf-8", "replace").split())
    return _PLACE.sub(lambda place: f"{Path(place['file']).name}:{place['line']}: ", text)


def _end(how: str) -> None:
    try:
        print(f"ggml-ext: error: {_line(how)}", file=sys.stderr, flush=True)
        atomic.tidy()
    finally:
        os._exit(1)  # a return would abort


def _line(how: str) -> str:
    where = f"{_running[0]}: " if _running else ""
    return (
        f"{where}llama.cpp gave up {how}; check the model's keys with ggml-ext inspect, and report it if "
        "they are right"
    )
