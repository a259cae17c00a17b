#!/usr/bin/env python3
"""Speed of the FQ4 encoder beside upstream's Q4_K encoder.

    python scripts/bench_quantize.py [--rounds 7] [--threads 1]

The encoders are timed through the functions that llama-quantize calls, in turn, on the same Gaussian rows.
The table shows medians over the rounds and the median of the ratios round by round. Needs the package.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ggml_ext.runtime import native

ROWS, COLUMNS = 256, 4096
TYPES = ("fq4", "q4_K", "iq4_xs")


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def encoder_table(rounds: int, threads: int) -> Table:
    random = np.random.default_rng(0)
    rows = random.standard_normal((ROWS, COLUMNS), np.float32)
    importance = random.standard_normal(COLUMNS, np.float32) ** 2
    table = Table("type", "importances", "million weights / s", "ratio to q4_K")
    for imatrix in (None, importance):
        times: dict[str, list[float]] = {name: [] for name in TYPES}
        for round_number in range(rounds + 1):  # the first warms up
            for name in TYPES:
                taken = encode(name, rows, imatrix, threads)
                if round_number:
                    times[name].append(taken)
        for name in TYPES:
            ratio = statistics.median(b / a for a, b in zip(times[name], times["q4_K"], strict=True))
            speed = rows.size / statistics.median(times[name]) / 1e6
            table.add_row(name, "no" if imatrix is None else "yes", f"{speed:.2f}", f"{ratio:.2f}")
    return table


def encode(name: str, rows: NDArray[np.float32], imatrix: NDArray[np.float32] | None, threads: int) -> float:
    return seconds(lambda: native.quantize(name, rows, imatrix, threads=threads))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    Console().print(encoder_table(options.rounds, options.threads))


if __name__ == "__main__":
    main()
