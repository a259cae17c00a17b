"""Objects of our C and C++ files, compiled as the build compiles them but for a processor of the test's
choice, and their instructions as objdump reads them. x86-64 only."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

# objdump's line: address, bytes, instruction.
_LINE = re.compile(r"^\s*[0-9a-f]+:\t((?:[0-9a-f]{2} )+)\s*\t(.*)$")
_FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
_SEGMENT_OR_ADDRESS_PREFIX = {0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x67}


@dataclass(frozen=True)
class Instruction:
    """One instruction in ``function``; ``encoding`` is "evex", "vex" or "legacy"."""

    function: str
    encoding: str
    text: str

    @property
    def mnemonic(self) -> str:
        prefixes = ("lock", "rep", "repz", "repnz", "notrack", "bnd", "{vex}")
        return next((word for word in self.text.split() if word not in prefixes), "")


def commands(build: Path, root: Path) -> dict[Path, list[str]]:
    """The compiler's command line for each of our files in llama.cpp's libraries, by its path below root."""
    database = build / "compile_commands.json"
    if not database.is_file():
        pytest.fail(f"{build}: no compile_commands.json; run scripts/setup --tests", pytrace=False)
    found: dict[Path, list[str]] = {}
    for entry in json.loads(database.read_text()):
        file = Path(entry["file"]).resolve()
        if file.is_relative_to((root / "ggml_ext").resolve()):
            found.setdefault(file.relative_to(root.resolve()), shlex.split(entry["command"]))
    return found


def compile_for(build: Path, command: list[str], flags: list[str], out: Path) -> Path:
    """Compiles with ``flags`` in the place of the command's -march=native: where a user's flags stand, before
    the options of the single file."""
    arguments = [argument for argument in command if argument not in ("-march=native", "-mtune=native")]
    first = next(i for i, argument in enumerate(arguments) if argument.startswith("-"))
    arguments[first:first] = flags
    arguments[arguments.index("-o") + 1] = str(out)
    subprocess.run(arguments, cwd=build, check=True, capture_output=True, text=True, timeout=300)
    return out


def compile_all(
    build: Path, root: Path, files: list[Path], flags: list[str], folder: Path
) -> dict[Path, list[Instruction]]:
    """The instructions of each file, compiled with ``flags``."""
    known = commands(build, root)

    def one(file: Path) -> list[Instruction]:
        return list(
            instructions(compile_for(build, known[file], flags, folder / f"{'-'.join(file.parts)}.o"))
        )

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(files, pool.map(one, files), strict=True))


def instructions(path: Path) -> Iterator[Instruction]:
    result = subprocess.run(
        ["objdump", "--disassemble", "--insn-width=16", str(path)],
        check=True,
        capture_output=True,
        text=True,
    )
    function = ""
    for line in result.stdout.splitlines():
        if match := _FUNCTION.match(line):
            function = match[1]
        elif match := _LINE.match(line):
            code = [int(byte, 16) for byte in match[1].split()]
            while len(code) > 1 and code[0] in _SEGMENT_OR_ADDRESS_PREFIX:
                del code[0]
            # In 64-bit code these bytes begin nothing else.
            encoding = {0x62: "evex", 0xC4: "vex", 0xC5: "vex"}.get(code[0], "legacy")
            yield Instruction(function, encoding, match[2].split("#")[0].strip())


def sections(path: Path) -> set[str]:
    """Names of an object's sections."""
    result = subprocess.run(
        ["objdump", "--section-headers", str(path)], check=True, capture_output=True, text=True
    )
    return {line.split()[1] for line in result.stdout.splitlines() if re.match(r"^\s+\d+ ", line)}
