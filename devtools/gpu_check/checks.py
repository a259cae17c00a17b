"""The checks of a run: cases, perplexity, speed, profiles, sanitizers."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import machine, plan
from .plan import CheckError, Ops
from .state import NotRunError, Outcome, Run, plain, telling_line

# --- cases of test-backend-ops ---


def parse_ops(text: str) -> tuple[int, int, int]:
    """(passed, cases, cases the device does not support) in the output of test-backend-ops."""
    text = plain(text)
    counts = re.findall(r"(\d+)/(\d+) tests passed", text)
    passed, cases = (int(counts[-1][0]), int(counts[-1][1])) if counts else (0, 0)
    return passed, cases, len(re.findall(r": not supported \[", text))


def parse_failing(text: str) -> list[dict[str, Any]]:
    """The cases that failed, with their error: ``case``, ``nmse`` (None where the output has none)."""
    found = []
    for line in plain(text).splitlines():
        match = re.match(r"^\s*(\S.*?\)): (.*)FAIL", line)
        if match:
            nmse = re.search(r"(?:NMSE|ERR) = ([\d.eE+-]+|-?nan|inf)", match[2])
            found.append({"case": match[1], "nmse": float(nmse[1]) if nmse else None})
    return found


def _ops_command(run: Run, ops: Ops) -> list[object]:
    command: list[object] = [run.bin / "test-backend-ops", "test", "-b", run.backend, "-o", ops.op]
    return [*command, "-p", ops.params] if ops.params else command


def _ops_environment(ops: Ops) -> dict[str, str]:
    return {"GGML_EXT_ATTN": ops.attention} if ops.attention else {}


def cases(run: Run, ops: Ops, alone: bool, outcome: Outcome) -> str:
    """Cases on the device against the CPU. ``alone``: one after the other and each kernel to its end, without
    graphs, so that a failure is that of the kernel that is named."""
    environment = _ops_environment(ops)
    command = _ops_command(run, ops)
    if alone:
        environment |= {"CUDA_LAUNCH_BLOCKING": "1", "GGML_CUDA_DISABLE_GRAPHS": "1"}
    else:
        command += ["-j", str(min(8, os.cpu_count() or 1))]
    done = run.command(outcome.name, command, environment)
    passed, n, unsupported = parse_ops(done.stdout)
    outcome.failing = parse_failing(done.stdout)
    counts = f"{passed} of {n} cases" + (f", {unsupported} not supported" if unsupported else "")
    if n == 0:
        raise CheckError(
            f"no case ran; {counts}" if done.returncode == 0 else f"{telling_line(done.stdout)}; {counts}"
        )
    if done.returncode != 0 or passed != n:
        raise CheckError(counts if outcome.failing else f"{counts}; {telling_line(done.stdout)}")
    return counts


# --- perplexity ---


def parse_perplexity(text: str) -> float:
    """The final estimate of llama-perplexity. Raises CheckError where there is none."""
    found = re.search(r"Final estimate: PPL = ([\d.]+)", text)
    if found is None:
        raise CheckError(telling_line(text))
    return float(found[1])


def perplexity(run: Run, model: Path, cache: str, attention: str, outcome: Outcome) -> str:
    """The device's against the CPU's, both under ``attention``."""
    del outcome
    results = {}
    for place, options in (("cpu", ["--device", "none"]), ("cuda", ["-ngl", "99"])):
        command = [run.bin / "llama-perplexity", "-m", model, "-f", run.root / "text.txt", "-c", "512"]
        command += ["-fa", "on", "-ctk", cache, "-ctv", cache, *options]
        name = f"perplexity {model.stem} {cache} {attention} {place}"
        for _ in range(3):  # llama-perplexity may end before its log's last line is written
            done = run.command(name, command, {"GGML_EXT_ATTN": attention})
            if "Final estimate" in done.stdout or done.returncode != 0:
                break
        results[place] = parse_perplexity(done.stdout)
    change = results["cuda"] / results["cpu"] - 1
    detail = f"CUDA {results['cuda']:.4f}, CPU {results['cpu']:.4f}, {100 * change:+.3f} %"
    if abs(change) > plan.PERPLEXITY_LIMIT:
        raise CheckError(f"{detail}; at most {100 * plan.PERPLEXITY_LIMIT} %")
    return detail


# --- speed ---


def bench(run: Run, part: str, quick: bool, outcome: Outcome) -> str:
    """A part of bench_device."""
    options = ["--quick"] if quick else []
    done = run.command(outcome.name, [run.bin / "bench_device", "--device", run.backend, *options, part])
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    run.measure(lines)
    if done.returncode != 0 or not lines:
        raise CheckError(telling_line(done.stdout))
    return f"{len(lines)} figures"


def models(run: Run, names: Sequence[str], rounds: int, outcome: Outcome) -> str:
    """llama-bench on random weights, the models in turns."""
    files = {name: _model(run, name) for name in names}
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else list(names)[::-1]:
            for task, rate in _llama_bench(run, name, files[name], outcome.name).items():
                seconds.setdefault((task, name), []).append(1.0 / rate)
    found = [
        {"part": "models", "shape": task, "contender": name, "seconds": values}
        for (task, name), values in seconds.items()
    ]
    run.measure(found)
    return f"{len(found)} figures, {rounds} rounds, {plan.LAYERS} layers"


def _model(run: Run, name: str) -> Path:
    type_name, *transforms = name.split()
    path = run.work / "models" / f"{name.replace(' ', '-')}-{plan.LAYERS}L.gguf"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        command: list[object] = [run.bin / "bench_device", "--model", part, type_name, str(plan.LAYERS)]
        done = run.command(f"model {name}", [*command, *(f"--{word}" for word in transforms)])
        if done.returncode != 0:
            raise CheckError(f"{name}: {telling_line(done.stdout)}")
        part.replace(path)
    return path


def _llama_bench(run: Run, name: str, model: Path, check: str) -> dict[str, float]:
    command = [run.bin / "llama-bench", "-m", model, "-p", "512,4096", "-n", "128", "-fa", "1", "-ub", "2048"]
    done = run.command(f"{check} {name}", [*command, "-ngl", "99", "-r", "3", "-o", "json"])
    found = re.search(r"^\[\n.*^\]$", done.stdout, flags=re.MULTILINE | re.DOTALL)
    if done.returncode != 0 or found is None:
        raise CheckError(f"{name}: {telling_line(done.stdout)}")
    rates = {}
    for test in json.loads(found[0]):
        task = f"pp{test['n_prompt']}" if test["n_prompt"] else f"tg{test['n_gen']}"
        rates[task] = float(test["avg_ts"])
    return rates


# --- NVIDIA's tools: a device may be closed to them, which one attempt shows ---


def sanitizer(run: Run, outcome: Outcome) -> str:
    """Whether compute-sanitizer works here."""
    program = machine.tool("compute-sanitizer")
    if program is None:
        raise NotRunError("no compute-sanitizer; it comes with the CUDA toolkit")
    done = run.command(outcome.name, [program, *_SANITIZER, *_ops_command(run, plan.KERNELS[0].first[0])])
    if "ERROR SUMMARY" not in done.stdout:
        raise NotRunError(telling_line(done.stdout))
    return str(program)


_SANITIZER = ["--tool", "memcheck", "--error-exitcode", "99"]


def sanitize(run: Run, tool: str, ops: Ops, outcome: Outcome) -> str:
    """Cases under a tool of compute-sanitizer; without CUDA graphs every kernel is launched, and reported, by
    itself."""
    command = [machine.tool("compute-sanitizer"), "--tool", tool, "--error-exitcode", "99"]
    environment = {**_ops_environment(ops), "GGML_CUDA_DISABLE_GRAPHS": "1"}
    done = run.command(outcome.name, [*command, *_ops_command(run, ops)], environment)
    found = re.search(r"(ERROR SUMMARY|RACECHECK SUMMARY): (.*)", done.stdout)
    _, n, _ = parse_ops(done.stdout)
    if done.returncode != 0 or found is None or n == 0:
        raise CheckError(found[0] if found and done.returncode else telling_line(done.stdout))
    return f"{found[2]}, {n} cases"


PROFILED = (
    "Duration",
    "Memory Throughput",
    "Compute (SM) Throughput",
    "Achieved Occupancy",
    "Registers Per Thread",
)
"""What is kept of a profile."""


def parse_profile(text: str) -> dict[str, str]:
    """Values with their units out of ncu's CSV page "details"."""
    start = text.find('"ID"')
    rows = csv.DictReader(io.StringIO(text[start:])) if start >= 0 else ()
    found: dict[str, str] = {}
    for row in rows:
        if row.get("Metric Name") in PROFILED:
            value = f"{row['Metric Value']} {row['Metric Unit']}".strip()
            found.setdefault(str(row["Metric Name"]), value)
    return found


def profile(run: Run, part: str, function: str, outcome: Outcome) -> str:
    """One launch of a kernel under ncu."""
    program = machine.tool("ncu")
    if program is None:
        raise NotRunError("no ncu; it comes with the CUDA toolkit")
    command = [program, "--kernel-name", f"regex:{function}", "--launch-skip", "2", "--launch-count", "1"]
    command += ["--kill", "yes", "--csv", "--page", "details"]
    command += [run.bin / "bench_device", "--device", run.backend, "--quick", part]
    found = parse_profile(run.command(outcome.name, command, {"GGML_CUDA_DISABLE_GRAPHS": "1"}).stdout)
    if not found:
        log = run.logs / (re.sub(r"[^\w.-]+", "-", outcome.name) + ".log")
        raise NotRunError(telling_line(log.read_text("utf-8", "replace"), "ERR|error"))
    run.profiles.append({"kernel": function, "part": part, **found})
    return ", ".join(f"{name} {value}" for name, value in found.items())
