"""How many processors this process may use: its affinity, and the CPU quota of its control groups.

Containers and batch systems limit a process by a quota as often as by a set of processors. A thread more
than the quota allows makes every other one wait: ggml's threads spin until the slowest has arrived.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ggml_ext.core.errors import GgmlExtError

MAX_THREADS = 512
"""ggml's GGML_MAX_N_THREADS: it has arrays of that length and does not look whether more are asked for."""


def processors() -> int:
    """Number of processors that this process may use, at least 1."""
    return _within_quota(len(_usable()))


def require_threads(threads: int | None) -> None:
    """Raises GgmlExtError for a negative number and for one above MAX_THREADS. None and 0: a default."""
    if threads is not None and not 0 <= threads <= MAX_THREADS:
        raise GgmlExtError(f"{threads} threads: not a number from 0 to {MAX_THREADS}; give one of them")


def threads_or_cores(threads: int | None) -> int:
    """The number itself, or for None and 0 one thread per physical core. Raises as require_threads."""
    require_threads(threads)
    return threads or min(physical_cores(), MAX_THREADS)


def physical_cores() -> int:
    """Number of processor cores that this process may use, hyper-threads counted once (as llama.cpp does)."""
    usable = _usable()
    cores = set()
    for cpu in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            return _within_quota(len(usable))
    return _within_quota(len(cores))


def quota(root: Path = Path("/")) -> float | None:
    """Processors' worth of time that the control groups allow, versions 1 and 2; None where they do not say.

    The least of the process's own group and all above it, as far as they can be seen. root: where /proc and
    /sys are.
    """
    found = [limit for group in _groups(root) for limit in _limits(group)]
    return min(found, default=None)


def _usable() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _within_quota(count: int) -> int:
    limit = quota()
    return count if limit is None else max(1, min(count, int(limit)))


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the groups that limit this process's time, the innermost first.

    /proc/self/cgroup has a line "hierarchy:controllers:/path" for each; version 2 is hierarchy 0. Inside a
    container the path may be the host's, of which only the top is mounted.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(errors="replace").splitlines()
    except OSError:
        return
    mounted = root / "sys/fs/cgroup"
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            tops = [mounted, mounted / "unified"]
        elif "cpu" in controllers.split(","):
            tops = [mounted / controllers, mounted / "cpu"]
        else:
            continue
        relative = PurePosixPath(*(part for part in PurePosixPath(path).parts if part not in ("/", "..")))
        for top in tops:
            for folder in (relative, *relative.parents):
                yield top / folder


def _limits(group: Path) -> Iterator[float]:
    """cpu.max is "quota period", "max" for none; version 1 has a file for each, and a quota of -1 for none.

    At most one value: the group's own limit.
    """
    try:
        if (group / "cpu.max").is_file():
            allowed, period = (group / "cpu.max").read_text().split()
        else:
            allowed = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        if float(allowed) > 0 and float(period) > 0:
            yield float(allowed) / float(period)
    except (OSError, ValueError):  # no such file, or "max"
        return
