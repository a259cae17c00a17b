"""scripts/bench-sampling: the options, and the order of the work."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from devtools.bench_cpu import limits
from devtools.bench_sampling import plan, report
from devtools.bench_sampling.measure import Rows, measure, write_model
from ggml_ext.core.atomic import write_text
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.progress import track

_ABOUT = """Microseconds per token of the fused sampler and of llama.cpp's sampler chain with the same
parameters, in one process and in turns, on one thread: in a chain as llama.cpp's tools have it, and on the
logits without an array of candidates. Prints medians, ratios within a round with their range, and whether
the lines that have to be reached are met. docs/sampling.md explains the figures and the JSON."""


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench-sampling", description=_ABOUT)
    add = parser.add_argument
    add("--repository", type=Path, default=Path.cwd(), help=argparse.SUPPRESS)
    add("--quick", action="store_true", help="two vocabularies, three chains, batch 1")
    add("--rounds", type=_positive, help=f"rounds ({plan.ROUNDS}; quick {plan.QUICK_ROUNDS})")
    add("--json", type=Path, help="write the results to this file")
    return parser


def _measure_all(
    cases: list[plan.Case], rounds: int, folder: Path, results: dict[plan.Case, dict[str, list[float]]]
) -> None:
    """Adds the cases to ``results`` one by one, so that what is there survives an interruption."""
    with track(len(cases), "measuring", "case") as advance:
        for (vocabulary, batch), some in itertools.groupby(
            sorted(cases, key=lambda case: (plan.VOCABULARIES[case.vocabulary], case.batch)),
            key=lambda case: (case.vocabulary, case.batch),
        ):
            model = folder / f"{vocabulary}.gguf"
            if not model.is_file():
                write_model(model, plan.VOCABULARIES[vocabulary])
            rows = Rows(model, batch)
            try:
                for kind, same in itertools.groupby(some, key=lambda case: case.logits):
                    rows.fill(kind)
                    for case in same:
                        results[case] = measure(rows, case, rounds)
                        advance(1, str(case))
            finally:
                rows.close()


def _work(options: argparse.Namespace) -> int:
    """Measures and reports; returns the exit status: 130 if it was interrupted."""
    cases = plan.cases(quick=options.quick)
    rounds = options.rounds or (plan.QUICK_ROUNDS if options.quick else plan.ROUNDS)
    results: dict[plan.Case, dict[str, list[float]]] = {}
    status = 0
    with tempfile.TemporaryDirectory(prefix="bench-sampling-") as folder:
        try:
            _measure_all(cases, rounds, Path(folder), results)
        except KeyboardInterrupt:
            print("bench-sampling: interrupted; what was measured follows", file=sys.stderr)
            status = 130
    machine = limits.machine(options.repository, 1, None)
    console = Console(width=max(160, Console().width))
    for sheet in report.sheets(results):
        console.print(sheet.rich())
    if options.json:
        write_text(options.json, json.dumps(report.as_json(results, machine), indent=1) + "\n")
    print(f"bench-sampling: {report.heading(machine, results)}")
    return status


def main() -> None:
    """Runs the command line. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    options = _parser().parse_args()
    try:
        sys.exit(_work(options))
    except GgmlExtError as error:
        print(f"bench-sampling: error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(
            f"bench-sampling: error: {error.filename}: {error.strerror}; check the file and its disk",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
