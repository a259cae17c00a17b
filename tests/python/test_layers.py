"""Error per block: what is measured, where it stays silent, and how compare shows it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from eval_models import HEADS, KV_HEADS, WIDTH, make_model, make_plamo2, text_of
from ggml_ext import windows as windows_module
from ggml_ext.errors import GgmlExtError
from ggml_ext.layers import LayerError, LayersUnavailableError, choose_windows, layer_errors, record
from ggml_ext.native import llama_library

BLOCKS, CTX, VOCABULARY, BOS = 3, 48, 384, 1
Weights = dict[str, NDArray[np.float64]]


@pytest.fixture(autouse=True)
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GGML_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three blocks, F32."""
    return make_model(tmp_path_factory.mktemp("layers") / "base.gguf", kind=Type.F32, blocks=BLOCKS)


@pytest.fixture(scope="module")
def windows() -> NDArray[np.int32]:
    return np.random.default_rng(5).integers(3, VOCABULARY, (3, CTX), np.int32)


def damaged(base: Path, path: Path, *tensors: str) -> Path:
    """A copy of ``base`` where ``tensors`` are 2 % larger."""
    shutil.copyfile(base, path)
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if tensor.name in tensors:
            tensor.data[:] *= np.float32(1.02)
    return path


def errors_of(base: Path, model: Path, windows: NDArray[np.int32]) -> list[LayerError]:
    with record(base, windows, lambda _: None, threads=1) as outputs:
        return outputs.errors(model, lambda _: None, threads=1)


