"""The order of a run's checks."""

from __future__ import annotations

from functools import partial

from . import checks, plan, programs
from .state import Run


def _cases(run: Run) -> None:
    for kernel in run.kernels:
        for ops in kernel.ops:
            run.check(f"ops {kernel.name}: {ops}", partial(checks.cases, run, ops, False))


def _first(run: Run) -> None:
    for kernel in run.kernels:
        for ops in kernel.first:
            run.check(f"first {kernel.name}: {ops}", partial(checks.cases, run, ops, True))


def _bench(run: Run, quick: bool) -> None:
    parts = [part for kernel in run.kernels for part in kernel.bench]
    for part in ["copy", *parts] if parts else []:
        name = f"bench {part}" if quick else f"bench, more rounds: {part}"
        run.check(name, partial(checks.bench, run, part, quick))


def _perplexity(run: Run) -> None:
    for model in sorted((run.root / "models").glob("*.gguf")):
        for cache, attention in (("f16", "default"), ("q8_0", "default"), ("q8_0", "half")):
            name = f"perplexity: {model.stem}, {cache} cache, attention {attention}"
            run.check(name, partial(checks.perplexity, run, model, cache, attention))


def _profile(run: Run) -> None:
    for kernel in run.kernels:
        for function in kernel.profile:
            name = f"profile {kernel.name}: {function}"
            if not run.check(name, partial(checks.profile, run, kernel.bench[0], function)):
                return  # what refuses one refuses all


def _sanitize(run: Run, tool: str, first_only: bool) -> None:
    for kernel in run.kernels:
        chosen = kernel.sanitize[:1] if first_only else kernel.sanitize[1:]
        for ops in chosen if tool == "memcheck" else kernel.sanitize:
            run.check(f"{tool} {kernel.name}: {ops}", partial(checks.sanitize, run, tool, ops))


def everything(run: Run) -> None:
    """Runs the steps in the order of their worth, so that a run cut short has said the most: whether each
    kernel works at all, then speed, then all cases, then what takes long."""
    if not run.check("preflight", partial(programs.prepare, run)):
        return
    all_kernels = len(run.kernels) == len(plan.KERNELS)
    if "first" in run.steps:
        _first(run)
    if "bench" in run.steps:
        _bench(run, quick=True)
    if "models" in run.steps and all_kernels:
        run.check("models of the 8B shape", partial(checks.models, run, plan.MODELS[:-1], 1))
    if "ops" in run.steps:
        _cases(run)
    if "perplexity" in run.steps and all_kernels:
        _perplexity(run)
    if "profile" in run.steps:
        _profile(run)
    _rest(run, all_kernels)


def _rest(run: Run, all_kernels: bool) -> None:
    sanitizes = {"memcheck", "racecheck"} & set(run.steps)
    works = bool(sanitizes) and run.check("compute-sanitizer", partial(checks.sanitizer, run))
    if works and "memcheck" in run.steps:
        _sanitize(run, "memcheck", first_only=True)
    if "bench" in run.steps:
        _bench(run, quick=False)
    if "models" in run.steps and all_kernels:
        run.check("models of the 8B shape, more rounds", partial(checks.models, run, plan.MODELS, 3))
    if works and "memcheck" in run.steps:
        _sanitize(run, "memcheck", first_only=False)
    if works and "racecheck" in run.steps:
        _sanitize(run, "racecheck", first_only=False)
