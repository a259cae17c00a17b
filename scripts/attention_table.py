#!/usr/bin/env python3
"""The table of docs/attention.md: what types of the KV cache and kernels of attention do to a language model.

Every row is a process of its own, since the library reads GGML_EXT_ATTN when it is loaded, and is scored
against an f16 cache with upstream's kernels. Prints Markdown. Figures of finished rows stay in OUT_DIR, so an
interrupted run goes on; so do the base's logits, 4 bytes for each scored token and token of the vocabulary.

    scripts/attention_table.py MODEL.gguf TEXT OUT_DIR [--ctx 512 2048] [-t THREADS]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.outputs import write_json
from ggml_ext.measure.evaluate import read_text
from ggml_ext.measure.scoring import SCORE, BaseRows, divergence_of, perplexity_of, score
from ggml_ext.measure.standard_error import TextErrors
from ggml_ext.measure.windows import decode_windows, make_plan
from ggml_ext.runtime.cache_types import CacheTypes
from ggml_ext.runtime.llama import Model


class Case(NamedTuple):
    """cache: type of K and V; setting: GGML_EXT_ATTN; rotated: llama.cpp's rotation of quantised caches."""

    cache: str
    setting: str
    rotated: bool

    @property
    def name(self) -> str:
        """Of its file."""
        return "-".join((self.cache, self.setting.replace("/", "_"), "rotated" if self.rotated else "plain"))


BASE = Case("f16", "off", False)
CASES = [
    *(
        Case(cache, setting, rotated)
        for cache in ("q8_0", "q4_0")
        for rotated in (True, False)
        for setting in ("off", "half", "full")
    ),
    *(
        Case("f16", setting, False)
        for setting in ("half/f16", "half/f16/smooth", "full/f16", "full/f16/smooth")
    ),
]


def reader(base: NDArray[np.float32], window: int, row: int) -> BaseRows:
    """Of the base's logits [windows, rows, n_vocab], those of ``window`` counted from ``row``."""
    return lambda start, stop: base[window, row + start : row + stop]


def evaluate(
    model: Model,
    windows: NDArray[np.int32],
    cache: str,
    base: NDArray[np.float32] | None = None,
    keep: NDArray[np.float32] | None = None,
) -> NDArray[np.void]:
    """Scores [windows * rows] against ``base``; own logits go to ``keep``, both [windows, rows, n_vocab]."""
    plan = make_plan(windows.shape[1], model.n_vocab)
    model.start(
        n_ctx=plan.ctx, n_seq=plan.n_seq, n_batch=plan.n_seq * plan.step, cache=CacheTypes(cache, cache)
    )
    scores = np.zeros((len(windows), plan.rows), SCORE)
    for window, row, logits in decode_windows(model, windows, plan, 0, len(windows)):
        end = row + len(logits)
        targets = windows[window, plan.first + 1 + row : plan.first + 1 + end]
        if keep is not None:
            keep[window, row:end] = logits
        rows = None if base is None else reader(base, window, row)
        scores[window, row:end] = score(logits, targets, rows, threads=model.threads)
    return scores.ravel()


def run_case(args: argparse.Namespace, ctx: int, case: Case) -> None:
    """Evaluates one case in this process and writes its figures."""
    logits, rows = args.out / f"base-{ctx}.f32", make_plan(ctx, 1).rows
    with Model(args.model, threads=args.threads) as model:
        tokens = model.tokenize(read_text(args.text)[0])
        windows = tokens[: len(tokens) // ctx * ctx].reshape(-1, ctx)
        shape = (len(windows), rows, model.n_vocab)
        if case == BASE:
            kept = np.memmap(logits, np.float32, "w+", shape=shape)
            scores = evaluate(model, windows, case.cache, keep=kept)
            kept.flush()
        else:
            scores = evaluate(
                model, windows, case.cache, np.memmap(logits, np.float32, "r", shape=shape), None
            )
    errors = TextErrors(len(windows), rows, ctx)
    figures: dict[str, Any] = {"count": len(scores), "ppl": perplexity_of(scores, errors).ppl}
    if case != BASE:
        figures |= divergence_of(scores, errors).as_dict()
    write_json(args.out / f"{ctx}-{case.name}.json", figures)


def figures_of(args: argparse.Namespace, ctx: int, case: Case) -> dict[str, Any]:
    """What a process with the case's settings wrote; it runs unless it did before."""
    path = args.out / f"{ctx}-{case.name}.json"
    if not path.exists():
        print(f"ctx {ctx}: {case.name}", file=sys.stderr, flush=True)
        settings = {"GGML_EXT_ATTN": case.setting, "LLAMA_ATTN_ROT_DISABLE": "0" if case.rotated else "1"}
        command = [sys.executable, __file__, *sys.argv[1:], "--case", json.dumps([ctx, *case])]
        subprocess.run(command, check=True, env=os.environ | settings)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def cells(found: dict[str, Any]) -> str:
    """Change of perplexity and KL divergence with their errors."""
    change, error = 100 * np.expm1(found["ln_ppl_ratio"]), 100 * found["ln_ppl_ratio_se"]
    return f"{change:+.4f} % ± {error:.4f} | {found['kld']:.7f} ± {found['kld_se']:.7f}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ctx", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.case is not None:
        ctx, *case = json.loads(args.case)
        run_case(args, ctx, Case(*case))
        return
    for ctx in args.ctx:
        base = figures_of(args, ctx, BASE)
        print(f"{ctx}: perplexity {base['ppl']:.4f}, {base['count']} tokens scored")
    print(
        "| cache | `GGML_EXT_ATTN` | rotation |" + "".join(f" {ctx}: perplexity | KL |" for ctx in args.ctx)
    )
    print("|---|---|---|" + "---|---|" * len(args.ctx))
    for case in CASES:
        rotation = "" if case.cache == "f16" else "on" if case.rotated else "off"
        row = " | ".join(cells(figures_of(args, ctx, case)) for ctx in args.ctx)
        print(f"| {case.cache} | `{case.setting}` | {rotation} | {row} |", flush=True)


if __name__ == "__main__":
    main()
