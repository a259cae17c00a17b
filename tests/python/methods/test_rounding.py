"""Rounding: level grids, GPTQ, coordinate descent. The oracles are native.dequantize and dense numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.registry import ROUNDINGS
from ggml_ext.gguf import fq4, fq4_blocks
from ggml_ext.methods.rounding import gptq, grid, relative_error, round_matrix
from ggml_ext.methods.rounding.hessian import Hessian
from ggml_ext.methods.rounding.kernels import descend, gptq_grid, gptq_joint
from ggml_ext.runtime import native

JOINT = (("fq4", 256), ("fq4_64", 64))  # scale and rows are chosen with the codes; weights per block
TYPES = (
    "fq4",
    "fq4_64",
    "fq3",
    "fq3_64",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "iq4_nl",
    "iq4_xs",
    "q4_k",
    "q5_k",
    "q6_k",
    "nvfp4",
    "mxfp4",
)


def _weights(rows: int, n: int, seed: int = 0) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    return (random.standard_t(5, (rows, n)) * 0.02).astype(np.float32)


def _hessian(n: int, seed: int = 0) -> torch.Tensor:
    """Second moments of correlated inputs with channels of very different size."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((3 * n, n)) @ (np.eye(n) + 0.3 * random.standard_normal((n, n)) / np.sqrt(n))
    x *= np.exp(random.standard_normal(n))
    return torch.from_numpy(x.T @ x / len(x))


def _factor(hessian: torch.Tensor, damping: float = 0.01) -> NDArray[np.float64]:
    h = hessian.numpy() + damping * hessian.diagonal().mean().item() * np.eye(len(hessian))
    return np.linalg.cholesky(np.linalg.inv(h)).T


def test_types_that_have_a_grid() -> None:
    assert set(grid.names()) == set(TYPES)
    assert all(grid.supports(name) for name in TYPES)
    assert not grid.supports("iq2_xxs")


@pytest.mark.parametrize("type_name", TYPES)
def test_grid_decodes_what_the_library_decodes(type_name: str) -> None:
    """Breaks with a wrong byte, bit, group or book of any layout."""
    w = _weights(7, 512)
    w[3] = 0
    w[4, :100] *= 50
    data = native.quantize(type_name, w)
    levels = grid.decode(type_name, data)
    assert np.array_equal(levels.values(), native.dequantize(type_name, data, 512))
    assert np.array_equal(
        grid.decode(type_name, grid.encode(type_name, data, levels.levels)).levels, levels.levels
    )
    assert (np.diff(levels.books, axis=1) > 0).all()


@pytest.mark.parametrize("type_name", TYPES)
def test_grid_encodes_any_levels(type_name: str) -> None:
    """Random levels survive: no code is lost or written to another weight's place."""
    data = native.quantize(type_name, _weights(5, 512))
    before = grid.decode(type_name, data)
    random = np.random.default_rng(1).integers(0, before.books.shape[1], before.levels.shape).astype(np.uint8)
    packed = grid.encode(type_name, data, random)
    assert np.array_equal(grid.decode(type_name, packed).levels, random)
    assert np.array_equal(before.with_levels(random).values(), native.dequantize(type_name, packed, 512))


@pytest.mark.parametrize("type_name", TYPES)
def test_rescale_multiplies_weights(type_name: str) -> None:
    data = native.quantize(type_name, _weights(3, 256))
    values = native.dequantize(type_name, data, 256)
    doubled = native.dequantize(type_name, grid.rescale(type_name, data, 2.0), 256)
    scales_are_bytes = type_name in ("mxfp4", "nvfp4")
    assert np.array_equal(doubled, values if scales_are_bytes else 2 * values)


