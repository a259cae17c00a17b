"""Compiles every .cu file of cuda/ for one architecture, or with --all for the five, warnings as errors, and
reports registers and spills, which must leave room for the blocks that plans count on. With --all it then
builds the whole patched ggml-cuda and test-backend-ops for one. Where nvcc or cuBLAS is missing it says so
and ends with status 0."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from devtools.cuda_compile import ptxas, report, residents, tree
from devtools.cuda_compile.ptxas import Kernel
from devtools.gpu_check.checks import parse_ops
from devtools.gpu_check.plan import KERNELS, Ops, device_tests
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.runtime import cuda


def say(text: str) -> None:
    print(f"cuda-compile: {text}", flush=True)


def compile_kernels(repository: Path, build: Path, architectures: Sequence[str]) -> list[tuple[str, Kernel]]:
    """All our kernels on the architectures, with the names of their source files."""
    sources = tree.our_sources(repository, build)
    jobs = [(source, arch) for source in sources for arch in architectures]
    with ThreadPoolExecutor(int(os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or os.cpu_count() or 1)) as pool:
        outputs = pool.map(lambda job: tree.compile_for(job[0], job[1], repository, build), jobs)
        found = [
            (source.path.name, kernel)
            for (source, _), output in zip(jobs, outputs, strict=True)
            for kernel in ptxas.parse(output)
        ]
    names = ptxas.readable(kernel for _, kernel in found)
    return [(source, kernel) for (source, _), kernel in zip(found, names, strict=True)]


def n_cases(program: Path, ops: Ops) -> int:
    """Number of test-backend-ops' cases; it must have some."""
    command = [str(program), "support", "-b", "CPU", "--output", "csv", "-o", ops.op, "-p", ops.params]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise GgmlExtError(f"{program} ended with status {done.returncode}: {done.stderr.strip()[-200:]}")
    count: int = sum(row["op_name"] == ops.op for row in csv.DictReader(io.StringIO(done.stdout)))
    if count == 0:  # cases that compare whole graphs are not listed, only run
        command = [str(program), "test", "-b", "CPU", "-o", ops.op, "-p", ops.params]
        count = parse_ops(subprocess.run(command, capture_output=True, text=True).stdout)[1]
    if count == 0:
        raise GgmlExtError(f"{program} has no case of {ops}")
    return count


def whole_build(build: Path) -> dict[str, int]:
    """Builds ggml-cuda and what loads it; gives the number of cases of each test for a device."""
    start = time.monotonic()
    tree.build_whole(build, ["ggml-cuda", "test-backend-ops"])
    seconds = time.monotonic() - start
    say(f"ggml-cuda and test-backend-ops built and linked for sm_{tree.WHOLE} in {seconds:.0f}s")
    program = build / "bin" / "test-backend-ops"
    return {str(ops): n_cases(program, ops) for kernel in KERNELS for ops in kernel.ops}


def check(repository: Path, *, everything: bool) -> None:
    compiler = cuda.nvcc()
    if compiler is None:
        say(f"no {cuda.nvcc_name()}: no CUDA source was compiled; install the CUDA toolkit")
        return
    build = repository / "build" / "cuda"
    version = cuda.nvcc_version(compiler)
    try:
        tree.configure(repository, build, version, attention=everything)
    except tree.NoCublas as error:
        say(f"{error}: no CUDA source was compiled")
        return
    start = time.monotonic()
    architectures = cuda.ARCHITECTURES if everything else (tree.WHOLE,)
    kernels = compile_kernels(repository, build, architectures)
    print(report.table([kernel for _, kernel in kernels], architectures))
    say(f"{len(kernels)} kernels compiled by nvcc {version} in {time.monotonic() - start:.0f}s")
    compiled = [kernel for _, kernel in kernels]
    cold = ptxas.parse_cold((repository / "cuda" / "cold-kernels.txt").read_text())
    local = ptxas.complaints(compiled, cold)
    crowded = residents.complaints(compiled, residents.planned(repository, build))
    cases = whole_build(build) if everything and not local + crowded else {}
    path = build / "report.json"
    path.write_text(json.dumps(report.as_json(version, kernels, cases), indent=1) + "\n")
    if local:
        raise GgmlExtError(
            "local memory in kernels that cuda/cold-kernels.txt does not excuse: " + "; ".join(local)
        )
    if crowded:
        raise GgmlExtError("fewer blocks on a multiprocessor than plans count on: " + "; ".join(crowded))
    devices = cuda.devices()
    where = f"there is {', '.join(devices)}, scripts/gpu-check runs them" if devices else "no device"
    for name in device_tests():
        say(f"not run ({where}): {name}")
    say(f"the report is {path.relative_to(repository)}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="cuda-compile", description=__doc__)
    parser.add_argument("--repository", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--all", action="store_true", help="all architectures, and the whole of ggml-cuda")
    options = parser.parse_args()
    try:
        check(options.repository.resolve(), everything=options.all)
    except GgmlExtError as error:
        print(f"cuda-compile: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
