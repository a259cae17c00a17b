"""The steps of a run on a device: build, ops, perplexity, speed, sanitizers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from . import machine, plan
from .plan import CheckError, Kernel, Ops

PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run"
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_TARGETS = ("test-backend-ops", "llama-perplexity", "llama-bench", "bench_device")
_ROUNDS = 3


@dataclass
class Outcome:
    """One check. ``detail``: counts, or why it failed or was not run."""

    name: str
    status: str
    detail: str
    seconds: float


@dataclass
class Run:
    """State of a run. ``root``: the packed folder. ``deadline``: time.monotonic() after which nothing is
    started any more."""

    root: Path
    work: Path
    device: machine.Device
    kernels: Sequence[Kernel]
    quick: bool
    deadline: float
    outcomes: list[Outcome] = field(default_factory=list)
    measured: list[dict[str, Any]] = field(default_factory=list)

    @property
    def bin(self) -> Path:
        """Where the build leaves its programs."""
        return self.work / "build" / "bin"

    @property
    def backend(self) -> str:
        """Name of the device in llama.cpp."""
        return "CUDA0"

    def command(
        self, name: str, command: Sequence[object], environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program with its output in work/logs; kills it at the deadline (exit status 124)."""
        logs = self.work / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / (re.sub(r"[^\w.-]+", "-", name) + ".log")
        env = {**os.environ, "GGML_EXT_ATTN": "default", **(environment or {})}
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
            try:
                code = process.wait(max(1.0, self.deadline - time.monotonic()))
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                code = 124
        return subprocess.CompletedProcess([], code, log.read_text("utf-8", "replace"), "")

    def check(self, name: str, body: Callable[[], str]) -> bool:
        """One check: body returns the detail of a success and raises CheckError for a failure."""
        start = time.monotonic()
        if start > self.deadline:
            self.outcomes.append(Outcome(name, NOT_RUN, "out of time", 0.0))
            return False
        try:
            status, detail = PASSED, body()
        except CheckError as error:
            status, detail = FAILED, str(error)
        if status == FAILED and time.monotonic() > self.deadline:
            status, detail = NOT_RUN, "out of time: " + detail
        self.outcomes.append(Outcome(name, status, detail, time.monotonic() - start))
        print(f"gpu-check: {name}: {status}, {detail} ({time.monotonic() - start:.1f} s)", flush=True)
        return status == PASSED


def _last_lines(text: str, pattern: str = "error|Error|FAIL|assert|CUDA error") -> str:
    lines = [line.strip() for line in _ESCAPES.sub("", text).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(pattern, line)]
    return (telling or lines or ["no output"])[0][:300]


# --- build ---


def _unpack(run: Run) -> Path:
    """The packed source, unpacked; anew where the archive is another one."""
    archive, tree = run.root / "source.tar.gz", run.work / "source"
    stamp = tree / ".unpacked"
    identity = f"{archive.stat().st_size} {archive.stat().st_mtime_ns}\n"
    if not stamp.is_file() or stamp.read_text() != identity:
        shutil.rmtree(tree, ignore_errors=True)
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(tree, filter="data")
            else:  # releases of Python before the filters; the archive is our own
                tar.extractall(tree)
        stamp.write_text(identity)
    return tree


