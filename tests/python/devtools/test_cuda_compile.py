"""scripts/cuda-compile: what it reads from ptxas, what it refuses, what it does without a toolkit."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from devtools.cuda_compile import ptxas, report, residents, tree
from devtools.cuda_compile.ptxas import Cold, Kernel
from devtools.cuda_compile.residents import Residents
from devtools.gpu_check.plan import KERNELS, Ops
from ggml_ext import GgmlExtError

# nvcc 13.0 with -Xptxas -v: a kernel that spills and calls a function that is not inlined, and a plain one.
OUTPUT = """\
ptxas info    : 0 bytes gmem, 128 bytes cmem[4]
ptxas info    : Compiling entry function '_Z6spillsILi8EEvPf' for 'sm_90a'
ptxas info    : Function properties for _Z6spillsILi8EEvPf
    96 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads
ptxas info    : Function properties for _Z6helperPf
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 96 bytes cumulative stack size, 4096 bytes smem
ptxas info    : Compile time = 8.123 ms
ptxas info    : Compiling entry function 'plain' for 'sm_90a'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 568 bytes cmem[0]
"""
SPILLS = Kernel("_Z6spillsILi8EEvPf", "90a", 255, stack=96, spill_stores=24, spill_loads=28, shared=4096)
PLAIN = Kernel("plain", "90a", 40, stack=0, spill_stores=0, spill_loads=0, shared=0)

FAKE_NVCC = """#!/bin/sh
echo 'Cuda compilation tools, release 13.0, V13.0.88'
"""
FAKE_CMAKE = """#!/bin/sh
echo 'CMake Error at cuda.cmake:1 (message):'
echo '  GGML_CUDA: the CUDA toolkit has no'
echo '  cuBLAS; install it'
exit 1
"""

Run = Callable[[], subprocess.CompletedProcess[str]]


def test_each_kernel_has_its_own_numbers() -> None:
    assert ptxas.parse(OUTPUT) == [SPILLS, PLAIN]
    assert ptxas.parse("ptxas info    : 0 bytes gmem\n") == []


@pytest.mark.parametrize("lost", ["96 bytes stack frame", "Used 255", "Used 40"])
def test_a_report_that_ptxas_words_otherwise_is_an_error(lost: str) -> None:
    """A line that is not understood must not pass for a kernel without spills."""
    with pytest.raises(GgmlExtError, match="ptxas says nothing of registers and spills"):
        ptxas.parse("\n".join(line for line in OUTPUT.splitlines() if lost not in line))


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
def test_names_are_those_of_the_source() -> None:
    assert [kernel.name for kernel in ptxas.readable([SPILLS, PLAIN])] == ["spills<8>", "plain"]
    name = "_ZN12_GLOBAL__N_16kernelILi4ELb1EfEEvPKT1_"
    assert ptxas.readable([Kernel(name, "80", 1, 0, 0, 0, 0)])[0].name == (
        "(anonymous namespace)::kernel<4, true, float>"
    )


def test_local_memory_needs_an_excuse() -> None:
    kernels = [Kernel("slow<8>", "75", 255, 0, 4, 4, 0), Kernel("fast", "75", 9, 0, 0, 0, 0)]
    stack = Kernel("array", "80", 9, stack=16, spill_stores=0, spill_loads=0, shared=0)
    assert ptxas.complaints(kernels, []) == [
        "slow<8>, sm_75: 4 bytes of spill stores, 4 of spill loads, 0 of stack"
    ]
    assert ptxas.complaints(kernels, [Cold("slow", "runs once")]) == []
    assert len(ptxas.complaints([stack], [Cold("slo", "a part of a name")])) == 2
    assert ptxas.complaints([kernels[1]], [Cold("fast", "stale")]) == [
        "fast: listed as cold, but no such kernel uses local memory"
    ]


def made_up(registers: int) -> Kernel:
    return Kernel("kernel<8, true>", "80", registers, stack=0, spill_stores=0, spill_loads=0, shared=0)


def test_registers_leave_room_for_the_planned_blocks() -> None:
    """A thread of 3 blocks of 128 may have 170.67 registers; they are taken by 8, so 169 are too many."""
    plans = residents.parse("kernel<8, *>,128,3\n")
    assert plans == [Residents("kernel<8, *>", 128, 3)]
    assert residents.complaints([made_up(168), made_up(161)], plans) == []
    assert residents.complaints([made_up(168), made_up(169)], plans) == [
        "kernel<8, true>, sm_80: 169 registers, too many for 3 blocks of 128 threads"
    ]
    assert residents.complaints([made_up(1)], [Residents("kernel<9, *>", 128, 4)]) == [
        "kernel<9, *>: no such kernel"
    ]


def test_the_plans_say_what_they_count_on(repo_root: Path, tmp_path: Path) -> None:
    plans = residents.planned(repo_root, tmp_path)
    assert Residents("ggml_ext_fq4_tiles_kernel<*, 128>", 128, 2) in plans
    assert all(plan.threads % 32 == 0 and plan.blocks >= 1 for plan in plans)
    assert len({plan.pattern.split("<")[0] for plan in plans}) == 5  # decode, prefill, vec, tiles, kron


def test_the_list_of_cold_kernels(repo_root: Path) -> None:
    assert ptxas.parse_cold("# comment\n\nns::k: once: at load\n") == [Cold("ns::k", "once: at load")]
    with pytest.raises(GgmlExtError, match="'lonely' gives no reason"):
        ptxas.parse_cold("lonely\n")
    ptxas.parse_cold((repo_root / "cuda" / "cold-kernels.txt").read_text())


def test_the_table_has_a_row_per_kernel() -> None:
    older = Kernel(PLAIN.name, "75", 38, stack=0, spill_stores=2, spill_loads=3, shared=64)
    assert [line.split() for line in report.table([SPILLS, PLAIN, older], ["75", "90a"]).splitlines()] == [
        ["kernel", "sm_75", "sm_90a", "spill", "stack", "shared"],
        [SPILLS.name, "-", "255", "52", "96", "4096"],
        ["plain", "38", "40", "5", "0", "64"],
    ]


def test_the_report_is_json() -> None:
    written = json.loads(json.dumps(report.as_json("13.0", [("a.cu", PLAIN)], {"x": 3})))
    assert written["kernels"][0]["source"] == "a.cu"
    assert written["kernels"][0]["registers"] == 40
    assert written["cases_not_run"] == {"x": 3}


def test_a_command_for_another_architecture() -> None:
    command = ["nvcc", "-O3", "--generate-code=arch=compute_90a,code=[sm_90a]", "-MD", "-MT", "a.o", "-MF"]
    command += ["a.d", "-x", "cu", "-c", "a.cu", "-o", "a.o"]
    assert tree.for_architecture(command, "75", Path("b.o")) == [
        *["nvcc", "-O3", "-x", "cu", "-c", "a.cu"],
        *["--generate-code=arch=compute_75,code=[sm_75]", "-Xptxas=-v", "-o", "b.o"],
    ]


def test_a_source_that_the_build_leaves_out_is_named(tmp_path: Path) -> None:
    (tmp_path / "cuda").mkdir()
    for name in ("a.cu", "b.cu"):
        (tmp_path / "cuda" / name).write_text("")
    entry = {"file": str(tmp_path / "cuda" / "a.cu"), "command": "nvcc -DX='a b' a.cu", "directory": ""}
    other = {"file": str(tmp_path / "upstream" / "c.cu"), "command": "nvcc", "directory": ""}
    (tmp_path / "compile_commands.json").write_text(json.dumps([other, entry]))
    with pytest.raises(GgmlExtError, match=r"not compiled into ggml-cuda: b\.cu"):
        tree.our_sources(tmp_path, tmp_path)
    (tmp_path / "cuda" / "b.cu").unlink()
    (source,) = tree.our_sources(tmp_path, tmp_path)
    assert source.command == ["nvcc", "-DX=a b", "a.cu"]


def test_the_plan_names_every_op_of_ours(repo_root: Path, test_bin_dir: Path) -> None:
    """test-backend-ops has cases of each, and none of our sub-ops is left out."""
    header = (repo_root / "ggml_ext" / "core" / "ext_op.c").read_text()
    names = re.findall(r'\[GGML_EXT_OP_\w+\]\s*= \{ "(\w+)"', header)
    assert len(names) >= 4
    on_devices = {name for name in names if (repo_root / "cuda" / name).is_dir()}
    # A paged cache is for the CPU.
    assert set(names) - on_devices == {"kv_store", "kv_attend", "kv_score", "kv_code"}
    assert {f"EXT_{name.upper()}" for name in on_devices} <= {
        ops.op for kernel in KERNELS for ops in kernel.ops
    }
    from devtools.cuda_compile.__main__ import n_cases

    assert n_cases(test_bin_dir / "test-backend-ops", Ops("EXT_SCALE_ADD")) == 6
    with pytest.raises(GgmlExtError, match="has no case of NONSENSE"):
        n_cases(test_bin_dir / "test-backend-ops", Ops("NONSENSE"))


@pytest.fixture
def run(tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs it with tmp_path/bin as the whole PATH, an empty cache, and a pip that reaches no index."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYTHONPATH", str(repo_root))
    monkeypatch.setenv("GGML_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for variable in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(variable, raising=False)

    def call() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "devtools.cuda_compile", "--repository", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True)

    return call


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_without_nvcc_it_says_so(run: Run) -> None:
    done = run()
    assert done.returncode == 0
    assert done.stdout == ("cuda-compile: no nvcc: no CUDA source was compiled; install the CUDA toolkit\n")


def test_without_cublas_it_says_so(run: Run, tmp_path: Path) -> None:
    program(tmp_path / "bin" / "nvcc", FAKE_NVCC)
    program(tmp_path / "bin" / "cmake", FAKE_CMAKE)
    done = run()
    assert done.returncode == 0, done.stderr
    assert "the CUDA toolkit has no cuBLAS, and pip cannot get nvidia-cublas==13.*" in done.stdout
    assert done.stdout.count("\n") == 1
    assert done.stdout.endswith("no CUDA source was compiled\n")
    assert not (tmp_path / "cache" / "cublas-13").exists()


def test_another_error_of_cmake_is_an_error(run: Run, tmp_path: Path) -> None:
    program(tmp_path / "bin" / "nvcc", FAKE_NVCC)
    program(tmp_path / "bin" / "cmake", "#!/bin/sh\necho CMake Error\nexit 1\n")
    done = run()
    assert done.returncode == 1
    assert done.stderr.startswith("cuda-compile: error: cmake failed")
