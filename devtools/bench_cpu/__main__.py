"""scripts/bench-cpu: the options, and the order of the work."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from devtools.bench_cpu import limits, plan, report, runs
from devtools.bench_cpu.models import SHAPES, TYPES
from devtools.bench_cpu.results import Results
from ggml_ext.core import cpus, paths
from ggml_ext.core.atomic import write_text
from ggml_ext.core.errors import GgmlExtError

_ABOUT = """Speed of FQ4 and of the attention over a quantised cache beside stock llama.cpp on this machine's
processor: random-weight models, llama-bench of both builds in turns, ratios within a round. Prints the limits
of the machine, ratios with their spread, and whether the lines that have to be reached are met.
docs/performance.md explains the figures and the JSON. GGML_EXT_ATTN=off in the environment gives the patched
build stock's attention."""


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench-cpu", description=_ABOUT)
    add = parser.add_argument
    add("--repository", type=Path, default=Path.cwd(), help=argparse.SUPPRESS)
    add("--quick", action="store_true", help="1B shape, 4-bit types, pp512, tg128 and depth 4096 only")
    add("--only", type=_names, default=list(plan.PARTS), help=f"parts: {','.join(plan.PARTS)} (all)")
    add("--types", type=_names, default=list(TYPES), help=f"types of weights: {','.join(TYPES)} (all)")
    add("--shapes", type=_names, default=list(SHAPES), help=f"shapes: {','.join(SHAPES)} (all)")
    add(
        "--rounds",
        type=_positive,
        help=f"rounds ({plan.ROUNDS}; quick {plan.QUICK_ROUNDS}); half as many for other "
        "tasks, a quarter for pp4096 and the largest depth",
    )
    add(
        "--layers",
        type=_positive,
        help=f"layers of every model (1B: {plan.LAYERS['1B']}, in comparisons of caches {plan.CACHE_LAYERS}; "
        f"0.5B: {plan.LAYERS['0.5B']})",
    )
    add("--threads", type=_positive, help="threads (all processors)")
    add("--dir", type=Path, help="folder of models and results (build/bench-cpu)")
    add("--stock", type=Path, help="folder with stock llama-bench (build/stock/bin)")
    add("--patched", type=Path, help="folder with patched llama-bench (build/patched/bin, else the package)")
    add("--limits", type=Path, help="the program bench_limits (build/patched/bin/bench_limits)")
    add("--resume", action="store_true", help="go on with an interrupted run of the same options")
    add("--json", type=Path, help="write the results to this file")
    add("--update", type=Path, help="write the tables between the markers of this Markdown file")
    return parser


def _builds(options: argparse.Namespace) -> runs.Builds:
    built = options.repository / "build" / "patched" / "bin"
    patched = options.patched or (built if (built / "llama-bench").is_file() else paths.bin_dir())
    stock = options.stock or options.repository / "build" / "stock" / "bin"
    program = options.limits or built / "bench_limits"
    builds = runs.Builds(stock, patched, program, options.threads or cpus.processors())
    builds.check()
    return builds


def _work(options: argparse.Namespace) -> int:
    """Measures and reports; returns the exit status: 130 if it was interrupted."""
    wanted = plan.Wanted(
        parts=plan.check_names("part", options.only, plan.PARTS),
        types=plan.check_names("type", options.types, tuple(TYPES)),
        shapes=plan.check_names("shape", options.shapes, tuple(SHAPES)),
        rounds=options.rounds,
        layers=options.layers,
        quick=options.quick,
    )
    groups = plan.groups(wanted)
    builds = _builds(options)
    if options.update:
        report.around(options.update)
    folder = options.dir or options.repository / "build" / "bench-cpu"
    status = 0
    journal = runs.Journal(runs.journal_path(folder, builds, groups), resume=options.resume)
    try:
        runs.build_models(groups, folder)
        runs.measure_all(builds, groups, folder, journal)
    except KeyboardInterrupt:
        print("bench-cpu: interrupted; the same command with --resume goes on", file=sys.stderr)
        status = 130

    results = Results(groups, journal.runs, journal.limits)
    compilers = [found["compiler"] for found in journal.limits.values()]
    machine = limits.machine(options.repository, builds.threads, compilers[0] if compilers else None)
    tables = report.sheets(results)
    where = report.heading(machine, results)
    console = Console(width=max(140, Console().width))
    for sheet in tables:
        console.print(sheet.rich())
    if options.json:
        found = report.as_json(results, machine)
        write_text(options.json, json.dumps(found, indent=1) + "\n")
    if options.update and status == 0:
        report.update(options.update, report.markdown(tables, where))
    print(f"bench-cpu: {where}")
    return status


def main() -> None:
    """Runs the command line. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    options = _parser().parse_args()
    try:
        sys.exit(_work(options))
    except GgmlExtError as error:
        print(f"bench-cpu: error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(
            f"bench-cpu: error: {error.filename}: {error.strerror}; check the file and its disk",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
