"""Gathers what a run on a device needs in one folder. Runs where ggml-ext is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from ggml_ext.build import upstream
from ggml_ext.core.errors import GgmlExtError

from . import machine, programs
from .plan import CheckError

MAX_BYTES, MAX_PREBUILT_BYTES = 30_000_000, 40_000_000
"""Of a packed folder, without and with programs."""

# With upstream.py and what it imports.
_MODULES = ("__init__.py", "build", "core")
_PROJECT = (
    "CMakeLists.txt",
    "ggml_ext",
    "cuda",
    "tests/native",
    *(f"python/ggml_ext/{name}" for name in _MODULES),
)
# ggml's backends that are not built; conversion is done here.
_DROP = ("conversion", "gguf-py", "convert_hf_to_gguf.py")
_BACKENDS = ("ggml-cpu", "ggml-cuda", "ggml-cuda.h")
_MODEL = "tests/models/pydoc-8m"
_TEXT_BYTES = 60_000

_RUNNER = """#!/usr/bin/env bash
# Checks and measures ggml-ext on this machine's CUDA device. Needs this folder, Python 3.10 and the CUDA
# toolkit; without packed programs for the device CMake and a C++ compiler as well. --help says more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec "${PYTHON:-python3}" -m gpu_check --root "$PWD" --run "$@"
"""


def _keep(relative: str) -> bool:
    parts = relative.split("/")
    if parts[0] in _DROP:
        return False
    # ggml/src/ggml-<backend>/... and ggml/include/ggml-<backend>.h
    if parts[:2] == ["ggml", "src"] and len(parts) > 3 and parts[2].startswith("ggml-"):
        return parts[2] in _BACKENDS
    return True


def _commit(repository: Path) -> str:
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _write_source(repository: Path, archive: Path) -> None:
    """The project and the patched llama.cpp, which then needs no patches."""
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        tree = Path(folder) / "llama.cpp"
        upstream.prepare(tree, patches=repository / "ggml_ext" / "patches")
        with tarfile.open(archive, "w:gz", compresslevel=9) as tar:
            for path in sorted(tree.rglob("*")):
                relative = path.relative_to(tree).as_posix()
                if path.is_file() and path.name != upstream.STAMP and _keep(relative):
                    tar.add(path, f"llama.cpp/{relative}")
            for name in _PROJECT:
                start = repository / name
                for path in [start] if start.is_file() else sorted(start.rglob("*")):
                    relative = path.relative_to(repository).as_posix()
                    if path.is_file() and "__pycache__" not in path.parts and not relative.endswith(".patch"):
                        tar.add(_without_series(path, Path(folder)), relative)


def _without_series(path: Path, folder: Path) -> Path:
    if path.name != "series":
        return path
    empty = folder / "series"
    empty.write_text("# applied already\n")
    return empty


def _tool() -> list[str]:
    """The command line of the package that runs here."""
    return [sys.executable, "-c", "from ggml_ext.cli.entry import main; main()"]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        raise CheckError(f"packing failed: {lines[-1]}")


def _write_models(repository: Path, folder: Path, text: Path) -> None:
    """The demo model in FQ4, as it is and with online transforms."""
    tool = _tool()
    model = str(repository / _MODEL)
    _run([*tool, "convert", model, "-o", str(folder / "fq4.gguf"), "--type", "fq4"])
    command = [*tool, "convert", model, "-o", str(folder / "fq4-flatquant.gguf"), "--type", "fq4"]
    command += ["--transform", "flatquant", "--rounding", "rtn"]
    command += ["--calibration", str(text), "--samples", "16"]
    _run(command)


def _write_text(repository: Path, folder: Path) -> tuple[Path, Path]:
    """(text of the perplexities, text of the calibration): documentation of the Python that runs here."""
    _run([sys.executable, str(repository / "scripts" / "demo_text.py"), str(folder)])
    held_out = (folder / "heldout.txt").read_bytes()[:_TEXT_BYTES]
    text = folder / "text.txt"
    text.write_bytes(held_out.decode("utf-8", "ignore").encode())
    return text, folder / "train.txt"


# Any x86-64 processor since Haswell, as the machine with the device may be another one.
_PORTABLE = ("NATIVE=OFF", "AVX2=ON", "FMA=ON", "F16C=ON", "BMI2=ON")


def _build_programs(source: Path, work: Path, architectures: str) -> Path:
    """Builds the packed source's programs for CMake's list of architectures; gives their folder."""
    compiler = machine.nvcc()
    if compiler is None:
        raise CheckError("--prebuilt: no nvcc; install the CUDA toolkit, or set CUDACXX")
    tree, build = work / "tree", work / "build"
    programs.unpack(source, tree)
    configure = [str(word) for word in programs.options(tree, build, architectures, compiler)]
    _run([*configure, *(f"-DGGML_{setting}" for setting in _PORTABLE)])
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 2)
    _run(["cmake", "--build", str(build), "--parallel", jobs, "--target", *programs.TARGETS])
    return build / "bin"


def _write_programs(folder: Path, archive: Path) -> None:
    """The programs of a build and the libraries beside them, without symbols."""
    with tempfile.TemporaryDirectory(dir=archive.parent) as stripped, tarfile.open(archive, "w:xz") as tar:
        for path in sorted(folder.iterdir()):
            if path.name in programs.TARGETS or ".so" in path.suffixes:
                copy = Path(stripped) / path.name
                shutil.copy(path, copy)
                _run(["strip", str(copy)])
                tar.add(copy, f"bin/{path.name}")


def _move(staging: Path, folder: Path) -> None:
    staging.chmod(0o777 & ~_umask())
    shutil.rmtree(folder, ignore_errors=True)
    staging.replace(folder)


def pack(repository: Path, folder: Path, architectures: str = "") -> str:
    """Makes ``folder`` anew, whole or not at all; returns one line about it. ``architectures``: CMake's list
    of what the packed programs are built for; empty: none are.

    Raises CheckError and GgmlExtError.
    """
    if folder.exists() and not (folder / "about.json").is_file():
        raise CheckError(f"{folder}: holds other files; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent) as texts:
            print("gpu-check: packing models", flush=True)
            text, training = _write_text(repository, Path(texts))
            (staging / "models").mkdir()
            _write_models(repository, staging / "models", training)
            shutil.copyfile(text, staging / "text.txt")
        print("gpu-check: packing source", flush=True)
        _write_source(repository, staging / programs.SOURCE)
        if architectures:
            print(f"gpu-check: building programs for {architectures}", flush=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as work:
                built = _build_programs(staging / programs.SOURCE, Path(work), architectures)
                _write_programs(built, staging / programs.BINARIES)
        package = staging / "gpu_check"
        package.mkdir()
        for path in Path(__file__).parent.glob("*.py"):
            if path.name != Path(__file__).name:
                shutil.copyfile(path, package / path.name)
        runner = staging / "gpu-check"
        runner.write_text(_RUNNER)
        runner.chmod(0o755)
        about = {"commit": _commit(repository), "architectures": architectures}
        (staging / "about.json").write_text(json.dumps(about) + "\n")
        size = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
        most = MAX_PREBUILT_BYTES if architectures else MAX_BYTES
        if size > most:
            raise CheckError(f"{folder} would have {size} bytes, at most {most}; name fewer with --arch")
        _move(staging, folder)
    except OSError as error:
        raise CheckError(f"{error.filename}: {error.strerror}; check free space and permissions") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return f"{folder}: {size / 1e6:.1f} MB; on the machine with the device: {folder.name}/gpu-check"


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


__all__ = ["MAX_BYTES", "GgmlExtError", "pack"]
