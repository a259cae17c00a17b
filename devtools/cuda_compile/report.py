"""The report of scripts/cuda-compile: a table for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from devtools.cuda_compile.ptxas import Kernel

_NAME_WIDTH = 72


def table(kernels: Sequence[Kernel], architectures: Sequence[str]) -> str:
    """One row per kernel: registers on each architecture, then the most bytes of spills (stores and loads),
    stack and static shared memory on any of them. A kernel that an architecture lacks has "-" there."""
    rows = [["kernel", *(f"sm_{arch}" for arch in architectures), "spill", "stack", "shared"]]
    for name in dict.fromkeys(kernel.name for kernel in kernels):
        of_name = [kernel for kernel in kernels if kernel.name == name]
        registers = {kernel.arch: str(kernel.registers) for kernel in of_name}
        most = [
            max(kernel.spill_stores + kernel.spill_loads for kernel in of_name),
            max(kernel.stack for kernel in of_name),
            max(kernel.shared for kernel in of_name),
        ]
        rows.append([_cut(name), *(registers.get(arch, "-") for arch in architectures), *map(str, most)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def as_json(
    nvcc: str, kernels: Sequence[tuple[str, Kernel]], cases_not_run: dict[str, int]
) -> dict[str, object]:
    """The whole report; ``kernels`` with their source files, ``cases_not_run`` by name of the device test."""
    return {
        "nvcc": nvcc,
        "kernels": [{"source": source, **asdict(kernel)} for source, kernel in kernels],
        "cases_not_run": cases_not_run,
    }


def _cut(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 3] + "..."