def _build(run: Run) -> str:
    compiler = machine.nvcc()
    tree = _unpack(run)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", tree, "-B", run.work / "build", *generator]
    configure += [
        f"-DGGML_EXT_LLAMA_SOURCE={tree / 'llama.cpp'}",
        "-DGGML_CUDA=ON",
        "-DGGML_EXT_TESTS=ON",
        "-DGGML_RPC=OFF",
    ]
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={run.device.architecture}"]
    configure += [f"-DCMAKE_CUDA_COMPILER={compiler}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    if not shutil.which("cmake"):
        raise CheckError("no cmake on the PATH; install it")
    jobs = str(os.cpu_count() or 2)
    build = ["cmake", "--build", run.work / "build", "--parallel", jobs, "--target", *_TARGETS]
    for name, command in (("configure", configure), ("build", build)):
        done = run.command(name, command)
        if done.returncode != 0:
            log = run.work / "logs" / f"{name}.log"
            raise CheckError(f"{name}: {_last_lines(done.stdout)}; see {log}")
    return f"sm_{run.device.architecture.removesuffix('-real')}"


# --- ops ---


def parse_ops(text: str) -> tuple[int, int, int]:
    """(passed, cases, cases the device does not support) in the output of test-backend-ops."""
    plain = _ESCAPES.sub("", text)
    counts = re.findall(r"(\d+)/(\d+) tests passed", plain)
    passed, cases = (int(counts[-1][0]), int(counts[-1][1])) if counts else (0, 0)
    return passed, cases, len(re.findall(r": not supported \[", plain))


def _ops_command(run: Run, ops: Ops) -> list[object]:
    command: list[object] = [run.bin / "test-backend-ops", "test", "-b", run.backend, "-o", ops.op]
    return [*command, "-p", ops.params] if ops.params else command


def _ops_environment(ops: Ops) -> dict[str, str]:
    return {"GGML_EXT_ATTN": ops.attention} if ops.attention else {}


def _ops(run: Run, name: str, ops: Ops) -> str:
    jobs = str(min(8, os.cpu_count() or 1))
    done = run.command(name, [*_ops_command(run, ops), "-j", jobs], _ops_environment(ops))
    passed, cases, unsupported = parse_ops(done.stdout)
    counts = f"{passed} of {cases} cases" + (f", {unsupported} not supported" if unsupported else "")
    if done.returncode != 0 or passed != cases:
        failing = re.findall(r"^\s*(\S.*\)): .*FAIL", _ESCAPES.sub("", done.stdout), flags=re.MULTILINE)
        raise CheckError(f"{counts}; first: {failing[0] if failing else _last_lines(done.stdout)}")
    if cases == 0:
        raise CheckError("no case ran" + (f", {unsupported} not supported" if unsupported else ""))
    return counts


def _sanitize(run: Run, name: str, tool: str, ops: Ops) -> str:
    program = shutil.which("compute-sanitizer")
    if program is None and (compiler := machine.nvcc()):
        beside = compiler.parent / "compute-sanitizer"
        program = str(beside) if beside.is_file() else None
    if program is None:
        raise CheckError("no compute-sanitizer; it comes with the CUDA toolkit")
    command = [program, "--tool", tool, "--error-exitcode", "99", *_ops_command(run, ops)]
    # Without CUDA graphs every kernel is launched, and reported, by itself.
    done = run.command(name, command, {**_ops_environment(ops), "GGML_CUDA_DISABLE_GRAPHS": "1"})
    found = re.search(r"(ERROR SUMMARY|RACECHECK SUMMARY): (.*)", done.stdout)
    _, cases, _ = parse_ops(done.stdout)
    if done.returncode != 0 or found is None or cases == 0:
        raise CheckError(found[0] if found and done.returncode else _last_lines(done.stdout))
    return f"{found[2]}, {cases} cases"


# --- perplexity ---


def parse_perplexity(text: str) -> float:
    """The final estimate of llama-perplexity. Raises CheckError where there is none."""
    found = re.search(r"Final estimate: PPL = ([\d.]+)", text)
    if found is None:
        raise CheckError(_last_lines(text))
    return float(found[1])


def _perplexity(run: Run, model: Path, cache: str) -> str:
    results = {}
    for place, options in (("cpu", ["--device", "none"]), ("cuda", ["-ngl", "99"])):
        command = [run.bin / "llama-perplexity", "-m", model, "-f", run.root / "text.txt", "-c", "512"]
        command += ["-fa", "on", "-ctk", cache, "-ctv", cache, *options]
        for _ in range(3):  # llama-perplexity may end before its log's last line is written
            done = run.command(f"perplexity {model.stem} {cache} {place}", command)
            if "Final estimate" in done.stdout or done.returncode != 0:
                break
        results[place] = parse_perplexity(done.stdout)
    change = results["cuda"] / results["cpu"] - 1
    detail = f"CUDA {results['cuda']:.4f}, CPU {results['cpu']:.4f}, {100 * change:+.3f} %"
    if abs(change) > plan.PERPLEXITY_LIMIT:
        raise CheckError(f"{detail}; at most {100 * plan.PERPLEXITY_LIMIT} %")
    return detail


# --- speed ---


def _bench(run: Run, part: str) -> str:
    options = ["--quick"] if run.quick else []
    done = run.command(f"bench {part}", [run.bin / "bench_device", "--device", run.backend, *options, part])
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    run.measured += lines
    if done.returncode != 0 or not lines:
        raise CheckError(_last_lines(done.stdout))
    return f"{len(lines)} figures"


def _contenders() -> list[tuple[str, str, list[str]]]:
    first, *others = plan.MODELS
    found = [(first, first, []), (f"{first} transforms", first, ["--transforms"])]
    return found + [(name, name, []) for name in others]


def _models(run: Run) -> str:
    folder = run.work / "models"
    folder.mkdir(exist_ok=True)
    files = {}
    for name, type_name, options in _contenders():
        path = folder / f"{name.replace(' ', '-')}-{plan.LAYERS}L.gguf"
        if not path.is_file():
            part = path.with_suffix(".part")
            command = [run.bin / "bench_device", "--model", part, type_name, str(plan.LAYERS), *options]
            done = run.command(f"model {name}", command)
            if done.returncode != 0:
                raise CheckError(f"{name}: {_last_lines(done.stdout)}")
            part.replace(path)
        files[name] = path
    rates: dict[tuple[str, str], list[float]] = {}
    for turn in range(_ROUNDS):
        names = list(files) if turn % 2 == 0 else list(files)[::-1]
        for name in names:
            for task, rate in _llama_bench(run, name, files[name]).items():
                rates.setdefault((task, name), []).append(rate)
    for (task, name), found in rates.items():
        seconds = [1.0 / rate for rate in found]
        run.measured.append({"part": "models", "shape": task, "contender": name, "seconds": seconds})
    return f"{len(rates)} figures, {_ROUNDS} rounds, {plan.LAYERS} layers"


def _llama_bench(run: Run, name: str, model: Path) -> dict[str, float]:
    command = [run.bin / "llama-bench", "-m", model, "-p", "512,4096", "-n", "128", "-fa", "1"]
    done = run.command(f"llama-bench {name}", [*command, "-ngl", "99", "-r", "3", "-o", "json"])
    found = re.search(r"^\[\n.*^\]$", done.stdout, flags=re.MULTILINE | re.DOTALL)
    if done.returncode != 0 or found is None:
        raise CheckError(f"{name}: {_last_lines(done.stdout)}")
    rates = {}
    for test in json.loads(found[0]):
        task = f"pp{test['n_prompt']}" if test["n_prompt"] else f"tg{test['n_gen']}"
        rates[task] = float(test["avg_ts"])
    return rates


# --- all of it ---


def everything(run: Run) -> None:
    """Runs the steps in the order of their worth, so that a run cut short has said the most."""
    if not run.check("build", partial(_build, run)):
        return
    for kernel in run.kernels:
        for ops in kernel.ops:
            name = f"ops {kernel.name}: {ops}"
            run.check(name, partial(_ops, run, name, ops))
    for model in sorted((run.root / "models").glob("*.gguf")):
        for cache in ("f16", "q8_0"):
            run.check(f"perplexity: {model.stem}, {cache} cache", partial(_perplexity, run, model, cache))
    parts = [part for kernel in run.kernels for part in kernel.bench]
    for part in ["copy", *parts] if parts else []:
        run.check(f"bench {part}", partial(_bench, run, part))
    for kernel in run.kernels:
        for ops in kernel.sanitize[:1] if run.quick else kernel.sanitize:
            for tool in ("memcheck", "racecheck"):
                name = f"{tool} {kernel.name}: {ops}"
                run.check(name, partial(_sanitize, run, name, tool, ops))
    if not run.quick and len(run.kernels) == len(plan.KERNELS):
        run.check("bench models of the 8B shape", partial(_models, run))


def seconds_of(run: Run, part: str, shape: str, contender: str) -> dict[str, Any] | None:
    """The figures of a contender, with the median of its rounds as ``median``."""
    for line in run.measured:
        if (line["part"], line["contender"]) == (part, contender) and shape in ("", line["shape"]):
            return {**line, "median": median(line["seconds"])}
    return None
