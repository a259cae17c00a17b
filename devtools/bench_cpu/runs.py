"""Runs llama-bench of both builds in turns and keeps every result on disk, so that a run can be resumed.

The journal is a file of JSON lines beside the models, one per run; its name is a digest of what the results
depend on: both builds, thread count, environment, and the task of each group.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from devtools.bench_cpu import limits
from devtools.bench_cpu.models import build
from devtools.bench_cpu.plan import PATCHED, STOCK, Contender, Group
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.files import digest
from ggml_ext.core.outputs import identity
from ggml_ext.core.progress import track

_PATCHED_COMMIT = "ggml-ext"  # how a patched build's commit begins, see CMakeLists.txt
_SETUP = "build it with scripts/setup --tests or name another folder"


@dataclass(frozen=True)
class Builds:
    """Folders with llama-bench and its libraries, the program bench_limits, and the threads of all runs."""

    stock: Path
    patched: Path
    limits: Path
    threads: int

    def folder(self, name: str) -> Path:
        """Folder of the build STOCK or PATCHED."""
        return {STOCK: self.stock, PATCHED: self.patched}[name]

    def check(self) -> None:
        """Raises GgmlExtError for what is not there."""
        for name in (STOCK, PATCHED):
            if not (self.folder(name) / "llama-bench").is_file():
                raise GgmlExtError(f"no {name} llama-bench in {self.folder(name)}; {_SETUP}")
        if not self.limits.is_file():
            raise GgmlExtError(
                f"no program {self.limits}; build it with scripts/setup --tests or use --limits"
            )


@dataclass(frozen=True)
class Run:
    """One call of llama-bench: tokens per second of each repetition; ``others``: share of the machine's
    processor time that other processes took meanwhile, None where the system does not tell."""

    group: str
    contender: str
    round_number: int
    pp: tuple[float, ...]
    tg: tuple[float, ...]
    seconds: float
    others: float | None

    def speed(self, metric: str) -> float | None:
        """Median over the repetitions of "pp" or "tg"."""
        samples = self.pp if metric == "pp" else self.tg
        return statistics.median(samples) if samples else None


def command(builds: Builds, group: Group, contender: Contender, model: Path) -> list[str]:
    """llama-bench's arguments for one run."""
    options = {
        "-m": str(model),
        "-p": str(group.prompt),
        "-n": str(group.generated),
        "-d": str(group.depth),
        "-r": str(group.repetitions),
        "-ctk": contender.cache,
        "-ctv": contender.cache,
        "-fa": "1",
        "-t": str(builds.threads),
        "-o": "json",
    }
    program = str(builds.folder(contender.build) / "llama-bench")
    warm = [] if group.warm_up else ["--no-warmup"]
    return [program, *(word for option in options.items() for word in option), *warm]


def parse(output: str, contender: Contender) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Samples of prompt and generation from llama-bench's JSON. Raises ValueError, KeyError, TypeError for
    other output and GgmlExtError if the build is not the contender's."""
    pp: tuple[float, ...] = ()
    tg: tuple[float, ...] = ()
    for test in json.loads(output):
        if str(test["build_commit"]).startswith(_PATCHED_COMMIT) != (contender.build == PATCHED):
            raise GgmlExtError(
                f"the folder of the {contender.build} build has commit {test['build_commit']}; "
                "name the right folders with --stock and --patched"
            )
        samples = tuple(float(sample) for sample in test["samples_ts"])
        if test["n_prompt"]:
            pp = samples
        else:
            tg = samples
    return pp, tg


