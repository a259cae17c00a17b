"""The build folder of scripts/cuda-compile: CMake's own compile commands, repeated for each architecture."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.files import cache_dir

# The architecture of the whole build.
WHOLE = "90a"


class NoCublas(GgmlExtError):
    """Neither the toolkit nor the Python environment has cuBLAS, and it cannot be downloaded."""


@dataclass(frozen=True)
class Source:
    """A .cu file of ours, and the command that compiles it in the build folder."""

    path: Path
    command: list[str]


def configure(repository: Path, build: Path, nvcc_version: str, *, attention: bool) -> None:
    """Configures the patched ggml-cuda in ``build``; cuBLAS comes from a wheel where CMake finds none.

    attention: with llama.cpp's own attention kernels; ours are always there.
    """
    status, output = _configure(repository, build, "", attention)
    if status and "has no cuBLAS" in output:
        wheel = str(_cublas_wheel(nvcc_version.split(".")[0]))
        status, output = _configure(repository, build, wheel, attention)
    if status:
        raise GgmlExtError(f"cmake failed: {build / 'configure.log'}")


def _configure(repository: Path, build: Path, cublas: str, attention: bool) -> tuple[int, str]:
    build.mkdir(parents=True, exist_ok=True)
    options = ["-DGGML_CUDA=ON", "-DGGML_EXT_TESTS=ON", f"-DCMAKE_CUDA_ARCHITECTURES={WHOLE}-real"]
    options += [f"-DGGML_EXT_CUBLAS={cublas}", f"-DPython_EXECUTABLE={sys.executable}"]
    options += [f"-DGGML_CUDA_FA={'ON' if attention else 'OFF'}"]
    command = ["cmake", "-S", str(repository), "-B", str(build), "-G", "Ninja", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (build / "configure.log").write_text(done.stdout)
    return done.returncode, " ".join(done.stdout.split())


def _cublas_wheel(major: str) -> Path:
    """Folder with include/ and lib/ of the PyPI wheel, downloaded once for all clones."""
    package, inner = (f"nvidia-cublas=={major}.*", f"cu{major}") if int(major) >= 13 else (
        f"nvidia-cublas-cu{major}", "cublas"
    )  # fmt: skip
    final = cache_dir() / f"cublas-{major}"
    if not final.is_dir():
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=cache_dir()) as folder:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, package]
            done = subprocess.run(pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                last = (done.stdout.strip().splitlines() or ["no message"])[-1]
                raise NoCublas(f"the CUDA toolkit has no cuBLAS, and pip cannot get {package}: {last}")
            Path(folder, "nvidia", inner).rename(final)
    return final


def our_sources(repository: Path, build: Path) -> list[Source]:
    """Our .cu files with their commands, from compile_commands.json."""
    commands = json.loads((build / "compile_commands.json").read_text())
    found = [
        Source(Path(entry["file"]), shlex.split(entry["command"]))
        for entry in commands
        if Path(entry["file"]).is_relative_to(repository / "cuda") and entry["file"].endswith(".cu")
    ]
    missing = {path.name for path in (repository / "cuda").rglob("*.cu")} - {
        source.path.name for source in found
    }
    if missing:
        raise GgmlExtError(f"not compiled into ggml-cuda: {', '.join(sorted(missing))}")
    return sorted(found, key=lambda source: source.path)


def for_architecture(command: Sequence[str], arch: str, output: Path) -> list[str]:
    """The compile command for another architecture, with ptxas -v, into another file."""
    result: list[str] = []
    parts = iter(command)
    for part in parts:
        if part in ("-MT", "-MF", "-o"):
            next(parts)
        elif part != "-MD" and not part.startswith("--generate-code="):
            result.append(part)
    return [*result, f"--generate-code=arch=compute_{arch},code=[sm_{arch}]", "-Xptxas=-v", "-o", str(output)]


def compile_for(source: Source, arch: str, repository: Path, build: Path) -> str:
    """What nvcc says when it compiles ``source`` for ``arch``; raises GgmlExtError with its error."""
    objects = build / "kernels"
    objects.mkdir(exist_ok=True)
    output = objects / f"{source.path.stem}.sm_{arch}.o"
    command = for_architecture(source.command, arch, output)
    if ccache := shutil.which("ccache"):
        command = [ccache, *command]
    # As in CMakeLists.txt, so that clones share the cache.
    env = {**os.environ, "CCACHE_BASEDIR": str(repository), "CCACHE_NOHASHDIR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=build, env=env)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("ptxas info")]
        raise GgmlExtError(f"{source.path.name} for sm_{arch}: {' '.join(lines[:6])}")
    return done.stderr


def build_whole(build: Path, targets: Sequence[str]) -> None:
    """Builds and links; raises GgmlExtError with the first error."""
    log = build / "build.log"
    with log.open("w") as file:
        command = ["cmake", "--build", str(build), "--target", *targets]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        first = next(iter(re.findall(r".*\berror\b.*", log.read_text())), "no message")
        raise GgmlExtError(f"the build of ggml-cuda failed: {first.strip()}; the log is {log}")
