"""The device, its toolkit, and where things lie."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from .plan import CheckError


@dataclass(frozen=True)
class Device:
    """``capability``: "9.0". ``driver``: the driver's version. ``toolkit``: nvcc's."""

    name: str
    capability: str
    driver: str
    memory_mib: int
    toolkit: str

    @property
    def architecture(self) -> str:
        """As CMAKE_CUDA_ARCHITECTURES takes it; Hopper's with its own instructions."""
        number = self.capability.replace(".", "")
        return f"{number}a-real" if number == "90" else f"{number}-real"

    def as_json(self) -> dict[str, object]:
        """For the results."""
        return asdict(self)


def nvcc() -> Path | None:
    """The toolkit's compiler: CUDACXX, CUDA_HOME, the PATH, or the usual folder."""
    if name := os.environ.get("CUDACXX"):
        return Path(name)
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if key in os.environ]
    places = [Path(home) / "bin" / "nvcc" for home in homes]
    if found := shutil.which("nvcc"):
        places.append(Path(found))
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((place for place in places if place.is_file()), None)


def tool(name: str) -> Path | None:
    """A program of the toolkit: on the PATH, or beside nvcc."""
    if found := shutil.which(name):
        return Path(found)
    beside = nvcc()
    program = beside.parent / name if beside else None
    return program if program and program.is_file() else None


@functools.cache
def library_path() -> dict[str, str]:
    """LD_LIBRARY_PATH with the folders of cuBLAS and the run-time library that are known here: those of the
    toolkit, and of the wheels beside this Python."""
    compiler = nvcc()
    root = compiler.resolve().parent.parent if compiler else Path("/usr/local/cuda")
    folders = [root / "lib64", root / "targets" / "x86_64-linux" / "lib", Path("/usr/local/cuda/lib64")]
    for place in sys.path:
        folders += sorted(Path(place).glob("nvidia/*/lib"))
    found = [
        str(folder) for folder in folders if any(folder.glob("libcublas*")) or any(folder.glob("libcudart*"))
    ]
    found += [os.environ["LD_LIBRARY_PATH"]] if os.environ.get("LD_LIBRARY_PATH") else []
    return {"LD_LIBRARY_PATH": ":".join(dict.fromkeys(found))} if found else {}


def _query(fields: str) -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        raise CheckError("no nvidia-smi on the PATH: no CUDA device here; run this on a machine with one")
    done = subprocess.run(
        [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"], capture_output=True, text=True
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        reason = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        raise CheckError(f"nvidia-smi: {reason[0]}; check the driver")
    return [field.strip() for field in lines[0].split(",")]


def find() -> Device:
    """The first device. Raises CheckError where there is none."""
    name, capability, driver, memory = _query("name,compute_cap,driver_version,memory.total")
    compiler = nvcc()
    if compiler is None:
        return Device(name, capability, driver, int(memory), "none")
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release ([\d.]+)", text)
    return Device(name, capability, driver, int(memory), version[1] if version else "unknown")
