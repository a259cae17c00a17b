"""Off means stock; extended files on stock are refused; upstream's own test programs pass; RPC.

What would break these: a hook line that changes upstream's arithmetic, a type id that stock accepts, a type
row that upstream's generic tests reject, a block layout that depends on the machine it runs on.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import models

LOGITS = Path(__file__).parents[1] / "logits.py"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600, check=False)


def logits(lib_dir: Path, model: Path, out: Path, *options: str) -> NDArray[np.float32]:
    result = run(sys.executable, LOGITS, lib_dir, model, out, *options)
    assert result.returncode == 0, result.stderr[-2000:]
    values: NDArray[np.float32] = np.load(out)
    assert np.isfinite(values).all()
    assert np.unique(values).size > 1000, "logits that hardly differ would compare equal for nothing"
    return values


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama_gguf(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def fq4(base: Path, patched_bin_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose blocks, embeddings and head are FQ4, made by the patched llama-quantize."""
    out = tmp_path_factory.mktemp("fq4") / "fq4.gguf"
    result = run(patched_bin_dir / "llama-quantize", "--pure", "--tensor-type", ".*=fq4", base, out, "Q4_K")
    assert result.returncode == 0, result.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def fq4_experts(patched_bin_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fq4") / "experts.gguf"
    base = models.mixtral_gguf(tmp_path_factory.getbasetemp())
    result = run(patched_bin_dir / "llama-quantize", "--pure", "--tensor-type", ".*=fq4", base, out, "Q4_K")
    assert result.returncode == 0, result.stderr[-2000:]
    return out


@pytest.mark.parametrize("flash", [False, True], ids=["no-flash", "flash"])
@pytest.mark.parametrize("ftype", ["F16", "Q8_0", "Q4_0", "Q4_K_M"])
def test_stock_file_gives_the_same_bits(
    ftype: str, flash: bool, base: Path, patched_lib_dir: Path, stock_build: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model.gguf"
    assert run(stock_build / "llama-quantize", base, model, ftype).returncode == 0
    options = ["--flash"] if flash else []
    patched = logits(patched_lib_dir, model, tmp_path / "patched.npy", *options)
    stock = logits(stock_build, model, tmp_path / "stock.npy", *options)
    assert patched.tobytes() == stock.tobytes()


def test_both_builds_quantise_to_the_same_file(
    base: Path, patched_bin_dir: Path, stock_build: Path, tmp_path: Path
) -> None:
    for folder, name in ((patched_bin_dir, "patched"), (stock_build, "stock")):
        assert run(folder / "llama-quantize", base, tmp_path / name, "Q4_K_M").returncode == 0
    assert (tmp_path / "patched").read_bytes() == (tmp_path / "stock").read_bytes()


def test_stock_refuses_fq4(fq4: Path, stock_build: Path, tmp_path: Path) -> None:
    result = run(sys.executable, LOGITS, stock_build, fq4, tmp_path / "out.npy")
    assert result.returncode == 1
    assert "has invalid ggml type 200" in result.stderr
    assert not (tmp_path / "out.npy").exists()


def test_fq4_logits_are_close_to_the_original(
    base: Path, fq4: Path, patched_lib_dir: Path, tmp_path: Path
) -> None:
    original = logits(patched_lib_dir, base, tmp_path / "base.npy").astype(np.float64)
    quantised = logits(patched_lib_dir, fq4, tmp_path / "fq4.npy").astype(np.float64)
    error = ((original - quantised) ** 2).sum() / (original**2).sum()
    assert 1e-4 < error < 0.1, "a wrong nibble gives an error near 2, an unused type one of 0"


def test_experts_in_fq4(
    fq4_experts: Path, patched_lib_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = models.mixtral_gguf(tmp_path_factory.getbasetemp())
    original = logits(patched_lib_dir, base, tmp_path / "base.npy").astype(np.float64)
    quantised = logits(patched_lib_dir, fq4_experts, tmp_path / "fq4.npy").astype(np.float64)
    correlation = np.corrcoef(original.ravel(), quantised.ravel())[0, 1]
    assert correlation > 0.9, "random experts switch easily; a wrong expert offset gives a correlation near 0"


@pytest.mark.parametrize(
    ("op", "pattern"),
    [
        ("MUL_MAT", "fq4"),
        ("MUL_MAT_ID", "fq4"),
        ("GET_ROWS", "fq4"),
        ("MUL_MAT", "fq3"),
        ("MUL_MAT_ID", "fq3"),
        ("GET_ROWS", "fq3"),
        ("EXT_SCALE_ADD", "scale"),
        ("EXT_KRON", "hadamard"),
        ("EXT_ACT_ROUND", "bits"),
    ],
)
def test_backend_ops(op: str, pattern: str, test_bin_dir: Path) -> None:
    result = run(test_bin_dir / "test-backend-ops", "test", "-b", "CPU", "-o", op, "-p", pattern)
    passed = re.search(r"(\d+)/(\d+) tests passed", result.stdout)
    assert result.returncode == 0, result.stdout[-2000:]
    assert passed, result.stdout[-2000:]
    assert passed[1] == passed[2]
    assert int(passed[1]) >= 2


def test_quantize_fns(test_bin_dir: Path) -> None:
    """Upstream bounds the errors of types that it does not know as those of 4 bits; its bound for 3 bits is
    0.0040."""
    result = run(test_bin_dir / "test-quantize-fns", "-v")
    failed = re.findall(r"^ *(\S+) (.*) error: *FAILED \((\S+)\)", result.stdout, re.M)
    assert {name for name, _, _ in failed} <= {"fq3", "fq3_64"}, result.stdout[-2000:]
    assert all(what == "absolute quantization" and float(error) < 0.004 for _, what, error in failed)
    assert result.returncode == bool(failed), result.stdout[-2000:]
    assert "Testing fq4" in result.stdout


def test_quantize_perf_runs(test_bin_dir: Path) -> None:
    program = test_bin_dir / "test-quantize-perf"
    result = run(program, "--type", "fq4", "--op", "vec_dot_q", "-i", "2", "--size", "4096")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "fq4" in result.stdout


def test_rpc_gives_the_same_logits(fq4: Path, patched_lib_dir: Path, rpc_server: str, tmp_path: Path) -> None:
    local = logits(patched_lib_dir, fq4, tmp_path / "local.npy", "--flash")
    remote = logits(patched_lib_dir, fq4, tmp_path / "remote.npy", "--flash", "--rpc", rpc_server)
    np.testing.assert_array_equal(local, remote)
