"""Statistics that hold nothing, or hardly anything: a result, or one line that says what is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import models
import random_sites
from ggml_ext import recipes
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.registry import TRANSFORMS
from ggml_ext.gguf import fq4
from ggml_ext.hf.folder import to_gguf
from ggml_ext.methods.calibrate import blocks
from ggml_ext.methods.calibrate import run as calibrate
from ggml_ext.methods.calibrate.block_file import block_path, load
from ggml_ext.methods.calibrate.plan import Request
from ggml_ext.methods.rounding import round_matrix
from ggml_ext.methods.rounding.hessian import Hessian, choose_shrinkage, noise_left, shrink
from ggml_ext.methods.rounding.kernels import gptq_joint
from ggml_ext.methods.sites import ActivationSpec, SiteStats
from ggml_ext.methods.transforms import TransformRequest, flatquant, solve
from ggml_ext.observe.observer import LARGEST_TOKEN
from ggml_ext.runtime import native
from observed import tempered


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _of_tokens(x: torch.Tensor) -> SiteStats:
    return SiteStats(x.T @ x / len(x), x.abs().amax(0), x[:: -(-len(x) // 1024)], len(x))


STATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nothing": torch.zeros_like,
    "one token": lambda x: x[:1],
    "a dead channel": lambda x: x * (torch.arange(x.shape[1]) != 5),
    "one live channel": lambda x: x * (torch.arange(x.shape[1]) == 5),
    "equal channels": lambda x: x[:, :1].expand_as(x).contiguous(),
    "tiny": lambda x: x * 1e-18,
    "huge": lambda x: x * 1e8,
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("kind", STATS)
def test_any_statistics_give_a_sound_transform(kind: str, name: str, bits: int) -> None:
    site, stats = random_sites.plain(64, seed=1)
    stats = _of_tokens(STATS[kind](stats.sample))
    types = {linear.tensor: "q4_0" for linear in site.linears}
    request = TransformRequest(name, types, ActivationSpec(bits, 32), steps=4)
    transform = solve(site, stats, request)
    w = site.linears[0].weight
    assert torch.allclose(transform.effective_weight(transform.weight(w)), w, atol=1e-3)
    moved = Hessian(transform.hessian(stats.hessian))
    rows = np.ascontiguousarray(transform.weight(w).numpy())
    data = round_matrix(rows, "q4_0", "gptq", moved, threads=1).data
    assert np.abs(native.dequantize("q4_0", data, 64) - rows).max() < np.abs(rows).max()


def test_a_silent_site_is_left_as_it_is() -> None:
    site, stats = random_sites.plain(64, seed=1)
    types = {linear.tensor: "fq4" for linear in site.linears}
    transform = solve(site, _of_tokens(0 * stats.sample), TransformRequest("flatquant", types))
    assert torch.equal(transform.diag, torch.ones(64, dtype=torch.float64))
    assert not transform.online


def test_iterates_that_blow_up_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """At such a rate the factors become infinite or singular; the start is still there."""
    monkeypatch.setattr(flatquant, "_MATRIX_RATE", 1e30)
    monkeypatch.setattr(flatquant, "_DIAGONAL_RATE", 1e30)
    site, stats = random_sites.plain(64, seed=2)
    types = {linear.tensor: "q4_0" for linear in site.linears}
    transform = solve(site, stats, TransformRequest("flatquant", types, steps=4))
    assert transform.notes["loss"] == transform.notes["loss_start"]
    assert flatquant.condition(transform) < 2
    assert flatquant.condition(replace(transform, diag=transform.diag * torch.nan)) == np.inf


def test_importances_of_nothing_are_equal() -> None:
    """ggml's encoders write zeros where all importances are 0."""
    w = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    for h in (torch.zeros(256, 256), torch.diag((torch.arange(256) >= 128).double())):
        data = round_matrix(w, "q4_k", "imatrix", Hessian(h), threads=1).data
        assert np.square(native.dequantize("q4_k", data, 256) - w).mean() < 0.02 * np.square(w).mean()


