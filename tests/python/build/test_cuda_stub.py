"""HIP and MUSA builds compile upstream's ggml-cuda.cu with our hook lines in it: they find a header of that
name that has none of our features. Tested without their toolkits: targets of their names, and the hooks."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

# What upstream's llama.cpp gives inject.cmake, in small: targets, and the folder that they are in.
PROJECT = """
cmake_minimum_required(VERSION 3.21)
project(small C CXX)
set(CMAKE_CXX_STANDARD 17)
set(GGML_EXT_LLAMA_DIR "${CMAKE_CURRENT_SOURCE_DIR}/llama.cpp")
add_subdirectory(llama.cpp/ggml/src)
include("@ROOT@/ggml_ext/cmake/inject.cmake")
"""
TARGETS = """
include_directories("@HEADERS@")
add_library(ggml-base OBJECT EXCLUDE_FROM_ALL small.c)
add_library(ggml-cpu OBJECT EXCLUDE_FROM_ALL small.c)
add_library(ggml-hip OBJECT hooks.cpp)
add_library(ggml-musa OBJECT hooks.cpp)
"""
# The hooks as upstream's functions call them, with upstream's types.
CALLS = """
#include "ext-cuda.h"

struct ggml_backend_cuda_context {};

bool supports(const ggml_tensor * op);
bool supports(const ggml_tensor * op) {
    if (auto known = ggml_ext_cuda_supports(0, op)) { return known == GGML_EXT_CUDA_YES; }
    return true;
}

int run(ggml_backend_cuda_context & ctx, ggml_cgraph * graph, ggml_tensor * dst);
int run(ggml_backend_cuda_context & ctx, ggml_cgraph * graph, ggml_tensor * dst) {
    ggml_ext_cuda_check_settings(ctx);
    ggml_ext_cuda_graph_begin(ctx);
    if (int following = ggml_ext_cuda_fuse(ctx, graph, 0)) { return following; }
    if (ggml_ext_cuda_owns(dst)) { return 1; }
    if (ggml_ext_cuda_compute(ctx, dst)) { return 2; }
    ggml_ext_cuda_free(ctx);
    return 0;
}
"""
MAIN = """
#include <cstdio>

int main() {
    ggml_backend_cuda_context ctx;
    ggml_tensor f32 = {}, fq4 = {}, ext = {}, product = {};
    fq4.type = GGML_TYPE_FQ4;
    ext.op = GGML_OP_EXT;
    product.op = GGML_OP_MUL_MAT;
    product.src[0] = &fq4;
    product.src[1] = &f32;
    std::printf("%d %d %d %d %d\\n", supports(&f32), supports(&fq4), supports(&ext), supports(&product),
                run(ctx, nullptr, &product));
}
"""
HOOK = re.compile(r"\bggml_ext_cuda_\w+(?=\()")


@pytest.fixture(scope="module")
def headers(repo_root: Path) -> Path:
    """Folder of the patched ggml.h."""
    folder = repo_root / "build" / "patched" / "llama.cpp" / "ggml" / "include"
    assert (folder / "ggml.h").is_file(), "run scripts/setup --tests"
    return folder


def test_every_hook_is_called_here(repo_root: Path) -> None:
    patch = (repo_root / "ggml_ext" / "patches" / "0009-cuda.patch").read_text()
    added = "".join(line for line in patch.splitlines(keepends=True) if line.startswith("+"))
    assert set(HOOK.findall(added)) == set(HOOK.findall(CALLS))


def test_hip_and_musa_targets_compile_the_hooks(repo_root: Path, headers: Path, tmp_path: Path) -> None:
    if shutil.which("ninja") is None or shutil.which("cmake") is None:
        pytest.fail("cmake and ninja are needed; run scripts/setup", pytrace=False)
    folder = tmp_path / "llama.cpp" / "ggml" / "src"
    folder.mkdir(parents=True)
    (tmp_path / "CMakeLists.txt").write_text(PROJECT.replace("@ROOT@", str(repo_root)))
    (folder / "CMakeLists.txt").write_text(TARGETS.replace("@HEADERS@", str(headers)))
    (folder / "small.c").write_text("int small;\n")
    (folder / "hooks.cpp").write_text(CALLS)
    build = tmp_path / "build"
    for command in (
        ["cmake", "-S", tmp_path, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Debug"],
        ["cmake", "--build", build, "--target", "ggml-hip", "ggml-musa"],
    ):
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def test_the_stub_leaves_our_ops_to_others(repo_root: Path, headers: Path, tmp_path: Path) -> None:
    """Upstream's DUP and CONT would take a tensor of any type."""
    source, program = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(CALLS + MAIN)
    include = [f"-I{repo_root / 'cuda' / 'stub'}", f"-I{headers}"]
    subprocess.run(
        ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", *include, source, "-o", program], check=True
    )
    result = subprocess.run([program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["1", "0", "0", "0", "0"]
