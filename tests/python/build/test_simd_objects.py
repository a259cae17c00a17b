"""SIMD chosen at run time, in machine code: an instruction that a path's processors lack would only be met on
a processor that the build's machine is not.

Our files are compiled by the build's own commands, as on a machine whose -march=native has AVX-512 and with
the single -m flags of upstream's variants, and disassembled.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest

import objects
from objects import Instruction

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 instructions")

# As the build's machine would be if it were a recent one; then GGML_CPU_ALL_VARIANTS' own flags for it.
RICH = [
    *("-march=x86-64-v4", "-mavx512vnni", "-mavx512vbmi", "-mavx512bf16", "-mavx512vpopcntdq"),
    *("-msse4.2", "-mf16c", "-mfma", "-mbmi2", "-mavx", "-mavx2"),
    *("-mavx512f", "-mavx512cd", "-mavx512vl", "-mavx512dq", "-mavx512bw"),
]
PLAIN = ["-march=x86-64"]

SIMD_NAME = re.compile(r"/(cpu|sampler)/(x86|avx)[^/]*\.(c|cpp)$")
# Instructions on general registers that came with Haswell or later and no attribute of ours names.
GENERAL = re.compile(
    r"^(andn|bextr|blsi|blsr|blsmsk|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|lzcnt|movbe|ad[co]x)[lq]?$"
)
# Of AVX-512, what came after F, BW, VL, DQ, VNNI and VBMI.
LATER_AVX512 = re.compile(
    r"^v(pconflict|plzcnt|popcnt|pshufbitqmb|cvtne|dpbf16|gf2p8|pexpand[bw]|.*(?<!ps2)ph$)"
)


@pytest.fixture(scope="module")
def build(repo_root: Path) -> Path:
    return repo_root / "build" / "patched"


@pytest.fixture(scope="module")
def simd(
    build: Path, repo_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Instruction]]:
    """Instructions of the SIMD files by path."""
    files = [file for file in objects.commands(build, repo_root) if SIMD_NAME.search(file.as_posix())]
    compiled = objects.compile_all(build, repo_root, files, RICH, tmp_path_factory.mktemp("rich"))
    return {file.as_posix(): found for file, found in compiled.items()}


def found_by(pattern: re.Pattern[str], found: list[Instruction]) -> list[Instruction]:
    return [instruction for instruction in found if pattern.search(instruction.mnemonic)]


def test_the_attributes_stand_in_simd_files_only(repo_root: Path) -> None:
    for file in [*repo_root.glob("ggml_ext/**/*.c"), *repo_root.glob("ggml_ext/**/*.cpp")]:
        text = file.read_text()
        if "neon" not in file.name and re.search(r"GGML_EXT_AVX\w* +\w|__attribute__\(\(target\(", text):
            assert SIMD_NAME.search(file.as_posix()), f"{file}: not compiled as SIMD chosen at run time is"


def test_the_processor_is_asked_in_one_place(repo_root: Path) -> None:
    """__builtin_cpu_supports lacks features in compilers that we support."""
    for pattern in ("c", "cpp", "h", "inc"):
        for file in repo_root.glob(f"ggml_ext/**/*.{pattern}"):
            code = "\n".join(line.split("//")[0] for line in file.read_text().splitlines())
            assert not re.search(r"__builtin_cpu_(supports|is)\b", code), file


def test_all_simd_is_looked_at(simd: dict[str, list[Instruction]]) -> None:
    assert len(simd) >= 12
    for name, found in simd.items():
        assert sum(instruction.encoding != "legacy" for instruction in found) > 50, f"{name}: no SIMD"


def test_avx2_code_runs_on_haswell(simd: dict[str, list[Instruction]]) -> None:
    looked_at = set()
    for name, found in simd.items():
        whole = "/avx2" in name or "/avxvnni" in name
        mine = [instruction for instruction in found if whole or "_avx2" in instruction.function]
        if not mine:
            continue
        looked_at.add(name)
        assert [i for i in mine if i.encoding == "evex" or re.search(r"%k[0-7]|%zmm", i.text)] == [], name
        assert found_by(GENERAL, mine) == [], name
        dot_products = found_by(re.compile(r"^vpdp"), mine)
        assert bool(dot_products) == ("/avxvnni" in name), f"{name}: {dot_products[:3]}"
    assert len(looked_at) >= 8


def test_avx512_code_has_what_its_attribute_names(simd: dict[str, list[Instruction]]) -> None:
    for name, found in simd.items():
        mine = [i for i in found if "/avx512" in name or "_avx512" in i.function]
        assert found_by(LATER_AVX512, mine) == [], name
        assert found_by(GENERAL, mine) == [], name


def test_plain_code_is_plain(build: Path, repo_root: Path, tmp_path: Path) -> None:
    """The paths of processors without AVX2, and the choice between the paths, compiled for any x86-64."""
    files = [
        file
        for file in objects.commands(build, repo_root)
        if re.search(r"/cpu/[^/]+\.c$|/x86_features\.c$|/sampler/generic\.cpp$", file.as_posix())
        and not SIMD_NAME.search(file.as_posix())
    ]
    assert len(files) >= 14
    for file, found in objects.compile_all(build, repo_root, files, PLAIN, tmp_path).items():
        assert [i for i in found if i.encoding != "legacy" or GENERAL.search(i.mnemonic)] == [], file


def test_nothing_of_ours_runs_when_the_library_is_opened(build: Path) -> None:
    """llama.cpp opens every variant of ggml-cpu to ask which the processor can run."""
    ours = [
        path
        for path in (build / "upstream" / "ggml" / "src").rglob("*.o")
        if "/ggml_ext/" in path.as_posix() and re.search(r"/ggml-(cpu|base)[^/]*\.dir/", path.as_posix())
    ]
    assert len(ours) > 30
    for path in ours:
        found = {
            name for name in objects.sections(path) if re.match(r"\.(preinit_array|init_array|ctors)", name)
        }
        assert not found, path
