"""Builds the patched llama.cpp again, elsewhere or with other options, from the sources in the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ggml_ext.core import paths, process
from ggml_ext.core.cpus import processors
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.outputs import check_folder
from ggml_ext.core.progress import track
from ggml_ext.runtime import cuda as toolkit
from ggml_ext.runtime import tools
from ggml_ext.runtime.cache_types import CacheTypes

MIN_CMAKE = (3, 21)
_NINJA = re.compile(r"\[(\d+)/(\d+)\]")
_MAKE = re.compile(r"\[\s*(\d+)(%)\]")


def sdk_dir() -> Path:
    """Folder of our CMakeLists.txt, C sources and patches: in the package, or the repository around it."""
    for folder in (paths.PACKAGE / "sdk", paths.PACKAGE.parents[1]):
        if (folder / "CMakeLists.txt").is_file() and (folder / "ggml_ext" / "patches" / "series").is_file():
            return folder
    raise GgmlExtError(f"no sources to build from: {paths.PACKAGE / 'sdk'}; reinstall ggml-ext")


def _cmake() -> str:
    cmake = shutil.which("cmake")
    if cmake is None:
        raise GgmlExtError("cmake is not on the PATH; install it, for example with pip install cmake")
    text = subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"(\d+)\.(\d+)", text)
    if found is None or (int(found[1]), int(found[2])) < MIN_CMAKE:
        wanted = ".".join(map(str, MIN_CMAKE))
        version = found[0] if found else "unknown"
        raise GgmlExtError(
            f"{cmake}: version {version}, {wanted} or newer is needed; pip install --upgrade cmake"
        )
    return cmake


def _check_compilers(cuda: bool) -> None:
    for variable, default, package in (("CC", "cc", "gcc"), ("CXX", "c++", "g++")):
        program = os.environ.get(variable, default).split()[0]
        if shutil.which(program) is None:
            raise GgmlExtError(f"{program} is not on the PATH; install {package} or clang, or set {variable}")
    if cuda and toolkit.nvcc() is None:
        raise GgmlExtError(
            f"--cuda: no {toolkit.nvcc_name()}; install the CUDA toolkit, or set CUDACXX to its nvcc"
        )


def _architectures(text: str | None) -> str:
    """CMake's argument for --arch; without one, CMakeLists.txt looks for devices anew."""
    compiler = toolkit.nvcc()
    if text is None or compiler is None:
        return "-UCMAKE_CUDA_ARCHITECTURES"
    return f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(toolkit.parse_architectures(text, compiler))}"


def build(
    dest: Path,
    *,
    source: Path | None = None,
    cuda: bool = False,
    arch: str | None = None,
    rpc: bool = False,
) -> Path:
    """Builds the patched llama.cpp into dest/lib, dest/bin and dest/include; returns dest, absolute.

    source: a llama.cpp tree or archive in place of the pinned release, not changed. cuda, rpc: with these
    backends. arch: CUDA architectures as in "80,90a", in place of those of this machine's devices (of
    CUDA's ARCHITECTURES where it has none). dest/build keeps the build tree, so that a second run compiles
    only what changed. Raises GgmlExtError naming the missing program, or the log when the build fails.
    """
    dest = dest.resolve()
    check_folder(dest, [source])
    _require_ours(dest)
    cmake = _cmake()
    _check_compilers(cuda)
    architectures = _architectures(arch)
    work, log = dest / "build", dest / "build.log"
    try:
        work.mkdir(parents=True, exist_ok=True)
        log.write_text("")
    except OSError as error:
        raise GgmlExtError(f"cannot write: {dest} ({error.strerror}); choose a writable folder") from error
    configure: list[str | Path] = [cmake, "-S", sdk_dir(), "-B", work, f"-DCMAKE_INSTALL_PREFIX={dest}"]
    configure += [f"-DGGML_EXT_LLAMA_SOURCE={source.resolve() if source is not None else ''}"]
    configure += [f"-DGGML_CUDA={_switch(cuda)}", f"-DGGML_RPC={_switch(rpc)}"]
    configure += [architectures, f"-DPython_EXECUTABLE={sys.executable}"]
    if shutil.which("ninja") is not None and not (work / "Makefile").exists():
        configure += ["-G", "Ninja"]
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(processors()))
    with track(100, "building llama.cpp", "%") as advance:
        shown = 0.0

        def watch(output: str) -> None:
            nonlocal shown
            percent = _percent(output)
            if percent > shown:
                advance(percent - shown)
                shown = percent

        _run(configure, log)
        _run([cmake, "--build", work, "--parallel", jobs], log, watch)
        _run([cmake, "--install", work, "--component", "runtime"], log)
        advance(100 - shown)
    return dest


def _require_ours(dest: Path) -> None:
    """Raises GgmlExtError for a folder that holds other things than an earlier build of ours."""
    names = {path.name for path in dest.iterdir()} if dest.is_dir() else set()
    try:
        known = "GGML_EXT_LLAMA_SOURCE" in (dest / "build" / "CMakeCache.txt").read_text(errors="replace")
    except OSError:
        known = names <= {"build", "build.log"}  # ended before CMake had begun
    if not known:
        raise GgmlExtError(f"{dest}: holds other files; choose an empty folder")


def _switch(on: bool) -> str:
    return "ON" if on else "OFF"


def _percent(output: str) -> float:
    """Progress of ninja or make at the end of their output, in percent."""
    if done := _NINJA.findall(output):
        return 100 * int(done[-1][0]) / max(1, int(done[-1][1]))
    return float(done[-1][0]) if (done := _MAKE.findall(output)) else 0.0


def _run(command: Sequence[str | Path], log: Path, watch: Callable[[str], None] | None = None) -> None:
    finished = process.run(command, watch=watch)
    with log.open("a", encoding="utf-8") as file:
        file.write(finished.output)
    if finished.status != 0:
        raise GgmlExtError(f"the build failed: {_reason(finished.output)}; the log is {log}")


def _reason(output: str) -> str:
    """What CMake says below the place of its error, else the first line with an error."""
    if stated := re.search(r"^CMake Error at .*:\n\n?((?:  .+\n)+)", output, re.MULTILINE):
        return " ".join(stated[1].split())
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
    return (errors or lines or ["no message"])[0]


_NO_CHECKPOINTS = ["--ctx-checkpoints", "0"]
"""llama-server's checkpoints of sliding windows lead back to where positions are missing in other layers."""


def run_tool(name: str, arguments: Sequence[str], *, kv: str | None = None) -> NoReturn:
    """Becomes the patched llama.cpp tool `name`, ``kv``: with this budget of its KV cache, or a paged one.

    Raises GgmlExtError, naming the tools that exist.
    """
    program = tools.find(name)
    environment = tools.environment()
    if kv is not None:
        cache = CacheTypes.of("f16", "f16", kv)
        environment["GGML_EXT_KV"] = cache.setting
        if program.name == "llama-server" and cache.has_boundary:
            arguments = [*_NO_CHECKPOINTS, *arguments]
    try:
        os.execve(program, [str(program), *arguments], environment)
    except OSError as error:
        raise GgmlExtError(f"cannot start: {program} ({error.strerror}); reinstall ggml-ext") from error
