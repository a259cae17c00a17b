"""One line and status 1 where ggml or C++ would abort: GGML_ASSERT, GGML_ABORT and exceptions that nothing
catches end in a call of ours.

They are for bugs, but also all that llama.cpp says about a file whose sizes do not fit each other, which only
the graph of its architecture shows. The process cannot go on: no C++ destructor has run, locks may be held.
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import cffi

from ggml_ext.core import atomic, paths

_PLACE = re.compile(r"^(?P<file>.*?):(?P<line>\d+): ")

_running: list[Path] = []
"""The model that llama.cpp was called with last, in a list of at most one."""


def running(path: Path) -> None:
    """Notes which model the next calls are about."""
    _running[:] = [path]


_CDEF = """
typedef void (*abort_callback)(const char * message);
typedef void (*terminate_handler)(void);
abort_callback ggml_set_abort_callback(abort_callback callback);
terminate_handler _ZSt13set_terminatePFvvE(terminate_handler handler);
"""


@cache
def install() -> tuple[Any, ...]:
    """From here on an abort of ggml ends the process with status 1, after one line on stderr: the model, the
    place in the source, the assertion. Temporary files are removed. Returns what C holds on to."""
    ffi = cffi.FFI()
    ffi.cdef(_CDEF)
    library = ffi.dlopen(str(paths.library("ggml-base")))

    @ffi.callback("abort_callback")  # type: ignore[untyped-decorator]
    def abort(message: Any) -> None:
        _end(f"at {_readable(ffi.string(message))}")

    @ffi.callback("terminate_handler")  # type: ignore[untyped-decorator]
    def terminate() -> None:
        _end("on a C++ exception that nothing caught")

    library.ggml_set_abort_callback(abort)
    with suppress(AttributeError):  # std::set_terminate, where a C++ library has it by this name
        library._ZSt13set_terminatePFvvE(terminate)
    return abort, terminate


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
