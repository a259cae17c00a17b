"""Which run a file belongs to: the facts that identify a process, and whether it still lives.

A process id alone says little: ids are used again, start anew at every boot, and mean another process in
another container. The facts below are written beside what a run makes, so that a later run can tell the
leftovers of a dead one from the files of a living one.
"""

from __future__ import annotations

import fcntl
import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol


class HasFileno(Protocol):
    def fileno(self) -> int: ...


@dataclass(frozen=True)
class Owner:
    """``start``: time of the process's start in clock ticks since boot. ``boot``: the kernel's random boot
    id. ``namespace``: of process ids. The three are "" without /proc. ``host``: the machine's name."""

    pid: int
    start: str
    boot: str
    namespace: str
    host: str


def current() -> Owner:
    """The calling process."""
    return Owner(os.getpid(), _start_time(os.getpid()) or "", *_system())


@cache
def _system() -> tuple[str, str, str]:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return boot, str(Path("/proc/self/ns/pid").readlink()), platform.node()
    except OSError:
        return "", "", platform.node()


def _start_time(pid: int) -> str | None:
    """The process's time of start; "" where there is no /proc, None if there is no such process."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""
    try:
        # pid (command) state ppid ...: the command may hold blanks and brackets; field 22 is starttime.
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = line.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def parse(facts: Any) -> Owner:
    """The owner from JSON. Raises ValueError for anything else."""
    names = ("start", "boot", "namespace", "host")
    if (
        not isinstance(facts, dict)
        or not isinstance(facts.get("pid"), int)
        or not all(isinstance(facts.get(name), str) for name in names)
    ):
        raise ValueError("no owner")
    return Owner(facts["pid"], *(facts[name] for name in names))


def lives(owner: Owner) -> bool | None:
    """Whether the owner still runs; None for one on another machine or in another container."""
    boot, namespace, host = _system()
    if owner.boot != boot or (not boot and owner.host != host):
        return False if owner.host == host else None
    if owner.namespace != namespace:
        return None
    return _start_time(owner.pid) == owner.start


def lock(file: HasFileno) -> bool:
    """Lock the open file for this process until it is closed; False where the file system has no locks.

    Raises BlockingIOError if another process holds it.
    """
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # ENOSYS, ENOLCK, EOPNOTSUPP, EPERM: Lustre without -o flock, 9p, NFS without lockd, FUSE
        return False
    return True
