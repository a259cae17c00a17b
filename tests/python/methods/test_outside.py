"""Rounding of matrices outside the blocks: the head, tied to the embedding or not.

What would break these: a head that is rounded without what was observed, the embedding's use of a tied one
forgotten or its weight wrong, rows of one slab in another's place, errors of something else than the output.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf import source
from ggml_ext.gguf.source import Tensor, open_gguf
from ggml_ext.methods.calibrate.outside import EMBEDDING, round_outside
from ggml_ext.methods.rounding import round_matrix
from ggml_ext.methods.rounding.hessian import Hessian
from ggml_ext.runtime import native

ROWS, N = 300, 64


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, N)).astype(np.float32)


@pytest.fixture(scope="module")
def moments() -> np.ndarray:
    """Of inputs with few strong directions, as a final norm gives."""
    random = np.random.default_rng(1)
    x = random.standard_normal((400, 6)) @ random.standard_normal((6, N)) * 4
    x += random.standard_normal((400, N))
    return x.T @ x / len(x)


def tensor_of(weights: np.ndarray, name: str, folder: Path) -> Tensor:
    path = folder / f"{name}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor(f"{name}.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_gguf(path).tensors[0]


def left(data: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (native.dequantize("q4_0", data, N) - weights).astype(np.float64)


def rounded(tensor: Tensor, moments: np.ndarray, rounding: str = "gptq") -> tuple[np.ndarray, float]:
    packed, error = round_outside(tensor, "q4_0", rounding, Hessian(torch.from_numpy(moments)), threads=1)
    assert packed.dims == (N, ROWS)
    return packed.data, error


def test_a_head_is_rounded_as_a_matrix_of_a_block(
    weights: np.ndarray, moments: np.ndarray, tmp_path: Path
) -> None:
    data, error = rounded(tensor_of(weights, "output", tmp_path), moments)
    hessian = Hessian(torch.from_numpy(moments))
    assert np.array_equal(data, round_matrix(weights, "q4_0", "gptq", hessian, threads=1).data)
    d, w = left(data, weights), weights.astype(np.float64)
    assert error == pytest.approx(np.trace(d @ moments @ d.T) / np.trace(w @ moments @ w.T), rel=1e-4)


def test_a_tied_embedding_serves_both_uses(weights: np.ndarray, moments: np.ndarray, tmp_path: Path) -> None:
    """Each relative to its own size, the embedding's counting EMBEDDING, in sum less than otherwise."""
    w = weights.astype(np.float64)

    def both(data: np.ndarray) -> tuple[float, float]:
        d = left(data, weights)
        head = np.trace(d @ moments @ d.T) / np.trace(w @ moments @ w.T)
        return head, EMBEDDING * (d**2).sum() / (w**2).sum()

    tied = both(rounded(tensor_of(weights, "token_embd", tmp_path), moments)[0])
    head = both(rounded(tensor_of(weights, "output", tmp_path), moments)[0])
    nearest = both(native.quantize("q4_0", weights))
    assert head[0] < tied[0] < nearest[0]
    assert nearest[1] < tied[1] < head[1]
    assert sum(tied) < 0.9 * min(sum(head), sum(nearest))
    # Neither the scale of the inputs nor that of the weights changes what counts.
    scaled = rounded(tensor_of(weights, "token_embd", tmp_path), 1e4 * moments)[0]
    assert both(scaled) == pytest.approx(tied, rel=0.05)


def test_slabs_make_no_difference(
    weights: np.ndarray, moments: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = tensor_of(weights, "token_embd", tmp_path)
    data, error = rounded(tensor, moments)
    monkeypatch.setattr(source, "_SLAB_WEIGHTS", 7 * N)
    again, error_again = rounded(tensor, moments)
    assert np.array_equal(data, again)
    assert error_again == pytest.approx(error, rel=1e-5)


def test_what_cannot_be_rounded(weights: np.ndarray, moments: np.ndarray, tmp_path: Path) -> None:
    tensor = tensor_of(weights, "output", tmp_path)
    with pytest.raises(GgmlExtError, match=r"output\.weight: .*NaN or Inf"):
        rounded(tensor, np.full_like(moments, np.nan))
    data, error = rounded(tensor_of(0 * weights, "token_embd", tmp_path), moments)
    assert error == 0
    assert not left(data, 0 * weights).any()