def _dense_gptq(
    w: NDArray[np.float64], values: NDArray[np.float64], u: NDArray[np.float64]
) -> NDArray[np.int64]:
    """GPTQ as in the paper, with the inverse Hessian's factor, one row and one column at a time.

    values [rows, n, n_levels]: what each weight may become.
    """
    levels = np.zeros(w.shape, np.int64)
    for r, row in enumerate(w.copy()):
        for j in range(len(row)):
            levels[r, j] = np.abs(values[r, j] - row[j]).argmin()
            row[j:] -= (row[j] - values[r, j, levels[r, j]]) / u[j, j] * u[j, j:]
    return levels


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 5),
    group=st.sampled_from([1, 3, 16]),
    seed=st.integers(0, 999),
)
def test_gptq_on_a_grid_equals_a_dense_implementation(rows: int, groups: int, group: int, seed: int) -> None:
    """Float32 against float64: levels may differ only where two are equally near."""
    n, random = groups * group, np.random.default_rng(seed)
    books = np.sort(random.standard_normal((3, 7)), 1).astype(np.float32)
    scale = random.uniform(-2, 2, (rows, groups)).astype(np.float32)
    offset = random.standard_normal((rows, groups)).astype(np.float32)
    book = random.integers(0, 3, (rows, groups)).astype(np.uint8)
    levels = grid.Grid(group, books, scale, offset, book, np.zeros((rows, n), np.uint8))
    w, u = random.standard_normal((rows, n)).astype(np.float32), _factor(_hessian(n, seed))
    values = scale[..., None].astype(float) * books[book] + offset[..., None]
    expected = _dense_gptq(w.astype(float), np.repeat(values, group, 1), u)
    found, err, cost = gptq_grid(levels, w, u.astype(np.float32), 1)
    equal = (found == expected).all(1)
    assert equal.mean() > 0.8 or rows < 3
    difference = w - levels.with_levels(found).values()
    # e U = w - q: the errors passed on are those of the chosen levels, whatever they are.
    assert np.allclose(err @ u, difference, atol=1e-3 * np.abs(difference).max() + 1e-5)
    assert np.allclose(cost, np.square(err).sum(1), rtol=1e-4)


@pytest.mark.parametrize(("type_name", "n"), JOINT)
def test_joint_gptq_packs_what_it_measured(type_name: str, n: int) -> None:
    """The blocks decode to weights whose errors are the ones reported; the search for scales helps."""
    w, u = _weights(33, n, 3), _factor(_hessian(n, 3))
    u_inv = np.linalg.inv(u).astype(np.float32)
    blocks, err, cost = gptq_joint(type_name, w, u.astype(np.float32), u_inv, 1)
    difference = w - native.dequantize(type_name, blocks, n)
    assert np.allclose(err @ u, difference, atol=2e-4 * np.abs(w).max())
    assert np.allclose(cost, np.square(err).sum(1), rtol=1e-4)
    plain = native.quantize(type_name, w)
    _, _, fixed_scales = gptq_grid(grid.decode(type_name, plain), w, u.astype(np.float32), 1)
    assert cost.mean() < 0.95 * fixed_scales.mean()


def _joint_rows(w: NDArray[np.float64], d: float, u: NDArray[np.float64]) -> tuple[list[int], float]:
    """For one block and its scale: the table's row of each sub-block, every one tried with GPTQ's feedback,
    and the sum of e_j^2."""
    left, rows, total = w.copy(), [], 0.0
    for first in range(0, len(w), 16):
        here, best = slice(first, first + 16), None
        for row, levels in enumerate(fq4.TABLE):
            values = np.broadcast_to(d * levels.astype(float), (1, 16, 16))
            codes = _dense_gptq(left[None, here], values, u[here, here])
            difference = left[here] - values[0, 0, codes[0]]
            err = np.linalg.solve(u[here, here].T, difference)
            if best is None or err @ err < best[0]:
                best = (err @ err, row, err)
        assert best is not None
        total += best[0]
        rows.append(best[1])
        left[first + 16 :] -= best[2] @ u[here, first + 16 :]
    return rows, total


@pytest.mark.parametrize(("type_name", "n"), JOINT)
def test_joint_gptq_takes_the_rows_of_a_dense_implementation(type_name: str, n: int) -> None:
    """Rows and cost of the scale that was taken; float32 against float64, so a tie may end otherwise."""
    w, u = _weights(4, n, 11), _factor(_hessian(n, 11))
    blocks, _, cost = gptq_joint(type_name, w, u.astype(np.float32), np.linalg.inv(u).astype(np.float32), 1)
    found = grid.decode(type_name, blocks)
    expected = [_joint_rows(w[r].astype(float), float(found.scale[r, 0]), u) for r in range(len(w))]
    assert (found.book == [rows for rows, _ in expected]).mean() > 0.9
    assert np.allclose(cost, [total for _, total in expected], rtol=0.02)


def test_gptq_of_fq4_64_takes_the_best_scale_within_reach() -> None:
    """No scale within five of the one taken is better, whether the weights' largest matters or not."""
    w, h = _weights(3, 64, 12), _hessian(64, 12)
    w[1, 5] = 0.5  # far larger than its neighbours, in a channel that hardly counts
    h[5] *= 1e-3
    h[:, 5] *= 1e-3
    u = _factor(h, 1e-6)
    blocks, _, cost = gptq_joint("fq4_64", w, u.astype(np.float32), u, 1)
    for row, total in enumerate(cost):
        at = int(blocks[row, 0])
        near = [
            _joint_rows(w[row].astype(float), float(fq4_blocks.SCALES[d]), u)[1]
            for d in range(at - 5, at + 6)
        ]
        assert total <= min(near) * 1.02
    assert fq4_blocks.SCALES[blocks[1, 0]] < 0.5 * 0.5 / 127


