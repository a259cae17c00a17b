"""scripts/gpu-check: the options, and the order of the work."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from . import machine, plan, report, run
from .plan import CheckError

_ABOUT = """Checks every CUDA kernel of ggml-ext on this machine's device and measures it beside stock kernels
of the same build: CPU-against-CUDA cases, perplexity, speed, compute-sanitizer. The table comes last;
docs/gpu-check.md explains it and the JSON. Without --pack and --run it packs and then runs."""

_MINUTES, _QUICK_MINUTES = 9.0, 3.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu-check", description=_ABOUT)
    add = parser.add_argument
    add("--root", type=Path, required=True, help=argparse.SUPPRESS)
    add("--pack", type=Path, nargs="?", const=Path(), metavar="DIR", help="gather what a run needs in DIR")
    add("--run", action="store_true", help="run from this packed folder alone")
    add("--quick", action="store_true", help="fewer rounds, no models of the 8B shape, fewer sanitizer cases")
    add("--only", action="append", default=[], metavar="NAME", help="one kernel; repeatable")
    add("--minutes", type=float, help=f"start nothing after this ({_MINUTES:g}; quick {_QUICK_MINUTES:g})")
    add("--json", type=Path, help="results (build/gpu-check.json, in a packed folder results.json)")
    add("--list", action="store_true", help="name every check that needs a device, and end")
    return parser


def _run(options: argparse.Namespace, folder: Path, results: Path) -> int:
    kernels = plan.chosen(options.only)
    device = machine.find()
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    minutes = options.minutes or (_QUICK_MINUTES if options.quick else _MINUTES)
    deadline = time.monotonic() + 60 * minutes
    state = run.Run(folder, folder / "work", device, kernels, options.quick, deadline)
    print(f"gpu-check: {device.name}, at most {minutes:g} minutes; logs: {state.work / 'logs'}", flush=True)
    status = 0
    try:
        run.everything(state)
    except KeyboardInterrupt:
        print("gpu-check: interrupted; the build is kept", file=sys.stderr)
        status = 130
    report.write(results, report.as_json(state, about))
    print(report.table(state, about))
    print(f"gpu-check: {results}")
    return status or int(any(outcome.status == run.FAILED for outcome in state.outcomes))


def _work(options: argparse.Namespace) -> int:
    if options.list:
        print("\n".join(plan.device_tests(plan.chosen(options.only))))
        return 0
    if options.run:
        folder = options.root
        if not (folder / "source.tar.gz").is_file():
            raise CheckError(f"{folder} is no packed folder; make one with --pack, or leave --run out")
        return _run(options, folder, options.json or folder / "results.json")
    from .pack import GgmlExtError, pack

    default = options.root / "build" / "gpu-check"
    folder = default if options.pack in (None, Path()) else options.pack
    try:
        if options.pack is None:
            machine.find()  # before minutes of packing
        print(f"gpu-check: {pack(options.root, folder)}")
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
