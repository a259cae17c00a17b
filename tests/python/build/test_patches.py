"""The patch set: how much of upstream it changes, and that it fits every pinned release."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from ggml_ext.build import upstream

MAX_LINES = 120
MAX_FILES = 26

# Hunks with short context could land in the wrong function of another release: file -> part of a hook line ->
# the function or struct that it belongs to.
HOME = {
    "ggml/src/ggml-backend-reg.cpp": {"// not the current folder": "ggml_backend_load_best("},
    "ggml/src/ggml-blas/ggml-blas.cpp": {
        "GGML_TYPE_FQ4": "ggml_backend_blas_device_supports_op(",
    },
    "ggml/src/ggml-cpu/ggml-cpu.cpp": {
        "ggml_ext_cpu_buffer_type": "ggml_backend_cpu_get_extra_buffer_types(",
    },
    "ggml/src/ggml-cuda/ggml-cuda.cu": {
        "ggml_ext_cuda_free": "ggml_backend_cuda_context::~ggml_backend_cuda_context(",
        "ggml_ext_cuda_owns(tensor)": "ggml_cuda_should_fuse_mul_mat_vec_q(",
        "ggml_ext_cuda_owns(node)": "ggml_cuda_graph_check_compability(",
        "ggml_ext_cuda_compute": "ggml_cuda_compute_forward(",
        "ggml_ext_cuda_fuse": "ggml_cuda_try_fuse(",
        "ggml_ext_cuda_graph_begin": "ggml_cuda_graph_evaluate_and_capture(",
        "ggml_ext_cuda_check_settings": "ggml_backend_cuda_graph_compute(",
        "ggml_ext_cuda_supports": "ggml_backend_cuda_device_supports_op(",
    },
    "common/sampling.cpp": {
        "ggml_ext_common_chain(": "common_sampler_init(",
    },
    "src/llama-adapter.cpp": {"ggml_ext_llama_adapter(": "void llama_adapter_lora_init_impl("},
    "src/llama-context.cpp": {"if (!gf) { return nullptr; }": "llama_context::graph_reserve("},
    "src/llama-graph.cpp": {
        "ggml_mul_mat(ctx0, w, ggml_ext_llama_input": "llm_graph_context::build_lora_mm(",
        "ggml_mul_mat_id(ctx0, w, ggml_ext_llama_input": "llm_graph_context::build_lora_mm_id(",
        "ggml_ext_llama_query": "llm_graph_context::build_attn_mha(",
        "ggml_ext_llama_attention": "llm_graph_context::build_attn_mha(",
        "ggml_ext_kv_attention": "llm_graph_context::build_attn_mha(",
    },
    "src/llama-kv-cache-iswa.cpp": {
        "if (!res) { return false; }": "llama_kv_cache_iswa::seq_rm(",
        "kv_base->ext": "llama_kv_cache_iswa::seq_pos_min(",
    },
    "src/llama-kv-cache.cpp": {
        "ggml_ext_kv_open(": "llama_kv_cache::llama_kv_cache(",
        "ggml_ext_kv_pool(": "llama_kv_cache::llama_kv_cache(",
        "ggml_ext_kv_clear(": "llama_kv_cache::clear(",
        "ggml_ext_kv_remove(": "llama_kv_cache::seq_rm(",
        "ggml_ext_kv_share(": "llama_kv_cache::seq_cp(",
        "ggml_ext_kv_keep(": "llama_kv_cache::seq_keep(",
        "ggml_ext_kv_sizes(": "llama_kv_cache::memory_breakdown(",
        "ggml_ext_kv_fits(": "llama_kv_cache::prepare(",
        "{ return k; }": "llama_kv_cache::get_k(",
        "{ return v; }": "llama_kv_cache::get_v(",
        "ggml_ext_kv_write(": "llama_kv_cache::state_write_data(",
        "ggml_ext_kv_read(": "llama_kv_cache::state_read_data(",
        "ggml_ext_kv_is_paged(ext.get())) { return; }": "llama_kv_cache::state_clear(",
        "ggml_ext_kv_pos_min(": "llama_kv_cache::seq_pos_min(",
        "ggml_ext_kv_spent spent": "llama_kv_cache::find_slot(",
        "spent(cells, idx)": "llama_kv_cache::find_slot(",
        "ggml_ext_kv_begin(": "llama_kv_cache_context::apply(",
        "ggml_ext_llama_cache(": "llama_kv_cache::llama_kv_cache(",
        "ggml_ext_llama_fixes_k": "llama_kv_cache::get_can_shift(",
        "ggml_ext_llama_store_k": "llama_kv_cache::cpy_k(",
        "ggml_ext_llama_store_v": "llama_kv_cache::cpy_v(",
        "ggml_ext_llama_write_state": "llama_kv_cache::state_write(",
        "ggml_ext_llama_read_state": "llama_kv_cache::state_read",
    },
    "src/llama-model.cpp": {
        "ggml_ext_kv_scope kv": "llama_model::create_memory(",
        "ggml_ext_llama_load": "llama_model_base::load_tensors(",
        "ggml_ext_graph ext": "llama_model::build_graph(",
        "ext.check(": "llama_model::build_graph(",
    },
    "src/llama-model.h": {"ggml_ext; //": "struct llama_model {"},
    "src/llama-sampler.cpp": {
        "ggml_ext_sampler_alone(": "llama_token llama_sampler_sample(",
        "ggml_ext_sampler_seed(": "uint32_t llama_sampler_get_seed(",
    },
    "src/llama-model-saver.cpp": {"!model->ggml_ext": "llama_model_saver::add_tensors_from_model("},
    "tools/server/server-context.cpp": {
        "ggml_ext_server_slot(": "struct server_slot {",
        "ggml_ext_kv_note_usage(": "struct server_context_impl {",
        "ggml_ext_kv_noted_usage(": "server_routes::init_routes(",
    },
}

# Of patches that are not for all releases.
LATER = {
    "ggml_ext_kv_is_paged(ext.get())) { return; }",
    "ggml_ext_kv_note_usage(",
    "ggml_ext_kv_noted_usage(",
}


@pytest.fixture(scope="module")
def patches(repo_root: Path) -> Path:
    return repo_root / "ggml_ext" / "patches"


def changed_lines(patch: Path) -> dict[str, int]:
    """Lines added and removed per upstream file; one that is replaced counts twice."""
    counts: dict[str, int] = {}
    name = ""
    for line in patch.read_text().splitlines():
        if line.startswith("+++ "):
            name = line.removeprefix("+++ b/").split("\t")[0]
            counts.setdefault(name, 0)
        elif line.startswith(("+", "-")) and not line.startswith("--- "):
            counts[name] += 1
    return counts


def test_every_patch_is_in_the_series(patches: Path) -> None:
    assert [patch.name for patch in upstream.patch_files(patches)] == sorted(
        path.name for path in patches.glob("*.patch")
    )


def test_patches_stay_small(patches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    total: dict[str, int] = {}
    for patch in upstream.patch_files(patches):
        for name, count in changed_lines(patch).items():
            assert count > 0, f"{patch.name} names {name} without changing it"
            total[name] = total.get(name, 0) + count
    lines, files = sum(total.values()), len(total)
    with capsys.disabled():
        releases = ", ".join(upstream.PINNED)
        print(f"\npatches: {lines} changed upstream lines (at most {MAX_LINES}) in {files} files", end=" ")
        print(f"(at most {MAX_FILES}), for llama-cpp-python {releases}")
    assert lines <= MAX_LINES
    assert files <= MAX_FILES


def home_of(text: str, part: str) -> str:
    """The line that begins the function or struct around the only line with ``part``."""
    lines = text.splitlines()
    (place,) = [number for number, line in enumerate(lines) if part in line]
    # Not the last line of a list of parameters that begins in the first column.
    begins = (line for line in reversed(lines[:place]) if re.match(r"\w.*[({]$", line))
    return next(line for line in begins if not re.match(r"[^(]*\)", line))


@pytest.mark.parametrize("version", upstream.PINNED)
def test_patches_apply_to_every_pinned_release(version: str, patches: Path, tmp_path: Path) -> None:
    tree = tmp_path / "llama.cpp"
    upstream.prepare(tree, patches=patches, version=version)
    assert not [*tree.rglob("*.rej"), *tree.rglob("*.orig")]
    for patch in upstream.patch_files(patches):
        if not upstream.applies(tree, patch):
            assert version != upstream.DEFAULT_VERSION, f"{patch.name} is for releases that are gone"
            continue
        patched = "".join((tree / name).read_text() for name in upstream.patched_names(patch)).splitlines()
        added = [line[1:] for line in patch.read_text().splitlines() if line.startswith("+")]
        assert set(added) - set(patched) <= {line for line in added if line.startswith("++ b/")}
    for name, hooks in HOME.items():
        text = (tree / name).read_text()
        here = {part: home for part, home in hooks.items() if part not in LATER or part in text}
        assert {part: home in home_of(text, part) for part, home in here.items()} == dict.fromkeys(here, True)


# Files that are compiled as one, and parsed as often as headers make it necessary.
UNITS = {
    "kv": ["ggml_ext/kv/*.cpp"],
    "transform": ["ggml_ext/transform/[!m]*.cpp", "ggml_ext/observe/moments.cpp"],
    "walk": ["ggml_ext/observe/walk.cpp"],
    "upstream": [
        f"src/llama-{name}.cpp" for name in ("kv-cache", "kv-cache-iswa", "graph", "model", "adapter")
    ],
}


@pytest.mark.parametrize("version", sorted(upstream.PINNED.keys() - {upstream.DEFAULT_VERSION}))
def test_sources_fit_every_pinned_release(
    version: str, patches: Path, repo_root: Path, tmp_path: Path
) -> None:
    """llama.cpp's inner classes change from one release to the next: what we use of them is in all."""
    tree = tmp_path / "llama.cpp"
    upstream.prepare(tree, patches=patches, version=version)
    folders = [tree / "src", tree / "include", tree / "ggml/include", tree / "ggml/src"]
    folders += [repo_root / "ggml_ext", repo_root / "ggml_ext/include", repo_root / "ggml_ext/hooks"]
    command = [
        os.environ.get("CXX", "c++"),
        "-std=c++17",
        "-fsyntax-only",
        "-w",
        *(f"-I{f}" for f in folders),
    ]
    for name, patterns in UNITS.items():
        root = tree if name == "upstream" else repo_root
        files = sorted(path for pattern in patterns for path in root.glob(pattern))
        assert len(files) >= len(patterns)
        unit = tmp_path / f"{name}.cpp"
        unit.write_text("".join(f'#include "{path}"\n' for path in files))
        done = subprocess.run([*command, unit], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:2000]