@settings(max_examples=20, deadline=None)
@given(type_name=st.sampled_from(TYPES), rows=st.integers(1, 5), seed=st.integers(0, 999))
def test_descent_lowers_the_error(type_name: str, rows: int, seed: int) -> None:
    w, h = _weights(rows, 256, seed), _hessian(256, seed)
    start = grid.decode(type_name, native.quantize(type_name, w))

    def error(levels: grid.Grid) -> NDArray[np.float64]:
        d = (levels.values() - w).astype(float)
        return ((d @ h.numpy()) * d).sum(1)

    end, changes = descend(start, w, h.float().numpy(), 200, 1)
    assert (error(end) <= error(start) * (1 + 1e-5)).all()
    assert changes > 0
    assert error(end).sum() < error(start).sum()
    # A minimum: no single weight can be improved, up to float32 noise.
    _, more = descend(end, w, h.float().numpy(), 8, 1)
    assert more <= 2 * rows


@pytest.mark.parametrize("type_name", TYPES)
def test_gptq_beats_importances_on_the_output(type_name: str) -> None:
    w, h = _weights(48, 512, 5), _hessian(512, 5)
    errors = {name: round_matrix(w, type_name, name, Hessian(h), threads=1).error for name in ROUNDINGS}
    assert errors["gptq"] < 0.8 * min(errors["rtn"], errors["imatrix"])


@pytest.mark.parametrize("type_name", ["fq4", "fq4_64", "q4_k", "q4_0"])
def test_gptq_does_not_depend_on_threads(type_name: str) -> None:
    w, h = _weights(200, 512, 6), Hessian(_hessian(512, 6))
    assert np.array_equal(gptq.encode(w, type_name, h, threads=1), gptq.encode(w, type_name, h, threads=3))


def test_channels_without_activity_are_rounded_to_nearest() -> None:
    """Columns that no input reached have a zero Hessian row; they must not become NaN or garbage."""
    w, h = _weights(16, 256, 7), _hessian(256, 7)
    h[:, 50:90] = 0
    h[50:90] = 0
    data = gptq.encode(w, "fq4", Hessian(h))
    dead = (native.dequantize("fq4", data, 256) - w)[:, 50:90]
    assert np.sqrt(np.square(dead).mean()) < 0.3 * w.std()
    nothing = Hessian(torch.zeros(256, 256))
    assert np.isfinite(native.dequantize("q4_k", gptq.encode(w, "q4_k", nothing), 256)).all()


def test_zero_rows_stay_zero() -> None:
    w = _weights(4, 256)
    w[1] = 0
    for type_name in TYPES:
        values = native.dequantize(type_name, gptq.encode(w, type_name, Hessian(_hessian(256))), 256)
        assert not values[1].any()
        assert values[0].any()


def test_what_gptq_cannot_do_is_refused() -> None:
    w, h = _weights(2, 256), _hessian(256)
    with pytest.raises(GgmlExtError, match=r"gptq: no level grid for type q8_0; use one of"):
        gptq.encode(w, "q8_0", Hessian(h))
    with pytest.raises(GgmlExtError, match=r"rows of 240 weights do not fit the blocks of fq4"):
        gptq.encode(w[:, :240].copy(), "fq4", Hessian(h[:240, :240]))
    w[1, 3] = np.inf
    with pytest.raises(GgmlExtError, match="NaN or Inf"):
        gptq.encode(w, "fq4", Hessian(h))


def test_float_types_are_copies() -> None:
    w = _weights(3, 64)
    rounded = round_matrix(w, "f32", "gptq", Hessian(_hessian(64)))
    assert np.array_equal(native.dequantize("f32", rounded.data, 64), w)
    assert rounded.error == 0


def test_relative_error_is_the_outputs() -> None:
    random = np.random.default_rng(8)
    x, w = random.standard_normal((500, 32)), random.standard_normal((9, 32))
    q = w + 0.1 * random.standard_normal((9, 32))
    expected = np.square(x @ (q - w).T).sum() / np.square(x @ w.T).sum()
    h = torch.from_numpy(x.T @ x / len(x))
    assert relative_error(w.astype(np.float32), q.astype(np.float32), h) == pytest.approx(expected, rel=1e-4)
