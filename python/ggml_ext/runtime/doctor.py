"""What is installed and what works here, one check per line."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from ggml_ext import __version__
from ggml_ext.core import paths
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.runtime import cuda, tools

CONVERTER_MODULES = ("torch", "transformers", "safetensors", "sentencepiece", "google.protobuf")
NEEDED_TOOLS = ("llama-bench", "llama-quantize")


@dataclass(frozen=True)
class Check:
    """One finding. ``state``: ok, missing (something optional) or broken (something that commands need)."""

    name: str
    state: str
    found: str
    remedy: str = ""


def _attempt(name: str, probe: Callable[[], str], remedy: str = "reinstall ggml-ext with pip") -> Check:
    """Run ``probe``; whatever it raises is the finding, for a doctor must not fall ill."""
    try:
        return Check(name, "ok", probe())
    except Exception as error:
        return Check(name, "broken", " ".join(str(error).split()) or type(error).__name__, remedy)


def _bindings() -> str:
    """Load llama.cpp through the bindings."""
    from ggml_ext.runtime.llama import bindings

    llama_cpp = bindings().llama_version().decode()
    return f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}, llama.cpp {llama_cpp}"


def _format() -> str:
    from ggml_ext.runtime import native

    return f"version {native.format_version()}, FQ4 is type {native.type_id('fq4')}"


def _cpu_paths() -> str:
    from ggml_ext.runtime import native

    return ", ".join(native.cpu_paths())


def _gpu() -> Check:
    """Devices that llama.cpp's tools see beside the processor."""
    try:
        call = [str(tools.find("llama-bench").absolute()), "--list-devices"]
        listed = subprocess.run(
            call,
            cwd=paths.bin_dir(),  # llama-bench loads backends that lie in the current folder
            capture_output=True,
            text=True,
            env=tools.environment(),
            timeout=60,
        ).stdout
    except (GgmlExtError, OSError, subprocess.TimeoutExpired) as error:
        return Check("GPU", "missing", str(error))
    devices = [line.strip() for line in listed.splitlines() if line.startswith(" ") and "(none)" not in line]
    if devices:
        return Check("GPU", "ok", "; ".join(devices))
    if (paths.lib_dir() / "libggml-cuda.so").is_file():
        return Check(
            "GPU", "missing", "none that the CUDA backend of the libraries sees", "see NVIDIA device"
        )
    return Check("GPU", "missing", "the libraries have no backend for one", "ggml-ext build --cuda")


def _nvidia() -> Check:
    """Devices that NVIDIA's driver lists, whether or not the libraries can use them."""
    if devices := cuda.devices():
        return Check("NVIDIA device", "ok", "; ".join(devices))
    return Check("NVIDIA device", "missing", "nvidia-smi lists none, or there is no nvidia-smi")


def _toolkit() -> Check:
    """What ggml-ext build --cuda would compile with."""
    name, compiler = "ggml-ext build --cuda", cuda.nvcc()
    if compiler is None:
        return Check(name, "missing", f"no {cuda.nvcc_name()}", "install the CUDA toolkit")
    return _attempt(name, lambda: f"nvcc {cuda.nvcc_version(compiler)} ({compiler})")


def _tools() -> str:
    for name in NEEDED_TOOLS:
        tools.find(name)
    return f"{paths.bin_dir()}: {', '.join(tools.available())}"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _extra(name: str, modules: tuple[str, ...], extra: str) -> Check:
    lacking = [module for module in modules if not _installed(module)]
    if lacking:
        return Check(name, "missing", f"not there: {', '.join(lacking)}", f"pip install 'ggml-ext[{extra}]'")
    return Check(name, "ok", ", ".join(modules))


def _compilers() -> Check:
    lacking = [program for program in ("cmake", "cc", "c++") if shutil.which(program) is None]
    if lacking:
        return Check(
            "ggml-ext build",
            "missing",
            f"not there: {', '.join(lacking)}",
            "install a C++ compiler and CMake",
        )
    return Check("ggml-ext build", "ok", "cmake, cc, c++")


def checks() -> list[Check]:
    """All findings, in the order in which one builds on the other."""
    return [
        Check("ggml-ext", "ok", f"{__version__}, Python {platform.python_version()}, {platform.machine()}"),
        _attempt("libraries", lambda: str(paths.lib_dir())),
        _attempt("bindings", _bindings, "install the llama-cpp-python release that ggml-ext names"),
        _attempt("GGUF extension", _format),
        _attempt("FQ4 on this processor", _cpu_paths),
        _gpu(),
        _nvidia(),
        _attempt("tools", _tools),
        _attempt("Hugging Face converter", lambda: str(paths.converter_dir())),
        _extra("convert from Hugging Face", CONVERTER_MODULES, "convert"),
        _extra("compare --plot", ("matplotlib",), "plot"),
        _compilers(),
        _toolkit(),
    ]
