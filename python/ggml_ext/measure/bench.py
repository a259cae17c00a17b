"""Prompt and generation speed of GGUF models, measured with llama-bench.

Models take turns over several rounds, in alternating order, so that a machine that warms up or is busy for a
while slows all of them. A figure is the median over the rounds; ratios are medians of the ratios within a
round, which is steadier than the ratio of the medians.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggml_ext.core import paths
from ggml_ext.core.cpus import threads_or_cores
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.process import die_with_parent
from ggml_ext.core.progress import track
from ggml_ext.runtime import tools
from ggml_ext.runtime.cache_types import PLAIN, CacheTypes

PROMPT_TOKENS = 512
GENERATED_TOKENS = 128
ROUNDS = 5


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one model, per round (``pp``: reading the prompt, ``tg``: generating)."""

    model: Path
    pp: tuple[float, ...]
    tg: tuple[float, ...]

    @property
    def pp_tps(self) -> float:
        """Median prompt speed."""
        return statistics.median(self.pp)

    @property
    def tg_tps(self) -> float:
        """Median generation speed."""
        return statistics.median(self.tg)


def spread(samples: Sequence[float]) -> float:
    """Half the distance between the quartiles of ``samples``; 0 for a single one."""
    if len(samples) < 2:
        return 0.0
    quartiles = statistics.quantiles(samples, n=4, method="inclusive")
    return (quartiles[2] - quartiles[0]) / 2


def ratio(samples: Sequence[float], reference: Sequence[float]) -> float:
    """Median over the rounds of ``samples`` / ``reference``, paired by round."""
    return statistics.median(a / b for a, b in zip(samples, reference, strict=True))


def command(
    model: Path, *, prompt: int, generate: int, threads: int | None, cache: CacheTypes = PLAIN
) -> list[str]:
    """The llama-bench call of one round."""
    args = ["-m", str(model), "-p", str(prompt), "-n", str(generate), "-r", "1", "-o", "json"]
    args += ["-t", str(threads_or_cores(threads)), *cache.arguments]
    return [str(tools.find("llama-bench").absolute()), *args]


def parse(output: str) -> tuple[float, float]:
    """Prompt and generation speed in tokens per second from llama-bench's JSON; ValueError, KeyError."""
    tests: list[dict[str, Any]] = json.loads(output)
    speeds = {"pp" if test["n_prompt"] else "tg": float(test["avg_ts"]) for test in tests}
    return speeds["pp"], speeds["tg"]


def _measure(
    model: Path, prompt: int, generate: int, threads: int | None, cache: CacheTypes
) -> tuple[float, float]:
    """One llama-bench run. Raises GgmlExtError with its last line of output if it fails."""
    call = command(model.absolute(), prompt=prompt, generate=generate, threads=threads, cache=cache)
    done = subprocess.run(
        call,
        cwd=paths.bin_dir(),  # llama-bench loads backends that lie in the current folder
        capture_output=True,
        text=True,
        errors="replace",
        env=tools.environment(),
        preexec_fn=die_with_parent(),
    )
    try:
        if done.returncode == 0:
            return parse(done.stdout)
    except (ValueError, KeyError, TypeError):
        pass
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
    raise GgmlExtError(
        f"{model}: llama-bench cannot measure it: {lines[-1]}; try it with ggml-ext run llama-bench"
    )


def bench(
    models: Sequence[Path],
    *,
    prompt: int = PROMPT_TOKENS,
    generate: int = GENERATED_TOKENS,
    rounds: int = ROUNDS,
    threads: int | None = None,
    caches: Sequence[CacheTypes] | None = None,
) -> list[Speed]:
    """Measure ``models`` in ``rounds`` rounds: a prompt of ``prompt`` tokens, then ``generate`` tokens alone.

    ``threads``: None for one per physical core; ``caches``: types of each model's KV cache, None for f16.
    Raises GgmlExtError.
    """
    caches = caches or [PLAIN] * len(models)
    for model in models:
        if not model.is_file():
            raise GgmlExtError(f"{model}: no such file; name GGUF files")
    samples: list[list[tuple[float, float]]] = [[] for _ in models]
    with track(rounds * len(models), "measuring speed", "run") as advance:
        for number in range(rounds):
            order = range(len(models)) if number % 2 == 0 else reversed(range(len(models)))
            for i in order:
                samples[i].append(_measure(models[i], prompt, generate, threads, caches[i]))
                advance(1)
    return [
        Speed(model, tuple(pp for pp, _ in runs), tuple(tg for _, tg in runs))
        for model, runs in zip(models, samples, strict=True)
    ]


def as_rows(speeds: Sequence[Speed]) -> list[dict[str, Any]]:
    """JSON rows of ``speeds``; ratios are against the first model."""
    first = speeds[0]
    return [
        {
            "model": str(speed.model),
            "pp_tps": speed.pp_tps,
            "tg_tps": speed.tg_tps,
            "pp_spread": spread(speed.pp),
            "tg_spread": spread(speed.tg),
            "pp_ratio": ratio(speed.pp, first.pp),
            "tg_ratio": ratio(speed.tg, first.tg),
            "pp_samples": list(speed.pp),
            "tg_samples": list(speed.tg),
        }
        for speed in speeds
    ]
