"""A run: what was checked and measured so far, and how a program of it is started."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from . import machine
from .plan import CheckError, Kernel

PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run"
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class NotRunError(CheckError):
    """A check that this machine cannot do."""


@dataclass
class Outcome:
    """One check. ``detail``: counts, or why it failed or was not run. ``failing``: cases of test-backend-ops
    that failed, each with ``case`` and ``nmse`` (None: it said none)."""

    name: str
    status: str
    detail: str
    seconds: float
    failing: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Run:
    """``root``: the packed folder. ``work``: where it unpacks and builds; ``logs``: what the programs said.
    ``deadline``: time.monotonic() after which nothing is started any more. ``save``: called after each
    check."""

    root: Path
    work: Path
    logs: Path
    device: machine.Device
    kernels: Sequence[Kernel]
    steps: Sequence[str]
    deadline: float
    save: Callable[[Run], None] = lambda run: None
    bin: Path = Path()
    outcomes: list[Outcome] = field(default_factory=list)
    measured: list[dict[str, Any]] = field(default_factory=list)
    profiles: list[dict[str, Any]] = field(default_factory=list)

    @property
    def backend(self) -> str:
        """Name of the device in llama.cpp."""
        return "CUDA0"

    def command(
        self, name: str, command: Sequence[object], environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program with its output in a file of ``logs``; kills it at the deadline (status 124)."""
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / (re.sub(r"[^\w.-]+", "-", name) + ".log")
        env = {**os.environ, "GGML_EXT_ATTN": "default", **machine.library_path(), **(environment or {})}
        with log.open("w", encoding="utf-8") as file:
            try:
                process = subprocess.Popen(
                    [str(part) for part in command],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=env,
                    start_new_session=True,
                )
            except OSError as error:
                raise CheckError(f"{command[0]}: {error.strerror}") from error
            try:
                code = process.wait(max(1.0, self.deadline - time.monotonic()))
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                code = 124
        return subprocess.CompletedProcess([], code, log.read_text("utf-8", "replace"), "")

    def check(self, name: str, body: Callable[[Outcome], str]) -> bool:
        """One check: body returns the detail of a success and raises CheckError for a failure. The run goes
        on after either."""
        start = time.monotonic()
        outcome = Outcome(name, NOT_RUN, "out of time", 0.0)
        if start <= self.deadline:
            try:
                outcome.status, outcome.detail = PASSED, body(outcome)
            except NotRunError as error:
                outcome.detail = str(error)
            except CheckError as error:
                outcome.status, outcome.detail = FAILED, str(error)
            if outcome.status == FAILED and time.monotonic() > self.deadline:
                outcome.status, outcome.detail = NOT_RUN, "out of time: " + outcome.detail
            outcome.seconds = time.monotonic() - start
        self.outcomes.append(outcome)
        print(f"gpu-check: {name}: {outcome.status}, {outcome.detail} ({outcome.seconds:.1f} s)", flush=True)
        for case in outcome.failing[:20]:
            nmse = "no NMSE" if case["nmse"] is None else f"NMSE {case['nmse']:.3g}"
            print(f"gpu-check:     {nmse}: {case['case']}", flush=True)
        if len(outcome.failing) > 20:
            print(f"gpu-check:     and {len(outcome.failing) - 20} more, in the results", flush=True)
        self.save(self)
        return outcome.status == PASSED

    def measure(self, lines: Sequence[dict[str, Any]]) -> None:
        """Keeps figures and prints each in a short line. Later figures of a contender take the place of
        earlier ones."""
        key = ("part", "shape", "contender")
        new = {tuple(line[name] for name in key) for line in lines}
        self.measured = [line for line in self.measured if tuple(line[name] for name in key) not in new]
        self.measured += lines
        for line in lines:
            print(f"  {figure(line)}", flush=True)


def plain(text: str) -> str:
    """Without the colours of a terminal."""
    return _ESCAPES.sub("", text)


def telling_line(text: str, pattern: str = "error|Error|FAIL|assert|CUDA error|abort") -> str:
    """The first line of a program's output that tells of an error, or else its first line."""
    lines = [line.strip() for line in plain(text).splitlines() if line.strip()]
    return ([line for line in lines if re.search(pattern, line)] or lines or ["no output"])[0][:300]


def figure(line: dict[str, Any]) -> str:
    """A measurement as "part shape contender: 9.31 us, 3400 GB/s, 12.0 TOPS"; median of the rounds."""
    seconds = median(line["seconds"])
    text = f"{line['part']} {line['shape']}, {line['contender']}: {1e6 * seconds:.2f} us"
    if line.get("bytes"):
        text += f", {line['bytes'] / seconds / 1e9:.0f} GB/s"
    if line.get("ops"):
        text += f", {line['ops'] / seconds / 1e12:.2f} TOPS"
    return text


def seconds_of(run: Run, part: str, shape: str, contender: str) -> dict[str, Any] | None:
    """The figures of a contender, with the median of its rounds as ``median``."""
    for line in run.measured:
        if (line["part"], line["contender"]) == (part, contender) and shape in ("", line["shape"]):
            return {**line, "median": median(line["seconds"])}
    return None