def _busy_seconds() -> float | None:
    """Processor time that the machine has spent on anything, all processors together."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(builds: Builds, group: Group, contender: Contender, round_number: int, model: Path) -> Run:
    """One llama-bench run. Raises GgmlExtError with its last line of output if it fails."""
    folder = builds.folder(contender.build)
    call = command(builds, group, contender, model)
    busy, own, started = _busy_seconds(), _children_seconds(), time.monotonic()
    try:
        done = subprocess.run(
            call,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
        )
    except OSError as error:
        raise GgmlExtError(f"cannot start {call[0]}: {error.strerror}; {_SETUP}") from error
    seconds = time.monotonic() - started
    busy_after = _busy_seconds()
    others = None
    if busy is not None and busy_after is not None:
        foreign = busy_after - busy - (_children_seconds() - own)
        others = max(0.0, foreign / (seconds * (os.cpu_count() or 1)))
    try:
        if done.returncode == 0:
            pp, tg = parse(done.stdout, contender)
            if bool(pp) == bool(group.prompt) and bool(tg) == bool(group.generated):
                return Run(group.name, str(contender), round_number, pp, tg, seconds, others)
    except (ValueError, KeyError, TypeError):
        pass
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
    raise GgmlExtError(f"{contender}: llama-bench failed: {lines[-1]}; the call was: {' '.join(call)}")


class Journal:
    """Results of earlier and this run in ``path``, one JSON line each."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        """Keeps what the file holds with ``resume``, else empties it. A torn last line is dropped."""
        self.path = path
        self.runs: list[Run] = []
        self.limits: dict[tuple[str, int], dict[str, Any]] = {}
        text = path.read_text(encoding="utf-8") if resume and path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        for line in whole.splitlines():
            entry = json.loads(line)
            if "limits" in entry:
                self.limits[entry["group"], entry["round_number"]] = entry["limits"]
            else:
                self.runs.append(Run(**{**entry, "pp": tuple(entry["pp"]), "tg": tuple(entry["tg"])}))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(whole, encoding="utf-8")

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(entry) + "\n")

    def add(self, run: Run) -> None:
        """Keeps one more result."""
        self.runs.append(run)
        self._append(asdict(run))

    def add_limits(self, group: Group, round_number: int, limits: dict[str, Any]) -> None:
        """Keeps the machine's limits as they were in a round."""
        self.limits[group.name, round_number] = limits
        self._append({"limits": limits, "group": group.name, "round_number": round_number})

    def has(self, group: Group, contender: Contender, round_number: int) -> bool:
        """Whether the run is there already."""
        key = (group.name, str(contender), round_number)
        return any((run.group, run.contender, run.round_number) == key for run in self.runs)


def journal_path(folder: Path, builds: Builds, groups: Sequence[Group]) -> Path:
    """The journal of these groups, builds and settings; more rounds of the same go on in the same one."""
    programs = [
        identity(file)
        for name in (STOCK, PATCHED)
        for file in sorted(builds.folder(name).iterdir())
        if file.name == "llama-bench" or file.name.startswith(("libggml", "libllama."))
    ]
    tasks = [{**asdict(group), "rounds": None} for group in groups]
    return folder / f"runs-{digest([programs, limits.switches(), tasks, builds.threads])[:12]}.jsonl"


def pending(groups: Sequence[Group], journal: Journal) -> list[tuple[Group, Contender, int]]:
    """Runs that the journal lacks, round by round of each group."""
    return [
        (group, contender, number)
        for group in groups
        for number in range(group.rounds)
        for contender in group.order(number)
        if not journal.has(group, contender, number)
    ]


def build_models(groups: Sequence[Group], folder: Path) -> None:
    """Writes the models that the groups need and ``folder`` lacks."""
    models = dict.fromkeys(group.model(contender) for group in groups for contender in group.contenders)
    missing = [model for model in models if not (folder / model.file_name()).is_file()]
    if missing:
        with track(len(missing), "writing models", "file") as advance:
            for model in missing:
                build(model, folder)
                advance(1)


def measure_all(builds: Builds, groups: Sequence[Group], folder: Path, journal: Journal) -> None:
    """Measures everything that the journal lacks, with the models in ``folder``; the machine's limits anew in
    every round, since on a shared machine they move. Raises GgmlExtError."""
    todo = pending(groups, journal)
    total = sum(group.expected_seconds(contender) for group, contender, _ in todo)
    with track(total, "measuring", "expected s") as advance:
        for group, contender, number in todo:
            if (group.name, number) not in journal.limits:
                journal.add_limits(group, number, limits.measure(builds.limits, builds.threads))
            model = folder / group.model(contender).file_name()
            run = measure(builds, group, contender, number, model)
            journal.add(run)
            advance(
                group.expected_seconds(contender),
                f"{group.name}, round {number + 1} of {group.rounds}, {contender}",
            )
