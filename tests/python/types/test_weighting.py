"""Importances that are zero or tiny, weights that a type would clip: never a wrong file without a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import tiny_bpe
from ggml_ext.convert import convert
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf import imatrix
from ggml_ext.gguf.source import open_gguf, read_bytes, reading
from ggml_ext.runtime import native
from ggml_ext.runtime.weighting import FLOOR, n_raised, usable

TYPES = (
    "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "iq4_xs", "fq4",
)  # fmt: skip
ROWS = np.random.default_rng(2).standard_normal((4, 512)).astype(np.float32) / 16


def error(type_name: str, importances: NDArray[np.float32], columns: slice = slice(None)) -> float:
    """Relative error of ROWS, or of some of their columns."""
    decoded = native.dequantize(type_name, native.quantize(type_name, ROWS, importances, threads=1), 512)
    return float(np.linalg.norm((decoded - ROWS)[:, columns]) / np.linalg.norm(ROWS[:, columns]))


@pytest.mark.parametrize("type_name", TYPES)
def test_zero_and_tiny_importances_round_as_equal_ones(type_name: str) -> None:
    equal = error(type_name, np.ones(512, np.float32))
    for value in (0.0, 1e-44, 1e-38, 1e-20, 1e38):
        assert error(type_name, np.full(512, value, np.float32)) <= 1.01 * equal


@pytest.mark.parametrize("width", [16, 31, 64, 256])
@pytest.mark.parametrize("type_name", TYPES)
def test_columns_without_importance_are_still_rounded(type_name: str, width: int) -> None:
    """They may lose what the others gain, but not everything."""
    equal = error(type_name, np.ones(512, np.float32))
    importances = np.random.default_rng(3).uniform(0.5, 2, 512).astype(np.float32)
    importances[:width] = 0
    assert error(type_name, importances, slice(0, width)) < min(6 * equal + 0.02, 0.98)
    assert error(type_name, importances, slice(256, None)) < 1.2 * equal


@pytest.mark.parametrize("type_name", TYPES)
def test_a_power_of_two_changes_no_bit(type_name: str) -> None:
    importances = np.random.default_rng(4).uniform(0.5, 2, 512).astype(np.float32)
    wanted = native.quantize(type_name, ROWS, importances, threads=1)
    for exponent in (-60, 70):
        scaled = np.ldexp(importances, exponent)
        np.testing.assert_array_equal(native.quantize(type_name, ROWS, scaled, threads=1), wanted)


def test_usual_importances_are_left_alone() -> None:
    importances = np.random.default_rng(5).uniform(1e-4, 1e4, (3, 512)).astype(np.float32)
    assert usable(importances) is importances
    assert n_raised(importances) == 0


def test_raised_ones_are_counted() -> None:
    importances = np.ones((2, 512), np.float32)
    importances[0, :256] = 0
    importances[1, 3] = 0
    importances[1, 300:302] = 1e-9
    assert n_raised(importances) == 256 + 1 + 2
    raised = usable(importances)
    np.testing.assert_array_equal(raised[0], np.ones(512))
    assert (raised[1, [3, 300]] == FLOOR).all()
    assert usable(raised) is raised


def stored(path: Path, name: str) -> NDArray[np.uint8]:
    (tensor,) = (tensor for tensor in open_gguf(path).tensors if tensor.name == name)
    with reading(tensor) as file:
        return read_bytes(file, tensor, 0, tensor.n_rows)


def tensor_error(path: Path, name: str) -> float:
    (tensor,) = (tensor for tensor in open_gguf(path).tensors if tensor.name == name)
    decoded = native.dequantize(tensor.type_name, stored(path, name), tensor.row_length)
    weights = tiny_bpe.tensors()[name]
    return float(np.linalg.norm(decoded - weights) / np.linalg.norm(weights))


@pytest.mark.parametrize(("columns", "tiny"), [(slice(None), 0.0), (slice(0, 64), 0.0), (slice(None), 1e-40)])
@pytest.mark.parametrize("type_name", ["q4_k", "q4_k_m", "q4_0", "q5_0", "iq4_xs", "q3_k", "fq4"])
def test_conversion_says_so_and_keeps_the_weights(
    type_name: str, columns: slice, tiny: float, tmp_path: Path
) -> None:
    """Made by us (q4_k, q3_k, fq4) and by llama-quantize (the others)."""
    name = "blk.0.attn_q.weight"
    model = tiny_bpe.write(tmp_path / "m.gguf")
    matrix = tiny_bpe.write_imatrix(tmp_path / "im.gguf", [(name, columns)], tiny)
    lines: list[str] = []
    out = tmp_path / "o.gguf"
    convert(model, out, type_name=type_name, imatrix=matrix, threads=1, warn=lines.append)
    assert tensor_error(out, name) < 0.25
    assert b"im.gguf" in out.read_bytes()
    n_zero = len(range(256)[columns]) if tiny == 0 else 0
    said = [line for line in lines if "importances are 0 or next to it" in line]
    assert len(said) == (n_zero > 0)
    if said:
        assert f"{n_zero} importances" in said[0]
        assert name in said[0]


def test_only_what_is_too_small_changes(tmp_path: Path) -> None:
    """llama-quantize gets the other tensors' importances as they were: the same bytes."""
    model = tiny_bpe.write(tmp_path / "m.gguf")
    for name, zero in (("a", []), ("b", [("blk.0.attn_q.weight", slice(0, 64))])):
        matrix = tiny_bpe.write_imatrix(tmp_path / f"{name}.gguf", zero)
        convert(model, tmp_path / f"{name}-q.gguf", type_name="q4_k_m", imatrix=matrix, threads=1)
    for tensor in ("blk.0.attn_k.weight", "blk.0.ffn_down.weight"):
        np.testing.assert_array_equal(
            stored(tmp_path / "a-q.gguf", tensor), stored(tmp_path / "b-q.gguf", tensor)
        )
    assert (
        imatrix.load(tmp_path / "b.gguf").entries.keys() == imatrix.load(tmp_path / "a.gguf").entries.keys()
    )


def large(value: float) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        weights = tiny_bpe.tensors()
        weights["blk.0.attn_q.weight"][7, 9] = value
        return tiny_bpe.write(path, weights=weights)

    return write


def test_nvfp4_refuses_what_it_would_clip(tmp_path: Path) -> None:
    rows = ROWS.copy()
    rows[2, 5] = -6 * 448
    native.quantize("nvfp4", rows, threads=1)
    for value in (2690.0, -3000.0):
        rows[2, 5] = value
        with pytest.raises(GgmlExtError, match="values too large for the type in row 2"):
            native.quantize("NVFP4", rows, threads=1)
    model = large(3000.0)(tmp_path / "m.gguf")
    for request in ({"type_name": "nvfp4"}, {"type_name": "q4_k_m", "type_for": [("attn_q", "nvfp4")]}):
        with pytest.raises(GgmlExtError, match=r"blk\.0\.attn_q\.weight does not fit type nvfp4 .*row 7"):
            convert(model, tmp_path / "o.gguf", threads=1, **request)  # type: ignore[arg-type]
        assert not (tmp_path / "o.gguf").exists()


@pytest.mark.parametrize("type_name", [*TYPES, "mxfp4", "nvfp4", "f16", "bf16"])
def test_every_type_refuses_nan(type_name: str) -> None:
    rows = ROWS.copy()
    for value in (np.nan, np.inf):
        rows[3, 1] = value
        with pytest.raises(GgmlExtError, match="NaN or Inf in row 3"):
            native.quantize(type_name, rows, np.ones(512, np.float32), threads=1)
