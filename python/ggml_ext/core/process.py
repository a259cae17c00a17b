"""Runs a program of llama.cpp, watches its output, and never leaves it behind."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cffi

from ggml_ext.core.errors import GgmlExtError

_TAIL = 64 * 1024
_POLL_SECONDS = 0.5
_STOP_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Finished:
    """``status``: exit status, negative for a signal. ``output``: the end of stdout and stderr together."""

    status: int
    output: str


def run(
    command: Sequence[str | Path],
    *,
    watch: Callable[[str], None] | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Finished:
    """Runs the command to its end and returns its status and the end of its output.

    ``watch`` gets the output so far (its last 64 KiB) whenever there is more, and at least every half
    second. The program runs in a session of its own, so that Ctrl-C reaches only us; any exception here,
    KeyboardInterrupt included, ends it before it is passed on, and on Linux so does our death by SIGKILL.
    Raises GgmlExtError if it cannot be started.
    """
    try:
        child = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=None if env is None else {**os.environ, **env},
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )
    except OSError as exc:
        raise GgmlExtError(f"cannot start {command[0]}: {exc.strerror}; reinstall ggml-ext") from exc
    try:
        output = _drain(child, watch)
        return Finished(child.wait(), output)
    except BaseException:
        _stop(child)
        raise


@cache
def _libc() -> Any:
    """libc's prctl; None where there is none: it is Linux's own."""
    if not sys.platform.startswith("linux"):
        return None
    ffi = cffi.FFI()
    ffi.cdef("int prctl(int, unsigned long, unsigned long, unsigned long, unsigned long);")
    return ffi.dlopen(None)


def die_with_parent() -> Callable[[], None] | None:
    """What a child runs before its program so that it gets SIGTERM when we die, however that happens.

    None where the system cannot do it. The child has only the caller's thread, so it must wait for no other.
    """
    libc, parent = _libc(), os.getpid()
    if libc is None:
        return None

    def arrange() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # dead before we asked
            os._exit(128 + signal.SIGTERM)

    return arrange


def last_words(finished: Finished) -> str:
    """The last line that looks like an error, or what ended the program."""
    if finished.status < 0:
        cause = "out of memory?" if finished.status == -signal.SIGKILL else "a crash"
        return f"ended by signal {-finished.status}: {cause}"
    lines = [line.strip() for line in finished.output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
    return (errors or lines or [f"exit status {finished.status}"])[-1]


def up_to(advance: Callable[[float], None]) -> Callable[[float], None]:
    """Turns "n more are done" into "n are done by now", which is what a program's output or file says."""
    before = 0.0

    def done(n: float) -> None:
        nonlocal before
        if n > before:
            advance(n - before)
            before = n

    return done


def _drain(child: subprocess.Popen[bytes], watch: Callable[[str], None] | None) -> str:
    assert child.stdout is not None
    kept = b""
    with child.stdout, selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            if selector.select(_POLL_SECONDS):
                new = os.read(child.stdout.fileno(), _TAIL)
                if not new:
                    return kept.decode("utf-8", "replace")
                kept = (kept + new)[-_TAIL:]
            if watch is not None:
                watch(kept.decode("utf-8", "replace"))


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ends the program and whatever it started: its session is its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
