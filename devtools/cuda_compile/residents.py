"""Whether kernels have so few registers that a multiprocessor holds the thread blocks that the plans of cuda/
count on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from devtools.cuda_compile.ptxas import Kernel
from ggml_ext.core.errors import GgmlExtError

# Of a multiprocessor, on every architecture that is compiled for. A warp takes units of 256, a thread of 8.
REGISTERS = 65536
UNIT = 8


@dataclass(frozen=True)
class Residents:
    """Of kernels whose name matches ``pattern`` (as in fnmatch), ``blocks`` of ``threads`` run at once."""

    pattern: str
    threads: int
    blocks: int


def parse(output: str) -> list[Residents]:
    """What residents.cpp prints."""
    rows = (line.rsplit(",", 2) for line in output.splitlines())
    return [Residents(pattern, int(threads), int(blocks)) for pattern, threads, blocks in rows]


def planned(repository: Path, build: Path) -> list[Residents]:
    """What the plans say, from their own headers; GgmlExtError where they do not compile."""
    program = build / "residents"
    folders = [
        repository / "tests" / "native" / "cuda-emulator",
        repository / "cuda",
        repository / "ggml_ext",
    ]
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-DGGML_EXT_CUDA_EMULATED", "-w"]
    command += [f"-I{folder}" for folder in folders]
    command += [str(Path(__file__).with_suffix(".cpp")), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise GgmlExtError(f"residents.cpp does not compile: {' '.join(done.stderr.splitlines()[:4])}")
    return parse(subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout)


def complaints(kernels: Iterable[Kernel], plans: Iterable[Residents]) -> list[str]:
    """Kernels with too many registers for their plan, and plans for kernels that do not exist."""
    listed = list(kernels)
    found = []
    for plan in plans:
        own = [kernel for kernel in listed if fnmatchcase(kernel.name, plan.pattern)]
        if not own:
            found.append(f"{plan.pattern}: no such kernel")
        for kernel in own:
            registers = -(-kernel.registers // UNIT) * UNIT
            if plan.blocks * plan.threads * registers > REGISTERS:
                found.append(
                    f"{kernel.name}, sm_{kernel.arch}: {kernel.registers} registers, too many for "
                    f"{plan.blocks} blocks of {plan.threads} threads"
                )
    return found
