"""The programs of a run: unpacked as they were packed, or built from the packed source."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import time
from pathlib import Path

from . import machine
from .plan import CheckError
from .state import Outcome, Run, telling_line

TARGETS = ("test-backend-ops", "llama-perplexity", "llama-bench", "bench_device")
SOURCE, BINARIES = "source.tar.gz", "bin.tar.xz"


def unpack(archive: Path, tree: Path) -> None:
    """The archive's files in ``tree``, which is made anew where the archive is another one."""
    stamp = tree / ".unpacked"
    identity = f"{archive.stat().st_size} {archive.stat().st_mtime_ns}\n"
    if stamp.is_file() and stamp.read_text() == identity:
        return
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(tree, filter="data")
        else:  # releases of Python before the filters; the archive is our own
            tar.extractall(tree)
    stamp.write_text(identity)


def options(tree: Path, build: Path, architectures: str, compiler: object) -> list[object]:
    """CMake's command line for the packed programs; llama.cpp's source is patched already. Warnings of a
    compiler that nobody has tried must not end a run."""
    command: list[object] = ["cmake", "-S", tree, "-B", build]
    command += ["-G", "Ninja"] if shutil.which("ninja") else []
    command += [f"-DGGML_EXT_LLAMA_SOURCE={tree / 'llama.cpp'}", "-DGGML_CUDA=ON", "-DGGML_RPC=OFF"]
    command += ["-DGGML_EXT_TESTS=ON", "-DGGML_EXT_WERROR=OFF", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]
    return [*command, f"-DCMAKE_CUDA_COMPILER={compiler}", f"-DPython_EXECUTABLE={sys.executable}"]


def _built(run: Run) -> Path:
    compiler = machine.nvcc()
    if compiler is None:
        raise CheckError("no nvcc; install the CUDA toolkit, or set CUDACXX")
    if not shutil.which("cmake"):
        raise CheckError("no cmake on the PATH; install it")
    tree, build = run.work / "source", run.work / "build"
    unpack(run.root / SOURCE, tree)
    jobs = str(os.cpu_count() or 2)
    make = ["cmake", "--build", build, "--parallel", jobs, "--target", *TARGETS]
    configure = options(tree, build, run.device.architecture, compiler)
    for name, command in (("configure", configure), ("build", make)):
        done = run.command(name, command)
        if done.returncode != 0:
            raise CheckError(f"{name}: {telling_line(done.stdout)}; see {run.logs / name}.log")
    return build / "bin"


def _starts(run: Run, folder: Path) -> str:
    """Empty, or why the programs there do not run on this device."""
    done = run.command("start", [folder / "bench_device", "--device", run.backend, "--quick", "copy"])
    return "" if done.returncode == 0 else telling_line(done.stdout)


def prepare(run: Run, outcome: Outcome) -> str:
    """Finds or builds the programs; a copy on the device shows that they run."""
    del outcome
    start, refused = time.monotonic(), ""
    if (run.root / BINARIES).is_file():
        unpack(run.root / BINARIES, run.work / "prebuilt")
        run.bin = run.work / "prebuilt" / "bin"
        refused = _starts(run, run.bin)
        if not refused:
            return "packed programs"
        print(f"gpu-check: the packed programs do not run here, so they are built: {refused}", flush=True)
    try:
        run.bin = _built(run)
    except CheckError as error:
        raise CheckError(f"{error}; packed programs: {refused}" if refused else str(error)) from error
    if refused := _starts(run, run.bin):
        raise CheckError(refused)
    return f"built for {run.device.architecture.removesuffix('-real')} in {time.monotonic() - start:.0f} s"
