"""FQ4, FQ4_64, FQ3, FQ3_64: numpy against C, bit for bit; dot products; the accuracy that formats promise.

What would break these: a float operation in another order or with contraction, another rounding to fp16, a
nibble in the wrong place, a vector path that reads across a block, a table or an encoder that got worse.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ggml_ext.gguf import fq3, fq3_64, fq4, fq4_64
from ggml_ext.runtime import native
from ggml_ext.runtime.weighting import usable

Floats = NDArray[np.float32]

TYPES = {"fq4": fq4, "fq4_64": fq4_64, "fq3": fq3, "fq3_64": fq3_64}
LARGEST = {name: np.float32(2e4 if name.endswith("_64") else 6e6) for name in TYPES}
HALF_SCALES = {"fq4": fq4, "fq3": fq3}  # blocks of 256 weights

EDGE_VALUES = (0.0, -0.0, 1e-45, 1e-38, 6e-8, 3e-6, 1.0, -1.0, 5e4, 65504.0, 5.9e6, -6e6)


def draw_rows(kind: str, random: np.random.Generator, n: int, k: int) -> Floats:
    """[n, k] of one kind of data."""
    if kind == "constant":
        rows = np.full((n, k), random.choice(EDGE_VALUES))
    elif kind == "edges":
        rows = random.choice(EDGE_VALUES, (n, k))
    elif kind == "outlier":
        rows = random.standard_normal((n, k))
        rows[:, random.integers(k)] *= 1000
    elif kind == "sparse":
        rows = random.standard_normal((n, k)) * (random.random((n, k)) < 0.05)
    elif kind == "integers":  # ties between table values
        rows = random.integers(-127, 128, (n, k)).astype(np.float64)
    else:
        rows = random.standard_t(3, (n, k)) if kind == "student" else random.standard_normal((n, k))
    return rows.astype(np.float32)


KINDS = st.sampled_from(["gaussian", "student", "constant", "edges", "outlier", "sparse", "integers"])
SCALES = st.sampled_from([1.0, 0.02, 1e-7, 3e-6, 1e-40, 2000.0])
IMPORTANCES = st.sampled_from(["none", "uniform", "zeros", "half zeros", "spread", "tiny"])


def draw_importances(kind: str, random: np.random.Generator, k: int) -> Floats | None:
    values = {
        "none": None,
        "uniform": random.random(k),
        "zeros": np.zeros(k),
        "half zeros": random.random(k) * (random.random(k) < 0.5),
        "spread": np.exp(8 * random.standard_normal(k)),
        "tiny": random.random(k) * 1e-38,
    }[kind]
    return None if values is None else values.astype(np.float32)


def rows_for_test(
    seed: int, n: int, n_blocks: int, kind: str, scale: float, importance: str
) -> tuple[Floats, Floats | None]:
    random = np.random.default_rng(seed)
    rows = draw_rows(kind, random, n, 256 * n_blocks) * np.float32(scale)
    return np.clip(rows, -6e6, 6e6), draw_importances(importance, random, 256 * n_blocks)


ROWS = st.builds(
    rows_for_test,
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 3),
    n_blocks=st.integers(1, 4),
    kind=KINDS,
    scale=SCALES,
    importance=IMPORTANCES,
)


@settings(max_examples=150, deadline=None)
@given(case=ROWS)
def test_encoder_and_decoder_are_bit_for_bit_c(case: tuple[Floats, Floats | None]) -> None:
    for name, module in TYPES.items():
        rows, importances = np.clip(case[0], -LARGEST[name], LARGEST[name]), case[1]
        data = native.quantize(name, rows, importances, threads=1)
        used = None if importances is None else usable(importances)
        assert module.quantize(rows, used).tobytes() == data.tobytes()
        assert module.dequantize(data).tobytes() == native.dequantize(name, data, rows.shape[1]).tobytes()


@settings(max_examples=50, deadline=None)
@given(data=st.binary(min_size=138, max_size=138))
def test_any_bytes_decode_as_in_c(data: bytes) -> None:
    for name, module in TYPES.items():
        block = np.frombuffer(data, np.uint8, module.BLOCK_BYTES)[None]
        expected = native.dequantize(name, block, module.BLOCK)
        np.testing.assert_array_equal(module.dequantize(block), expected)


def test_layout_is_the_documented_one() -> None:
    """One weight at a time, from the text of the specification."""
    random = np.random.default_rng(0)
    block = random.integers(0, 256, (1, 138), np.uint8)
    block[0, :2] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    decoded = native.dequantize("fq4", block, 256)[0]
    indices, codes = block[0, 2:10], block[0, 10:]
    for i in range(256):
        b, h, j = i // 16, i // 128, i % 64
        row = indices[b // 2] >> 4 if b % 2 else indices[b // 2] & 15
        code = codes[64 * h + j] >> 4 if i % 128 >= 64 else codes[64 * h + j] & 15
        assert decoded[i] == 0.5 * fq4.TABLE[row, code]


@pytest.mark.parametrize(("name", "n"), [("fq3", 256), ("fq3_64", 64)])
def test_planes_are_the_documented_ones(name: str, n: int) -> None:
    """One weight at a time, from the text of the specification."""
    random = np.random.default_rng(0)
    header = 2 if n == 256 else 1
    block = random.integers(0, 256, (1, TYPES[name].BLOCK_BYTES), np.uint8)
    block[0, :header] = [0, 0x38] if n == 256 else [184]  # 0.5
    decoded = native.dequantize(name, block, n)[0]
    indices, low, high = np.split(block[0, header:], [n // 32, n // 32 + n // 4])
    for i in range(n):
        row = indices[i // 32] >> 4 if i // 16 % 2 else indices[i // 32] & 15
        two = low[i % (n // 4)] >> 2 * (i // (n // 4)) & 3
        code = two | (high[i % (n // 8)] >> i // (n // 8) & 1) << 2
        assert decoded[i] == 0.5 * fq3.TABLE[row, code]


@pytest.mark.parametrize("table", [fq4.TABLE, fq3.TABLE])
def test_table_is_symmetric_ascending_and_free_of_minus_128(table: NDArray[np.int8]) -> None:
    assert (table[8:] == -table[:8, ::-1]).all()
    assert (np.diff(table.astype(int), axis=1) > 0).all()
    assert table.min() >= -127


def test_study_measures_the_frozen_table(repo_root: Path) -> None:
    study = runpy.run_path(str(repo_root / "scripts" / "fq4_study.py"))
    assert (study["SHAPES"] == fq4.TABLE[:8]).all()
    assert (study["TABLES"]["8 codes"] == fq3.TABLE).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 7e6])
def test_numpy_marks_what_cannot_be_encoded(bad: float) -> None:
    rows = np.ones((1, 512), np.float32)
    rows[0, 300] = bad
    for module in TYPES.values():
        finite = np.isfinite(module.dequantize(module.quantize(rows)))[0].reshape(-1, module.BLOCK)
        bad_block = 300 // module.BLOCK
        assert finite.all(1).tolist() == [i != bad_block for i in range(len(finite))]
        assert not finite[bad_block].any()


@pytest.mark.parametrize("name", HALF_SCALES)
@pytest.mark.parametrize("path", native.cpu_paths())
@pytest.mark.parametrize("n_blocks", range(1, 18))
def test_dot_product_is_exact_in_its_integer_part(name: str, path: str, n_blocks: int) -> None:
    """With scales of one every partial sum is an integer below 2^24, so floats must be exact as well."""
    module = HALF_SCALES[name]
    random = np.random.default_rng(n_blocks)
    k = 256 * n_blocks
    row = random.integers(0, 256, (n_blocks, module.BLOCK_BYTES), np.uint8)
    row[:, :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    x = random.integers(-127, 128, k).astype(np.float32)
    x[::256] = -127  # makes Q8_K's scale one
    expected = (module.dequantize(row.reshape(1, -1))[0].astype(np.int64) * x.astype(np.int64)).sum()
    for shift in range(min(n_blocks, 4) + 1):
        memory = np.zeros(row.nbytes + 64, np.uint8)
        memory[shift : shift + row.nbytes] = row.ravel()
        assert native.dot(name, memory[shift : shift + row.nbytes], x, path) == expected


@pytest.mark.parametrize("name", HALF_SCALES)
@pytest.mark.parametrize("path", native.cpu_paths())
@pytest.mark.parametrize("sign", [-1, 1])
def test_dot_product_does_not_overflow(name: str, path: str, sign: int) -> None:
    """The largest sum a block can have: every weight 127 (row 7, the last code), every activation 127."""
    row = np.full((1, HALF_SCALES[name].BLOCK_BYTES), 0xFF, np.uint8)
    row[0, :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    row[0, 2:10] = 0x77
    x = np.full(256, 127 * sign, np.float32)
    assert native.dot(name, row[0], x, path) == sign * 256 * 127 * 127


@settings(max_examples=60, deadline=None)
@given(case=ROWS, seed=st.integers(0, 2**32 - 1))
def test_generic_dot_product_is_bit_for_bit_numpy(case: tuple[Floats, Floats | None], seed: int) -> None:
    rows, importances = case
    x = np.random.default_rng(seed).standard_normal(rows.shape[1], np.float32)
    for name, module in HALF_SCALES.items():
        row = module.quantize(rows[:1], importances)[0]
        exact = fq4.dot_q8_k(row, x, module.LAYOUT)
        assert np.float32(native.dot(name, row, x, "generic")).tobytes() == exact.tobytes()
        # The other paths may only add the floats in another order; the VNNI ones with 128 added to an int8.
        d = float(row[:2].view(np.float16)[0])
        rounding = 1e-6 * float((np.abs(module.dequantize(row[None])[0]) + 128 * d) @ np.abs(x))
        for path in native.cpu_paths():
            assert native.dot(name, row, x, path) == pytest.approx(exact, rel=0, abs=rounding)


def relative_error(type_name: str, rows: Floats, importances: Floats | None = None) -> float:
    decoded = native.dequantize(type_name, native.quantize(type_name, rows, importances), rows.shape[1])
    weight = 1.0 if importances is None else importances.astype(np.float64)
    square = (rows.astype(np.float64) - decoded) ** 2
    return float((weight * square).sum() / (weight * rows.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize(("name", "other", "bits"), [("fq4", "q4_K", 4.3125), ("fq3", "q3_K", 3.3125)])
@pytest.mark.parametrize("kind", ["gaussian", "student-t(5)"])
def test_error_is_no_larger_than_that_of_the_k_quant(kind: str, name: str, other: str, bits: float) -> None:
    random = np.random.default_rng(2024)
    shape = (256, 2048)
    rows = random.standard_normal(shape) if kind == "gaussian" else random.standard_t(5, shape)
    rows = rows.astype(np.float32)
    importances = random.gamma(0.5, 1, shape[1]).astype(np.float32)
    ours, theirs = relative_error(name, rows), relative_error(other, rows)
    ours_weighted, theirs_weighted = (
        relative_error(type_name, rows, importances) for type_name in (name, other)
    )
    print(f"\n{kind}: {name} {ours:.6f}, {other} {theirs:.6f}; {ours_weighted:.6f}, {theirs_weighted:.6f}")
    assert ours <= theirs
    assert ours_weighted <= theirs_weighted
    assert 8 * native.row_size(name, 2048) / 2048 <= bits
