"""What this machine has of CUDA: the compiler, the architectures that it knows, and devices."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from ggml_ext.core.errors import GgmlExtError

# What scripts/cuda-compile compiles our kernels for.
ARCHITECTURES = ("75", "80", "86", "89", "90a")

_SECONDS = 60


def nvcc_name() -> str:
    """The compiler that CMake will look for: CUDACXX, that of CUDA_HOME or CUDA_PATH, or nvcc on the PATH."""
    toolkit = next((os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ), None)
    return os.environ.get("CUDACXX", str(Path(toolkit) / "bin" / "nvcc") if toolkit else "nvcc")


def nvcc() -> str | None:
    """Path of the compiler, None where there is none."""
    return shutil.which(nvcc_name())


def nvcc_version(compiler: str) -> str:
    """Release of the compiler ("13.0"). Raises GgmlExtError if it does not say one."""
    found = re.search(r"release (\d+\.\d+)", _output([compiler, "--version"]))
    if found is None:
        raise GgmlExtError(f"{compiler} --version names no release; install the CUDA toolkit again")
    return found[1]


def parse_architectures(text: str, compiler: str) -> list[str]:
    """Turns "80,86,90a" into CMake's list of exactly these architectures; GgmlExtError names what is none.

    A number is the compute capability without its point; from 90 on it may end in "a" or "f", as NVIDIA
    writes code for one architecture or family alone.
    """
    known = sorted(
        {int(number) for number in re.findall(r"compute_(\d+)", _output([compiler, "--list-gpu-arch"]))}
    )
    result = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{2,3})([af]?)", part.strip())
        if found is None or (found[2] and int(found[1]) < 90):
            raise GgmlExtError(f"--arch: {part.strip()!r} is no architecture; give a list such as 80,86,90a")
        if int(found[1]) not in known:
            listed = ", ".join(map(str, known)) or "none"
            raise GgmlExtError(f"--arch: {compiler} has no architecture {found[1]}; it has {listed}")
        result.append(f"{found[0]}-real")
    return list(dict.fromkeys(result))


def devices() -> list[str]:
    """Name and compute capability of NVIDIA's devices, as their driver lists them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    listed = _output([program, "--query-gpu=name,compute_cap", "--format=csv,noheader"])
    found = (re.fullmatch(r"(.+), (\d+\.\d)", line.strip()) for line in listed.splitlines())
    return [f"{match[1]} ({match[2]})" for match in found if match is not None]


def _output(command: list[str]) -> str:
    """What a program prints; nothing if it cannot run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
