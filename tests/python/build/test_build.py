"""`ggml-ext build`, `ggml-ext run`, and what the wheel holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ggml_ext import GgmlExtError
from ggml_ext.build import toolkit as build
from ggml_ext.build import upstream
from ggml_ext.core import paths
from ggml_ext.runtime import cuda

PROJECT = """
cmake_minimum_required(VERSION 3.21)
project(small C)
message(STATUS "CUDA ${GGML_CUDA} RPC ${GGML_RPC} source ${GGML_EXT_LLAMA_SOURCE}")
message(STATUS "architectures <${CMAKE_CUDA_ARCHITECTURES}>")
add_library(small SHARED small.c)
install(TARGETS small LIBRARY DESTINATION lib COMPONENT runtime)
install(FILES small.c DESTINATION sdk COMPONENT package)
"""

RUN = """
import sys
from ggml_ext import GgmlExtError
from ggml_ext.build import toolkit as build
try:
    build.run_tool(sys.argv[1], sys.argv[2:])
except GgmlExtError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def small_sdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for the packaged sources: one library that compiles at once."""
    sdk = tmp_path / "sdk"
    sdk.mkdir()
    (sdk / "CMakeLists.txt").write_text(PROJECT)
    (sdk / "small.c").write_text("int small(void);\nint small(void) { return 1; }\n")
    monkeypatch.setattr(build, "sdk_dir", lambda: sdk)
    return sdk


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on the PATH, with a cmake and two compilers that do nothing."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, text in {"cmake": "echo cmake version 3.21.0", "cc": "", "c++": ""}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    for variable in ("CC", "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    return folder


@pytest.mark.parametrize("missing", ["cmake", "cc", "c++"])
def test_a_missing_program_is_named(missing: str, programs: Path, tmp_path: Path) -> None:
    (programs / missing).unlink()
    with pytest.raises(GgmlExtError, match=rf"^{missing.replace('+', '.')} is not on the PATH; install"):
        build.build(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_old_cmake_is_refused(programs: Path, tmp_path: Path) -> None:
    (programs / "cmake").write_text("#!/bin/sh\necho cmake version 3.18.4\n")
    with pytest.raises(GgmlExtError, match=r"version 3\.18, 3\.21 or newer is needed"):
        build.build(tmp_path / "out")


def test_cuda_without_nvcc_is_refused(programs: Path, tmp_path: Path) -> None:
    with pytest.raises(GgmlExtError, match="--cuda: no nvcc; install the CUDA toolkit"):
        build.build(tmp_path / "out", cuda=True)


NVCC = """#!/bin/sh
case "$1" in
    --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
    --list-gpu-arch) echo compute_75; echo compute_80; echo compute_90 ;;
esac
"""


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Stands in for the compiler; knows three architectures."""
    program = tmp_path / "nvcc"
    program.write_text(NVCC)
    program.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(program))
    return str(program)


def test_architectures_are_cmakes(nvcc: str) -> None:
    assert cuda.parse_architectures("80,90a", nvcc) == ["80-real", "90a-real"]
    assert cuda.parse_architectures(" 75, 90, 75", nvcc) == ["75-real", "90-real"]
    assert cuda.nvcc_version(nvcc) == "13.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("70", "has no architecture 70; it has 75, 80, 90"),
        ("", "'' is no architecture; give a list such as 80,86,90a"),
        ("80;90", "'80;90' is no architecture"),
        ("80a", "'80a' is no architecture"),
        ("sm_80", "'sm_80' is no architecture"),
        ("native", "'native' is no architecture"),
    ],
)
def test_a_wrong_architecture_is_refused(text: str, message: str, nvcc: str, tmp_path: Path) -> None:
    with pytest.raises(GgmlExtError, match=f"--arch: .*{re.escape(message)}"):
        build.build(tmp_path / "out", cuda=True, arch=text)
    assert not (tmp_path / "out").exists()


def test_architectures_reach_cmake_and_are_forgotten(nvcc: str, small_sdk: Path, tmp_path: Path) -> None:
    dest = build.build(tmp_path / "out", cuda=True, arch="80,90a")
    assert "architectures <80-real;90a-real>" in (dest / "build.log").read_text()
    build.build(dest, cuda=True)
    assert "architectures <>" in (dest / "build.log").read_text()