@pytest.mark.parametrize("importance", [3e38, 1e36])
def test_importances_beyond_a_float_make_no_zeros(importance: float) -> None:
    """FQ4's block sum, or the cost of every candidate, is infinite unless they are scaled first."""
    w = np.random.default_rng(0).standard_normal((2, 256)).astype(np.float32) * 1e3
    importances = np.full(256, importance, np.float32)
    back = native.dequantize("fq4", native.quantize("fq4", w, importances), 256)
    assert np.square(back - w).mean() < 0.01 * np.square(w).mean()
    assert np.isnan(fq4.dequantize(fq4.quantize(w, importances))).all()
    u = np.eye(256, dtype=np.float32) * 1e-30
    for type_name, n in (("fq4", 256), ("fq4_64", 64)):
        part = u[:n, :n]
        with pytest.raises(GgmlExtError, match="GGML_EXT_E_FINITE"):
            gptq_joint(type_name, w[:, :n], part, np.linalg.inv(part), 1)


def test_moments_that_are_none_are_refused_in_a_line() -> None:
    w = np.ones((2, 256), np.float32)
    with pytest.raises(GgmlExtError, match="second moments are not positive; use"):
        round_matrix(w, "fq4", "gptq", Hessian(torch.ones(256, 256).fill_diagonal_(0.5)), threads=1)
    with pytest.raises(GgmlExtError, match="NaN or Inf"):
        round_matrix(w, "fq4", "gptq", Hessian(torch.full((256, 256), torch.nan)), threads=1)


def test_a_massive_first_token_does_not_hide_the_others() -> None:
    """As in real Llamas: two channels of a window's first token are thousands of times the rest."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(256, 256, generator=generator) * torch.logspace(0, -2, 256)
    windows = torch.randn(8, 512, 256, generator=generator) @ mix / 16
    unseen = torch.randn(512, 256, generator=generator) @ mix / 16
    without = _of_tokens(windows.flatten(0, 1))
    windows[:, 0, [7, 99]] += torch.tensor([4000.0, -1500.0])
    stats = _of_tokens(torch.from_numpy(tempered(windows.flatten(0, 1).numpy())))
    assert stats.hessian.trace() < (1 + 2 * LARGEST_TOKEN / 512) * without.hessian.trace()
    s = choose_shrinkage(stats.hessian.double(), stats.n_tokens, stats.sample)
    left = noise_left(shrink(stats.hessian, s), unseen)
    assert left < 1.05 * noise_left(shrink(without.hessian, s), unseen)
    first = windows[0, :1]
    assert noise_left(shrink(stats.hessian, s), first) < 0.2, "the first token still counts"


def test_zeroed_matrices_and_a_zeroed_layer(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As pruned models have them; a dead channel of the hidden states besides."""
    folder = tmp_path / "zeroed"
    shutil.copytree(models.llama_dir(tmp_path_factory.getbasetemp()), folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "layers.1." in name and "layernorm" not in name:
            tensor.zero_()
    for name in ("self_attn.v_proj", "mlp.up_proj"):
        tensors[f"model.layers.0.{name}.weight"].zero_()
    tensors["model.embed_tokens.weight"][:, 3] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text(models.TEXT * 6)
    converted = tmp_path / "m.gguf"
    to_gguf(folder, converted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate.hf, "to_gguf", lambda _folder, out, **_: shutil.copyfile(converted, out))
        patch.setattr(blocks, "TransformRequest", partial(TransformRequest, steps=4))
        for name in recipes.names():
            method = replace(recipes.load(name).method, samples=2)
            out = tmp_path / name
            request = Request(folder, text, method, ctx=32, threads=1)
            calibrate.calibrate(request, out, warn=lambda _line: None)
            stored, findings = load(block_path(out, 0))
            assert np.isfinite(list(findings.errors.values())).all()
            query = stored["blk.0.attn_q.weight"]
            assert native.dequantize(query.type_name, query.read(), query.dims[0]).any()
