"""Transforms inside llama.cpp: exact where they should be, refused where the file is wrong.

What would break these: a factor read transposed, a matrix of a site left without the transform, a LoRA that
sees transformed activations, a stale tensor shared between graphs, a check that passes a wrong file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import models
import transform_files as files

LOGITS = Path(__file__).with_name("logits.py")


def run(lib_dir: Path, model: Path, out: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(LOGITS), str(lib_dir), str(model), str(out), *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **env},
    )


def logits(lib_dir: Path, model: Path, *options: str, **env: str) -> NDArray[np.float64]:
    out = model.with_suffix(".npy")
    result = run(lib_dir, model, out, *options, **env)
    assert result.returncode == 0, result.stderr[-2000:]
    values: NDArray[np.float32] = np.load(out)
    assert np.isfinite(values).all()
    return values.astype(np.float64)


def divergence(base: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Mean KL divergence of the predictions from base's, in nats."""
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (base, other))
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = models.llama_gguf if request.param == "llama" else models.mixtral_gguf
    folder = tmp_path_factory.mktemp(request.param)
    return files.read(make(tmp_path_factory.getbasetemp())).write(folder / "f32.gguf")


@pytest.mark.parametrize("case", ["f32", "f16", "hadamard"])
def test_transformed_model_computes_the_same(
    case: str, source: Path, patched_lib_dir: Path, tmp_path: Path
) -> None:
    model = files.transform(
        files.read(source),
        dtype=np.float16 if case == "f16" else np.float32,
        use_hadamard=case == "hadamard",
    ).write(tmp_path / "t.gguf")
    base, other = logits(patched_lib_dir, source), logits(patched_lib_dir, model)
    assert np.abs(base - other).max() <= 1e-3 * np.abs(base).max()
    assert divergence(base, other) <= 1e-6
    assert (base != other).any(), "equal bits: the transform did not run"
