"""The machine: what it is, and the two limits that bench_limits (tests/native) measures."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from ggml_ext.core.errors import GgmlExtError


def measure(program: Path, threads: int) -> dict[str, Any]:
    """bench_limits' JSON. Raises GgmlExtError if the program is missing or fails."""
    try:
        done = subprocess.run(
            [str(program), "--json", "--threads", str(threads), "--passes", "4", "--mib", "512"],
            capture_output=True,
            text=True,
        )
        found: dict[str, Any] = json.loads(done.stdout)
    except OSError as error:
        raise GgmlExtError(
            f"cannot start {program}: {error.strerror}; build it with scripts/setup --tests or use --limits"
        ) from error
    except ValueError as error:
        raise GgmlExtError(f"{program} failed with status {done.returncode}; run it by hand") from error
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit(repository: Path) -> str | None:
    """Commit of the sources, "+" behind it if files differ from it; None outside of a git repository."""
    git = ["git", "-C", str(repository)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        if head.returncode:
            return None
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def switches() -> dict[str, str]:
    """Environment variables that may change speed; not those that name folders."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("GGML_", "OMP_")) and os.sep not in value
    }


def machine(repository: Path, threads: int, compiler: str | None) -> dict[str, Any]:
    """Keys cpu, processors, threads, system, compiler, commit, date, environment (GGML_* and OMP_*)."""
    return {
        "cpu": _cpu_name(),
        "processors": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "compiler": compiler,
        "commit": _commit(repository),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "environment": switches(),
    }