def rms_norm(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def rotated(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """RoPE over neighbouring pairs; x [tokens, heads, head_dim]."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / half)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def block(w: Weights, i: int, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Block i of a Llama in float64; x [tokens, WIDTH]."""

    def linear(name: str, y: NDArray[np.float64]) -> NDArray[np.float64]:
        return y @ w[f"blk.{i}.{name}.weight"].T

    n, head = len(x), WIDTH // HEADS
    y = rms_norm(x)
    q = rotated(linear("attn_q", y).reshape(n, HEADS, head))
    k = rotated(linear("attn_k", y).reshape(n, KV_HEADS, head)).repeat(HEADS // KV_HEADS, 1)
    v = linear("attn_v", y).reshape(n, KV_HEADS, head).repeat(HEADS // KV_HEADS, 1)
    scores = np.einsum("ahd,bhd->hab", q, k) / np.sqrt(head)
    scores = np.exp(np.where(np.tri(n, dtype=bool), scores, -np.inf))
    scores /= scores.sum(-1, keepdims=True)
    x = x + linear("attn_output", np.einsum("hab,bhd->ahd", scores, v).reshape(n, WIDTH))
    y = rms_norm(x)
    gate = linear("ffn_gate", y)
    return x + linear("ffn_down", gate / (1 + np.exp(-gate)) * linear("ffn_up", y))


def weights_of(path: Path) -> Weights:
    return {tensor.name: tensor.data.astype(np.float64) for tensor in gguf.GGUFReader(path).tensors}


def reference(base: Path, model: Path, windows: NDArray[np.int32]) -> NDArray[np.float64]:
    """[BLOCKS, 2]: accumulated and own errors, computed in float64."""
    a, b = weights_of(base), weights_of(model)
    sums = np.zeros((3, BLOCKS))
    for window in windows:
        tokens = np.concatenate([[BOS], window[1:]])
        exact, free = a["token_embd.weight"][tokens], b["token_embd.weight"][tokens]
        forced = free
        for i in range(BLOCKS):
            exact, free, own = block(a, i, exact), block(b, i, free), block(b, i, forced)
            forced = exact
            scored = slice(CTX // 2, None)
            for j, value in enumerate((free - exact, own - exact, exact)):
                sums[j, i] += (value[scored] ** 2).sum()
    return (sums[:2] / sums[2]).T


def as_array(errors: list[LayerError]) -> NDArray[np.float64]:
    return np.array([(error.accumulated, error.own) for error in errors])


def test_equal_models_differ_by_exactly_nothing(base: Path, windows: NDArray[np.int32]) -> None:
    """Fails if a graph sees other values because it is watched or because outputs were put back."""
    assert errors_of(base, base, windows) == [LayerError(0.0, 0.0)] * BLOCKS


@pytest.mark.parametrize("k", range(BLOCKS))
def test_damage_shows_where_it_is(base: Path, tmp_path: Path, windows: NDArray[np.int32], k: int) -> None:
    """Fails if a forced output does not reach the next block, or comes too late for part of it."""
    model = damaged(base, tmp_path / "model.gguf", f"blk.{k}.attn_v.weight", f"blk.{k}.ffn_up.weight")
    errors = errors_of(base, model, windows)
    assert [error.own > 0 for error in errors] == [i == k for i in range(BLOCKS)]
    assert [error.accumulated > 0 for error in errors] == [i >= k for i in range(BLOCKS)]
    assert errors[k].own == errors[k].accumulated


def test_figures_are_those_of_an_independent_llama(
    base: Path, tmp_path: Path, windows: NDArray[np.int32]
) -> None:
    model = make_model(tmp_path / "model.gguf", kind=Type.F32, blocks=BLOCKS, noise=0.05)
    errors = as_array(errors_of(base, model, windows))
    np.testing.assert_allclose(errors, reference(base, model, windows), rtol=2e-3)  # the KV cache is F16
    assert errors[0, 0] == errors[0, 1]
    assert (errors[1:, 0] > errors[1:, 1]).all()


def test_quantised_types_are_ordered(tmp_path: Path, windows: NDArray[np.int32], base: Path) -> None:
    errors = [
        as_array(errors_of(base, make_model(tmp_path / kind.name, kind=kind, blocks=BLOCKS), windows))
        for kind in (Type.F16, Type.Q8_0, Type.Q4_0)
    ]
    assert (errors[0] < errors[1]).all()
    assert (errors[1] < errors[2]).all()


def test_mixture_of_experts(tmp_path: Path, windows: NDArray[np.int32]) -> None:
    base = make_model(tmp_path / "base.gguf", kind=Type.F32, blocks=BLOCKS, experts=4)
    model = damaged(base, tmp_path / "model.gguf", "blk.1.ffn_down_exps.weight")
    assert errors_of(base, base, windows) == [LayerError(0.0, 0.0)] * BLOCKS
    errors = errors_of(base, model, windows)
    assert [error.own > 0 for error in errors] == [False, True, False]


def test_fewer_windows_where_the_disk_is_small(
    base: Path, tmp_path: Path, windows: NDArray[np.int32], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = damaged(base, tmp_path / "model.gguf", "blk.0.ffn_up.weight")
    expected = errors_of(base, model, windows[:2])
    monkeypatch.setattr(windows_module, "SCRATCH_BYTES", 2 * 4 * BLOCKS * CTX * WIDTH)
    assert errors_of(base, model, windows) == expected
    monkeypatch.setattr(windows_module, "SCRATCH_BYTES", 100)
    with pytest.raises(GgmlExtError, match=r"no room for 0 MB of block outputs; set TMPDIR"):
        errors_of(base, model, windows)


def test_an_architecture_without_l_out(tmp_path: Path, windows: NDArray[np.int32]) -> None:
    model = make_plamo2(tmp_path / "plamo2.gguf")
    with pytest.raises(LayersUnavailableError, match=r"plamo2\.gguf: .* for 0 of 2 blocks of this arch"):
        errors_of(model, model, windows)


def poisoned(base: Path, path: Path) -> Path:
    shutil.copyfile(base, path)
    tensor = next(t for t in gguf.GGUFReader(path, "r+").tensors if t.name == "blk.1.ffn_down.weight")
    tensor.data[3, 3] = np.nan
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda base, path: make_model(path, blocks=2), "it has 2 blocks of width 64, .* has 3 of 64"),
        (poisoned, "the output of block 1, or the base's, is NaN"),
    ],
)
def test_models_that_cannot_be_compared_are_passed_over(
    base: Path,
    tmp_path: Path,
    windows: NDArray[np.int32],
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path, Path], Path],
    reason: str,
) -> None:
    """One line says why, and the other models get their figures."""
    bad = make(base, tmp_path / "bad.gguf")
    errors = layer_errors(base, [bad, base], windows, threads=1)
    assert errors == [None, [LayerError(0.0, 0.0)] * BLOCKS]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ggml-ext: {bad}: no error per block: ")
    assert re.search(reason, line)


def test_base_that_cannot_be_compared(
    tmp_path: Path, windows: NDArray[np.int32], capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_plamo2(tmp_path / "plamo2.gguf")
    assert layer_errors(model, [model, model], windows, threads=1) == [None, None]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_ctrl_c(base: Path, windows: NDArray[np.int32]) -> None:
    """Ctrl-C ends a pass that would take minutes, and leaves a usable process."""
    many = np.tile(windows, (20_000, 1))
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        errors_of(base, base, many)
    assert errors_of(base, base, windows) == [LayerError(0.0, 0.0)] * BLOCKS


def test_choice_of_windows() -> None:
    windows = np.arange(10 * 600, dtype=np.int32).reshape(10, 600)
    assert choose_windows(windows, 4)[:, 0].tolist() == [0, 1800, 3600, 5400]
    assert choose_windows(windows, 4).shape == (4, 512)
    assert choose_windows(windows[:3, :32], 8).shape == (3, 32)


def test_c_functions_refuse_impossible_arguments() -> None:
    ffi, llama = llama_library()
    for sizes in ((0, 64), (2, 0), (-1, -1)):
        assert llama.ggml_ext_layers_new(*sizes) == ffi.NULL
    layers = ffi.gc(llama.ggml_ext_layers_new(2, 4), llama.ggml_ext_layers_free)
    outputs = ffi.new("float[]", 2 * 8 * 4)
    record_mode = llama.GGML_EXT_LAYERS_RECORD
    for mode, n_tokens, n_skip, code in (
        (3, 8, 4, "TYPE"), (-1, 8, 4, "TYPE"), (record_mode, 0, 0, "SHAPE"), (record_mode, 8, 8, "SHAPE"),
        (record_mode, 8, -1, "SHAPE"),
    ):  # fmt: skip
        status = llama.ggml_ext_layers_begin(layers, mode, outputs, n_tokens, n_skip)
        assert status == getattr(llama, f"GGML_EXT_E_{code}")
    assert llama.ggml_ext_layers_begin(layers, record_mode, outputs, 8, 4) == 0
    sums = ffi.new("double[]", 2)
    assert llama.ggml_ext_layers_sums(layers, sums, sums) == 0
