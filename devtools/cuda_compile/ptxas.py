"""What ptxas -v says of each kernel: registers, spills, stack, shared memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ggml_ext.core.errors import GgmlExtError

_ENTRY = re.compile(r"Compiling entry function '([^']+)' for 'sm_(\w+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture. Bytes of spills and stack are per thread, of shared memory per block
    and without the dynamic part."""

    name: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def uses_local_memory(self) -> bool:
        """Whether registers did not suffice, or an array is indexed at run time."""
        return self.stack + self.spill_stores + self.spill_loads > 0


def parse(output: str) -> list[Kernel]:
    """The kernels of nvcc's output with -Xptxas -v, under their mangled names.

    A kernel's lines are: compiling entry function; properties (its own, then those of functions that it
    calls); used registers. Raises GgmlExtError if one of them is missing: then ptxas speaks another way.
    """
    found: list[Kernel] = []
    entry: tuple[str, str] | None = None
    stack: tuple[int, int, int] | None = None
    owner = ""
    for line in output.splitlines():
        if match := _ENTRY.search(line):
            _complete(entry)
            entry, stack = (match[1], match[2]), None
        elif match := _PROPERTIES.search(line):
            owner = match[1]
        elif entry is None:
            continue
        elif (match := _STACK.search(line)) and owner == entry[0]:
            stack = (int(match[1]), int(match[2]), int(match[3]))
        elif match := _REGISTERS.search(line):
            if stack is None:
                _complete(entry)
            else:
                shared = _SHARED.search(line)
                found.append(Kernel(*entry, int(match[1]), *stack, int(shared[1]) if shared else 0))
            entry = None
    _complete(entry)
    return found


def _complete(entry: tuple[str, str] | None) -> None:
    if entry is not None:
        raise GgmlExtError(f"ptxas says nothing of registers and spills: {entry[0]} for sm_{entry[1]}")


def readable(kernels: Iterable[Kernel]) -> list[Kernel]:
    """The same with names as in the source, without parameters; mangled where there is no c++filt."""
    listed = list(kernels)
    program = shutil.which("c++filt") or shutil.which("cu++filt")
    if program is None:
        return listed
    mangled = "\n".join(kernel.name for kernel in listed)
    names = subprocess.run([program], input=mangled, capture_output=True, text=True, check=True).stdout
    return [
        replace(kernel, name=_without_parameters(name))
        for kernel, name in zip(listed, names.splitlines(), strict=True)
    ]


def _without_parameters(name: str) -> str:
    """ "void f<(int)8, T>(float*)" becomes "f<8, T>"."""
    name = re.sub(r"\((?:unsigned )?(?:int|bool|char|short|long|\w+_\w+)\)", "", name.removeprefix("void "))
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0 and i > 0:
            return name[:i]
    return name


@dataclass(frozen=True)
class Cold:
    """Kernels that may use local memory: those whose name, without template arguments, is ``name``."""

    name: str
    reason: str


def parse_cold(text: str) -> list[Cold]:
    """Lines "kernel: reason"; # begins a comment line. GgmlExtError for a line without a reason."""
    found = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            name, _, reason = line.partition(": ")
            if not reason.strip():
                raise GgmlExtError(f"{line.strip()!r} gives no reason; write it as kernel: reason")
            found.append(Cold(name.strip(), reason.strip()))
    return found


def complaints(kernels: Iterable[Kernel], cold: Iterable[Cold]) -> list[str]:
    """Kernels that use local memory and are not cold, and cold ones that do not (any more)."""
    allowed = {entry.name for entry in cold}
    local = [kernel for kernel in kernels if kernel.uses_local_memory]
    found = [
        f"{kernel.name}, sm_{kernel.arch}: {kernel.spill_stores} bytes of spill stores, "
        f"{kernel.spill_loads} of spill loads, {kernel.stack} of stack"
        for kernel in local
        if _base(kernel.name) not in allowed
    ]
    stale = sorted(allowed - {_base(kernel.name) for kernel in local})
    return found + [f"{name}: listed as cold, but no such kernel uses local memory" for name in stale]


def _base(name: str) -> str:
    return name.split("<")[0]
