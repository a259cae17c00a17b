#!/usr/bin/env python3
"""The tables of docs/recipes.md and docs/fq4.md: a model in every type and recipe beside its float file.

Prints Markdown, and keeps models, what their matrices read and comparison.json in a folder; files that are
there already are not made again, so an interrupted run goes on. All recipes and GPTQ share one observation;
importances are those that llama-imatrix computes, which read all of the text. KL divergences and their errors
are those of ``ggml-ext compare``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

KEPT = ("^token_embd", r"^output\.")
"""Embeddings and head, which are not part of any block and would blur what the blocks' types do."""

WEIGHTED = {
    "q4_k_m": ("Q4_K_M, importance matrix, by llama-quantize", ["--type", "q4_k_m"]),
    "q4_k": ("Q4_K, importance matrix", ["--type", "q4_k"]),
    "fq4": ("FQ4, importance matrix", ["--type", "fq4"]),
}
OBSERVED = {
    "fq4-gptq": ("FQ4, gptq, no transform", ["--type", "fq4", "--rounding", "gptq"]),
    "flat4": ("`flat4`", ["--recipe", "flat4"]),
    "flat4-m": ("`flat4-m`", ["--recipe", "flat4-m"]),
    "stock4": ("`stock4`", ["--recipe", "stock4"]),
    "a4-gptq": (
        "4-bit activations: FQ4, gptq, no transform",
        ["--type", "fq4", "--rounding", "gptq", "--activation", "a4"],
    ),
    "a4-hadamard": (
        "4-bit activations: FQ4, gptq, hadamard, clip searched per site",
        ["--type", "fq4", "--transform", "hadamard", "--rounding", "gptq", "--activation", "a4"],
    ),
    "w4a4": ("`w4a4`", ["--recipe", "w4a4"]),
}
PLAIN = {"fq4-nearest": ("FQ4, no importances", ["--type", "fq4"])}
ROWS = WEIGHTED | OBSERVED | PLAIN
SAMPLE_ROWS = "4096"
"""Of the observation: what the rows with 4-bit activations need."""


class Row(NamedTuple):
    """What compare says of a file. ``bits`` are those of the blocks' matrices with their transforms."""

    name: str
    bits: float
    kld: float
    error: float
    difference: float | None
    difference_error: float | None
    top1: float


def convert(source: Path, out: Path, options: Sequence[str]) -> None:
    """Runs ggml-ext convert unless ``out`` is there; convert leaves whole files only."""
    if out.exists():
        return
    print(f"making {out}", file=sys.stderr, flush=True)
    subprocess.run(["ggml-ext", "convert", source, "-o", out, *options], check=True, stdout=sys.stderr)


def observe(model: Path, out: Path, calibration: Path, threads: str) -> None:
    """Runs ggml-ext observe, which goes on with what ``out`` holds. threads: "0" for all."""
    command = ["ggml-ext", "observe", model, "-o", out, "--calibration", calibration]
    command += ["--sample-rows", SAMPLE_ROWS, *(["-t", threads] if threads != "0" else [])]
    subprocess.run(command, check=True, stdout=sys.stderr)


def rows(comparison: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Row]:
    """The rows of ``names``, each with its difference from the next lower one as compare pairs them."""
    found = []
    for name, model in zip(names, comparison[1:], strict=True):
        found.append(
            Row(
                ROWS[name][0],
                model["bits_per_layer_weight"],
                model["kld"],
                model["kld_se"],
                model.get("kld_diff"),
                model.get("kld_diff_se"),
                model["top1"],
            )
        )
    return found


def markdown(found: Sequence[Row], unit: Row | None) -> str:
    """A table with one line per row; ``unit`` is the row whose divergence counts as 1 in the last column."""
    lines = [
        "| file | bits | KL divergence | less next lower | top-1 % |" + (" Q4_K_M = 1 |" if unit else ""),
        "|---|---:|---:|---:|---:|" + ("---:|" if unit else ""),
    ]
    for row in found:
        less = "-" if row.difference is None else f"{row.difference:.6f} ± {row.difference_error:.6f}"
        cells = [
            row.name,
            f"{row.bits:.3f}",
            f"{row.kld:.6f} ± {row.error:.6f}",
            less,
            f"{100 * row.top1:.2f}",
        ]
        if unit:
            cells.append(f"{row.kld / unit.kld:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="Hugging Face folder or float GGUF")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder of the models, made if needed"
    )
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("-f", "--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--base", default="f16", choices=("f16", "bf16", "f32"), help="type of the base")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--whole", action="store_true", help="quantise embeddings and head too")
    parser.add_argument("-t", "--threads", default="0")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    base = args.output / f"{args.base}.gguf"
    threads = ["-t", args.threads]
    convert(args.source, base, ["--type", args.base, *threads])
    kept = [] if args.whole else [option for pattern in KEPT for option in ("--keep", pattern)]
    files = [args.output / f"{name}.gguf" for name in args.rows]
    observation = args.output / "observation"
    if any(name in OBSERVED and not out.exists() for name, out in zip(args.rows, files, strict=True)):
        observe(base, observation, args.calibration, args.threads)
    given = {name: ["--calibration", str(args.calibration)] for name in WEIGHTED}
    given |= {name: ["--observed", str(observation)] for name in OBSERVED}
    for name, out in zip(args.rows, files, strict=True):
        convert(base, out, [*ROWS[name][1], *given.get(name, []), *kept, *threads])
    result = args.output / "comparison.json"
    compare = ["ggml-ext", "compare", base, *files, "-f", args.text, "--json", result, *threads]
    subprocess.run([*compare, "--rounds", "0", "--layers", "0"], check=True, stdout=sys.stderr)

    found = rows(json.loads(result.read_text("utf-8")), args.rows)
    unit = next((row for row in found if row.name == ROWS["q4_k_m"][0]), None)
    print(markdown(found, unit))


if __name__ == "__main__":
    main()
