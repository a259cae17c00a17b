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
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.measure import loss
from ggml_ext.measure import windows as windows_module
from ggml_ext.measure.layers import (
    LayerError,
    LayersUnavailableError,
    ModelErrors,
    choose_windows,
    layer_errors,
    record,
)
from ggml_ext.runtime.native import llama_library

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


def ignore(_tokens: float, _note: str = "") -> None:
    """Progress that nobody watches."""


def errors_of(base: Path, model: Path, windows: NDArray[np.int32], threads: int = 1) -> ModelErrors:
    with record(base, windows, ignore, threads=threads) as outputs:
        return outputs.errors(model, ignore, threads=threads)


def rms_norm(x: NDArray[np.float64]) -> NDArray[np.float64]:
    normalised: NDArray[np.float64] = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return normalised


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
    """What as_array gives, computed in float64."""
    a, b = weights_of(base), weights_of(model)
    sums = np.zeros((3, 1 + BLOCKS))
    for window in windows:
        tokens = np.concatenate([[BOS], window[1:]])
        exact, free = a["token_embd.weight"][tokens], b["token_embd.weight"][tokens]
        own = free
        for i in range(1 + BLOCKS):
            if i > 0:
                own, exact, free = block(b, i - 1, exact), block(a, i - 1, exact), block(b, i - 1, free)
            for j, value in enumerate((free - exact, own - exact, exact)):
                sums[j, i] += (value[CTX // 2 :] ** 2).sum()
    relative: NDArray[np.float64] = (sums[:2] / sums[2]).T
    return relative


NO_ERRORS = ModelErrors(0.0, [LayerError(0.0, 0.0)] * BLOCKS)


def as_array(errors: ModelErrors) -> NDArray[np.float64]:
    """[1 + BLOCKS, 2]: accumulated and own errors of the embedding and the blocks."""
    blocks = [(error.accumulated, error.own) for error in errors.layers]
    return np.array([(errors.embedding, errors.embedding), *blocks])


def test_equal_models_differ_by_exactly_nothing(base: Path, windows: NDArray[np.int32]) -> None:
    """Fails if a graph sees other values because it is watched or because outputs were put back."""
    for threads in (1, 3):
        assert errors_of(base, base, windows, threads) == NO_ERRORS


@pytest.mark.parametrize("k", range(BLOCKS))
def test_damage_shows_where_it_is(base: Path, tmp_path: Path, windows: NDArray[np.int32], k: int) -> None:
    """Fails if a forced output does not reach the next block, or comes too late for part of it."""
    model = damaged(base, tmp_path / "model.gguf", f"blk.{k}.attn_v.weight", f"blk.{k}.ffn_up.weight")
    errors = errors_of(base, model, windows)
    assert errors.embedding == 0
    assert [error.own > 0 for error in errors.layers] == [i == k for i in range(BLOCKS)]
    assert [error.accumulated > 0 for error in errors.layers] == [i >= k for i in range(BLOCKS)]
    assert errors.layers[k].own == errors.layers[k].accumulated


def test_damage_of_the_embedding(base: Path, tmp_path: Path, windows: NDArray[np.int32]) -> None:
    model = damaged(base, tmp_path / "model.gguf", "token_embd.weight")
    errors = errors_of(base, model, windows)
    assert errors.embedding == pytest.approx(0.02**2, rel=1e-4)
    assert all(error.own == 0 < error.accumulated for error in errors.layers)


def test_figures_are_those_of_an_independent_llama(
    base: Path, tmp_path: Path, windows: NDArray[np.int32]
) -> None:
    model = make_model(tmp_path / "model.gguf", kind=Type.F32, blocks=BLOCKS, noise=0.05)
    errors = as_array(errors_of(base, model, windows))
    np.testing.assert_allclose(errors, reference(base, model, windows), rtol=2e-3)  # the KV cache is F16
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
    assert errors_of(base, base, windows) == NO_ERRORS
    errors = errors_of(base, model, windows)
    assert [error.own > 0 for error in errors.layers] == [False, True, False]


def test_fewer_windows_where_the_disk_is_small(
    base: Path, tmp_path: Path, windows: NDArray[np.int32], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = damaged(base, tmp_path / "model.gguf", "blk.0.ffn_up.weight")
    expected = errors_of(base, model, windows[:2])
    monkeypatch.setattr(windows_module, "SCRATCH_BYTES", 2 * 4 * (1 + BLOCKS) * CTX * WIDTH)
    assert errors_of(base, model, windows) == expected
    monkeypatch.setattr(windows_module, "SCRATCH_BYTES", 100)
    with pytest.raises(GgmlExtError, match=r"no room for 0 MB of block outputs; set TMPDIR"):
        errors_of(base, model, windows)


def test_an_architecture_without_l_out(tmp_path: Path, windows: NDArray[np.int32]) -> None:
    model = make_plamo2(tmp_path / "plamo2.gguf")
    with pytest.raises(LayersUnavailableError, match=r"plamo2\.gguf: .* llama\.cpp shows 1 of 3; "):
        errors_of(model, model, windows)


def poisoned(base: Path, path: Path) -> Path:
    shutil.copyfile(base, path)
    tensor = next(t for t in gguf.GGUFReader(path, "r+").tensors if t.name == "blk.1.ffn_down.weight")
    tensor.data[3, 3] = np.nan
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda base, path: make_model(path, blocks=2), "it has 2 blocks of width 64, .* 3 of 64"),
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
    assert errors == [None, NO_ERRORS]
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
    assert errors_of(base, base, windows) == NO_ERRORS


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
    outputs = ffi.new("float[]", 3 * 8 * 4)
    record_mode = llama.GGML_EXT_LAYERS_RECORD
    for mode, n_tokens, n_skip, code in (
        (3, 8, 4, "TYPE"), (-1, 8, 4, "TYPE"), (record_mode, 0, 0, "SHAPE"), (record_mode, 8, 8, "SHAPE"),
        (record_mode, 8, -1, "SHAPE"),
    ):  # fmt: skip
        status = llama.ggml_ext_layers_begin(layers, mode, outputs, n_tokens, n_skip)
        assert status == getattr(llama, f"GGML_EXT_E_{code}")
    assert llama.ggml_ext_layers_begin(layers, record_mode, outputs, 8, 4) == 0
    sums = ffi.new("double[]", 3)
    assert llama.ggml_ext_layers_sums(layers, sums, sums) == 0


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ggml_ext.cli.entry", *map(str, arguments)], capture_output=True, text=True
    )


def test_compare_says_where_the_loss_comes_from(base: Path, tmp_path: Path) -> None:
    """JSON, report and summary tell the same figures; the base has none."""
    model = damaged(base, tmp_path / "model.gguf", "blk.1.ffn_up.weight", "blk.2.attn_v.weight")
    (tmp_path / "text.txt").write_text(text_of(400))
    out = [tmp_path / name for name in ("out.json", "out.md")]
    done = cli(
        "compare", base, model, base, "-f", tmp_path / "text.txt", "--ctx", CTX, "--rounds", 0, "--layers", 2,
        "--json", out[0], "--report", out[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reference_row, row, same = json.loads(out[0].read_text())
    assert reference_row["layers"] is None
    assert reference_row["embedding_error"] is None
    assert row["embedding_error"] == 0
    assert [layer["block"] for layer in row["layers"]] == list(range(BLOCKS))
    own = [layer["own"] for layer in row["layers"]]
    assert own[0] == 0 < min(own[1:])
    assert row["layers"][2]["accumulated"] > own[2]
    assert {layer["own"] for layer in same["layers"]} == {0.0}
    shares = loss.shares(row)
    assert sum(shares.values()) == pytest.approx(1)
    share = [f"{100 * shares[f'block {i}']:.0f} %" for i in range(BLOCKS)]
    worst = max(range(BLOCKS), key=lambda i: shares[f"block {i}"])
    other = 3 - worst
    named = f"block {worst} {share[worst]}, block {other} {share[other]}"
    assert f": largest shares of the error behind the last block: {named}\n" in done.stdout
    assert ": largest shares of the error behind the last block: none, " in done.stdout
    report = out[1].read_text()
    assert (
        f"| block 1 | {own[1]:.3g} ({share[1]}) | {row['layers'][1]['accumulated']:.3g} | 0 (0 %) | 0 |"
        in report
    )


def row_of(embedding: float, *errors: tuple[float, float]) -> dict[str, Any]:
    layers = [{"block": i, "accumulated": a, "own": own} for i, (a, own) in enumerate(errors)]
    return {"embedding_error": embedding, "layers": layers}


def test_shares_follow_what_each_block_passes_on() -> None:
    """Block 0 halves what comes in and adds 1; block 1 passes on a third and adds 2."""
    shares = loss.shares(row_of(4.0, (3.0, 1.0), (3.0, 2.0)))
    assert shares == pytest.approx({"embedding": 2 / 9, "block 0": 1 / 9, "block 1": 6 / 9})
    assert loss.shares(row_of(4.0, (0.0, 0.0), (1.0, 1.0)))["block 1"] == 1
    assert set(loss.shares(row_of(0.0, (0.0, 0.0))).values()) == {0.0}


def test_shares_are_those_of_damage_alone(base: Path, tmp_path: Path, windows: NDArray[np.int32]) -> None:
    """Of models with one noisy part each, the errors behind the last block have the shares that the model
    with noise in all parts shows."""
    noisy = make_model(tmp_path / "noisy.gguf", kind=Type.F32, blocks=BLOCKS, noise=0.02)
    source = {tensor.name: tensor.data for tensor in gguf.GGUFReader(noisy).tensors}
    alone = []
    for part in ("token_embd.", *(f"blk.{i}." for i in range(BLOCKS))):
        model = tmp_path / "model.gguf"
        shutil.copyfile(base, model)
        for tensor in gguf.GGUFReader(model, "r+").tensors:
            if tensor.name.startswith(part):
                tensor.data[:] = source[tensor.name]
        alone.append(errors_of(base, model, windows).layers[-1].accumulated)
    errors = errors_of(base, noisy, windows)
    row = row_of(errors.embedding, *((error.accumulated, error.own) for error in errors.layers))
    expected = np.array(alone) / sum(alone)
    np.testing.assert_allclose(list(loss.shares(row).values()), expected, rtol=0.1)


@pytest.mark.parametrize(
    ("make", "option", "notes"), [(make_plamo2, "2", 1), (make_plamo2, "0", 0), (make_model, "0", 0)]
)
def test_compare_without_block_errors(
    tmp_path: Path, make: Callable[[Path], Path], option: str, notes: int
) -> None:
    """An architecture that hides its blocks, or --layers 0: everything else is measured, a line says why."""
    model = make(tmp_path / "model.gguf")
    (tmp_path / "text.txt").write_text(text_of(200))
    out = [tmp_path / name for name in ("out.json", "out.md")]
    done = cli(
        "compare", model, model, "-f", tmp_path / "text.txt", "--ctx", CTX, "--rounds", 0, "--layers", option,
        "--json", out[0], "--report", out[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no error per block: ") == notes
    assert [(row["layers"], row["embedding_error"]) for row in json.loads(out[0].read_text())] == [
        (None, None)
    ] * 2
    assert "largest shares" not in done.stdout
    assert "Error per block" not in out[1].read_text()
