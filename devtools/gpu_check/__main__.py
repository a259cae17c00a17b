"""scripts/gpu-check: the options, and the order of the work."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from . import machine, plan, programs, report, run
from .plan import CheckError
from .state import FAILED, Run

_ABOUT = """Checks every CUDA kernel of ggml-ext on this machine's device and measures it beside stock kernels
of the same build: CPU-against-CUDA cases, perplexity, speed, profiles, compute-sanitizer. The results are
written after every check, the table comes last; docs/gpu-check.md explains both. Without --pack and --run it
packs and then runs."""

_MINUTES = 5.0

ARCHITECTURES = ("80-real", "86-real", "89-real", "90a-real")
"""Of packed programs."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu-check", description=_ABOUT)
    add = parser.add_argument
    add("--root", type=Path, required=True, help=argparse.SUPPRESS)
    add("--pack", type=Path, nargs="?", const=Path(), metavar="DIR", help="gather what a run needs in DIR")
    add("--prebuilt", action="store_true", help="with --pack: the programs too, for --arch")
    add("--arch", default=",".join(ARCHITECTURES), help="with --prebuilt: as CMake names them (%(default)s)")
    add("--run", action="store_true", help="run from this packed folder alone")
    add("--only", action="append", default=[], metavar="NAME", help="a kernel or a step; repeatable")
    add("--minutes", type=float, default=_MINUTES, help="start nothing after this (%(default)g)")
    add("--work", type=Path, metavar="DIR", help="where programs are unpacked or built (work/)")
    add("--logs", type=Path, metavar="DIR", help="what each program said (logs/ in --work)")
    add("--json", type=Path, help="results (build/gpu-check.json, in a packed folder results.json)")
    add("--list", action="store_true", help="name every check that needs a device, and end")
    return parser


def _run(options: argparse.Namespace, folder: Path, results: Path) -> int:
    kernels, steps = plan.chosen(options.only)
    device = machine.find()
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    work = (options.work or folder / "work").resolve()
    logs = (options.logs or work / "logs").resolve()
    deadline = time.monotonic() + 60 * options.minutes
    state = Run(folder, work, logs, device, kernels, steps, deadline)
    state.save = lambda run: report.write(results, report.as_json(run, about))
    print(f"gpu-check: {device.name}, at most {options.minutes:g} minutes; logs: {logs}", flush=True)
    status = 0
    try:
        run.everything(state)
    except KeyboardInterrupt:
        print("gpu-check: interrupted; what was built is kept", file=sys.stderr)
        status = 130
    state.save(state)
    print(report.table(state, about))
    print(f"gpu-check: {results}")
    return status or int(any(outcome.status == FAILED for outcome in state.outcomes))


def _work(options: argparse.Namespace) -> int:
    if options.list:
        print("\n".join(plan.device_tests(plan.chosen(options.only)[0])))
        return 0
    if options.run:
        folder = options.root
        if not (folder / programs.SOURCE).is_file():
            raise CheckError(f"{folder} is no packed folder; make one with --pack, or leave --run out")
        return _run(options, folder, options.json or folder / "results.json")
    from .pack import GgmlExtError, pack

    architectures = options.arch.replace(",", ";") if options.prebuilt else ""
    default = options.root / "build" / "gpu-check"
    folder = default if options.pack in (None, Path()) else options.pack
    try:
        if options.pack is None:
            machine.find()  # before minutes of packing
        print(f"gpu-check: {pack(options.root, folder, architectures)}")
    except GgmlExtError as error:
        raise CheckError(str(error)) from error
    if options.pack is not None:
        return 0
    return _run(options, folder, options.json or options.root / "build" / "gpu-check.json")


def main() -> None:
    """Runs the command line. Exit status: 0 all passed, 1 failed, 2 wrong usage, 130 interrupted."""
    options = _parser().parse_args()
    try:
        sys.exit(_work(options))
    except CheckError as error:
        print(f"gpu-check: error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(
            f"gpu-check: error: {error.filename}: {error.strerror}; check the file and its disk",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print("gpu-check: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