def test_arch_without_cuda_is_a_usage_error(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ggml_ext.cli.entry",
        "build",
        "-o",
        str(tmp_path / "out"),
        "--arch",
        "80",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "needs --cuda" in done.stderr


def test_what_cmake_refuses_is_said_in_its_words(small_sdk: Path, tmp_path: Path) -> None:
    with (small_sdk / "CMakeLists.txt").open("a") as file:
        file.write('message(FATAL_ERROR "GGML_CUDA: the toolkit in ${CMAKE_BINARY_DIR} has no cuBLAS")\n')
    with pytest.raises(GgmlExtError, match=r"failed: GGML_CUDA: the toolkit in .* has no cuBLAS; the log is"):
        build.build(tmp_path / "out")


def test_devices_are_those_of_the_driver(programs: Path) -> None:
    assert cuda.devices() == []
    (programs / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA H200, 9.0\necho Some, Other, 12.0\n")
    (programs / "nvidia-smi").chmod(0o755)
    assert cuda.devices() == ["NVIDIA H200 (9.0)", "Some, Other (12.0)"]
    (programs / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert cuda.devices() == []


def test_an_unwritable_folder_is_refused(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GgmlExtError, match=r"cannot write: .*/file/out"):
        build.build(tmp_path / "file" / "out")


def test_build_installs_the_run_time_part_and_passes_its_options(small_sdk: Path, tmp_path: Path) -> None:
    dest = build.build(tmp_path / "out", source=tmp_path, rpc=True)
    assert [path.name for path in (dest / "lib").iterdir()] == ["libsmall.so"]
    assert not (dest / "sdk").exists()
    assert f"CUDA OFF RPC ON source {tmp_path}" in (dest / "build.log").read_text()
    first = (dest / "lib" / "libsmall.so").stat().st_mtime_ns
    build.build(dest)
    assert (dest / "lib" / "libsmall.so").stat().st_mtime_ns == first


def test_a_failing_build_gives_one_line_and_a_log(small_sdk: Path, tmp_path: Path) -> None:
    (small_sdk / "small.c").write_text("int small(void) { return one; }\n")
    with pytest.raises(
        GgmlExtError, match=r"the build failed: .*error: .one. undeclared.*build\.log"
    ) as error:
        build.build(tmp_path / "out")
    assert "\n" not in str(error.value)
    assert "undeclared" in (tmp_path / "out" / "build.log").read_text()


@pytest.mark.parametrize(
    ("output", "percent"),
    [("", 0), ("[1/4] x\n[2/4] y", 50), ("[  7%] Building", 7), ("[2/2] Linking", 100)],
)
def test_progress_of_ninja_and_make(output: str, percent: float) -> None:
    assert build._percent(output) == percent


def test_the_package_holds_each_library_once_and_they_find_each_other(patched_lib_dir: Path) -> None:
    names = {path.name for path in patched_lib_dir.glob("lib*")}
    assert names >= {
        f"lib{name}.so" for name in ("llama", "mtmd", "ggml", "ggml-base", "ggml-cpu", "ggml-rpc")
    }
    assert all(name.endswith(".so") for name in names)
    assert not any(path.is_symlink() for path in patched_lib_dir.iterdir())


def test_tools_start_with_the_packages_libraries(patched_bin_dir: Path) -> None:
    env = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    for name in ("llama-quantize", "llama-perplexity", "llama-bench", "llama-imatrix", "llama-completion"):
        linked = subprocess.run(
            ["ldd", patched_bin_dir / name], env=env, capture_output=True, text=True, check=True
        )
        assert "not found" not in linked.stdout
    for name in ("llama-cli", "llama-server", "ggml-rpc-server"):
        done = subprocess.run([patched_bin_dir / name, "--help"], env=env, capture_output=True, timeout=60)
        assert done.returncode == 0, name


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True)


def test_run_becomes_the_tool() -> None:
    done = run_tool("llama-bench", "--help")
    assert done.returncode == 0
    assert "usage:" in done.stdout + done.stderr


def test_run_names_the_tools_there_are() -> None:
    done = run_tool("llama-nonsense")
    assert done.returncode == 1
    assert "llama-nonsense: no such tool" in done.stderr
    assert "llama-quantize" in done.stderr


def test_the_packaged_sources_are_complete(repo_root: Path, tmp_path: Path) -> None:
    sdk = build.sdk_dir()
    if sdk == repo_root:
        pytest.skip("the package is not installed")
    ours = [
        path
        for path in (repo_root / "ggml_ext").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert len(ours) > 10
    for path in [
        *ours,
        repo_root / "CMakeLists.txt",
        repo_root / "python" / "ggml_ext" / "build" / "upstream.py",
    ]:
        assert (sdk / path.relative_to(repo_root)).read_bytes() == path.read_bytes()
    archive = upstream.fetch()
    script = [sys.executable, "-I", str(sdk / "python" / "ggml_ext" / "build" / "upstream.py"), "prepare"]
    arguments = ["--dest", str(tmp_path / "tree"), "--source", str(archive)]
    subprocess.run([*script, *arguments], check=True)
    assert "GGML_OP_EXT" in (tmp_path / "tree" / "ggml" / "include" / "ggml.h").read_text()


def test_the_converter_is_packaged() -> None:
    converter = paths.converter_dir()
    for name in ("convert_hf_to_gguf.py", "conversion/base.py", "gguf-py/gguf/constants.py", "LICENSE"):
        assert (converter / name).is_file()
