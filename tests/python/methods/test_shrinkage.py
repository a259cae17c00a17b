"""GPTQ with few tokens per channel: its error on inputs that calibration has not seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ggml_ext.methods.rounding import round_matrix
from ggml_ext.methods.rounding.hessian import (
    Hessian,
    choose_shrinkage,
    default_shrinkage,
    expert_moments,
    expert_shrinkage,
    noise_left,
    shrink,
)
from ggml_ext.runtime import native

N, ROWS, SAMPLE = 512, 24, 1024
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Source:
    """Inputs with a known second moment. ``draw``: (tokens, generator) -> [tokens, N]."""

    hessian: Floats
    draw: Callable[[int, np.random.Generator], Floats]


def gaussian(root: Floats, degrees: float = np.inf) -> Source:
    """Tokens z root^T, with sizes as in a t distribution for finite ``degrees``."""

    def draw(tokens: int, random: np.random.Generator) -> Floats:
        z = random.standard_normal((tokens, len(root)))
        if np.isfinite(degrees):
            z *= np.sqrt((degrees - 2) / random.chisquare(degrees, (tokens, 1)))
        return z @ root.T

    return Source(root @ root.T, draw)


def _rotation() -> Floats:
    return np.linalg.qr(np.random.default_rng(0).standard_normal((N, N)))[0]


def _sources() -> dict[str, Callable[[], Source]]:
    q = _rotation()
    sizes = np.exp(np.random.default_rng(1).standard_normal((N, 1)))
    mix = np.eye(N) + 0.5 * np.random.default_rng(2).standard_normal((N, N)) / np.sqrt(N)
    return {
        "decaying": lambda: gaussian(q * np.sqrt(np.geomspace(1, 1e-3, N))),
        "nearly isotropic": lambda: gaussian(q * np.sqrt(np.geomspace(1, 0.25, N))),
        "isotropic": lambda: gaussian(np.eye(N)),
        "low rank": lambda: gaussian(q * np.sqrt(np.where(np.arange(N) < 32, 1, 0.01))),
        "spiked": lambda: gaussian(q * np.sqrt(np.where(np.arange(N) < 4, 300, 1))),
        "channels of many sizes": lambda: gaussian(sizes * mix),
        "heavy tails": lambda: gaussian(q * np.sqrt(np.geomspace(1, 0.03, N)), degrees=3),
    }


SOURCES = _sources()


def _error(w: Floats, type_name: str, method: str, hessian: Hessian, truth: Floats) -> float:
    data = round_matrix(w.astype(np.float32), type_name, method, hessian, threads=1).data
    d = native.dequantize(type_name, data, w.shape[1]) - w
    return float(((d @ truth) * d).sum() / ((w @ truth) * w).sum())


def _calibrated(source: Source, tokens: int, random: np.random.Generator) -> Hessian:
    """Moments as calibration has them: float32, with a sample of at most SAMPLE tokens."""
    x = torch.from_numpy(source.draw(tokens, random)).float()
    h = (x.T @ x / tokens).double()
    return Hessian(h, choose_shrinkage(h, tokens, x[:: -(-tokens // SAMPLE)]))


@pytest.mark.parametrize("per_channel", [0.25, 1, 4])
@pytest.mark.parametrize("name", SOURCES)
def test_gptq_is_not_worse_than_importances_on_unseen_inputs(name: str, per_channel: float) -> None:
    """Fails without shrinkage, and with one that only knows the number of tokens."""
    source, random = SOURCES[name](), np.random.default_rng(3)
    w = random.standard_normal((ROWS, N))
    hessian = _calibrated(source, int(per_channel * N), random)
    gptq, imatrix = (_error(w, "fq4", method, hessian, source.hessian) for method in ("gptq", "imatrix"))
    assert gptq < 1.01 * imatrix


@pytest.mark.parametrize("per_channel", [1, 4])
@pytest.mark.parametrize("type_name", ["q4_0", "iq4_xs", "q4_k", "q5_k", "q6_k", "nvfp4", "mxfp4"])
def test_every_grid_profits_from_the_shrinkage(type_name: str, per_channel: int) -> None:
    source, random = SOURCES["nearly isotropic"](), np.random.default_rng(4)
    w = random.standard_normal((8, N))
    hessian = _calibrated(source, per_channel * N, random)
    gptq, imatrix = (_error(w, type_name, method, hessian, source.hessian) for method in ("gptq", "imatrix"))
    assert gptq < 1.01 * imatrix


def test_many_tokens_are_believed() -> None:
    source, random = SOURCES["decaying"](), np.random.default_rng(5)
    w = random.standard_normal((ROWS, N))
    hessian = _calibrated(source, 40 * N, random)
    ours, unshrunk, imatrix = (
        _error(w, "fq4", method, h, source.hessian)
        for method, h in (("gptq", hessian), ("gptq", Hessian(hessian.measured)), ("imatrix", hessian))
    )
    assert ours < 1.02 * unshrunk
    assert ours < 0.5 * imatrix


def test_shrinkage_without_evidence() -> None:
    """Few tokens, or none, decide nothing: the count does."""
    h = torch.eye(16, dtype=torch.float64)
    assert choose_shrinkage(h, 48, torch.zeros(2, 16)) == default_shrinkage(48, 16) == 0.25
    assert choose_shrinkage(torch.zeros(16, 16), 500, torch.zeros(100, 16)) == default_shrinkage(500, 16)
    assert noise_left(shrink(h.float(), 0.5), torch.ones(3, 16)) == pytest.approx(1)


def test_experts_lean_on_the_shared_moments() -> None:
    """An expert's correlations are those of all until it has tokens of its own; its scale is its own."""
    random = np.random.default_rng(6)
    shared_source = SOURCES["decaying"]()
    scale = np.exp(0.3 * random.standard_normal((N, 1)))
    own_source = gaussian(3 * scale * np.linalg.cholesky(shared_source.hessian))
    x = torch.from_numpy(shared_source.draw(8 * N, random)).float()
    shared = (x.T @ x / len(x)).double()
    s = choose_shrinkage(shared, len(x), x[::4])
    w = random.standard_normal((ROWS, N))
    for tokens in (1, 64, N, 6 * N):
        y = torch.from_numpy(own_source.draw(tokens, random)).float()
        own = (y.T @ y / tokens).double()
        leaning = Hessian(expert_moments(own, tokens, shared), expert_shrinkage(tokens, N, s))
        alone = Hessian(own, default_shrinkage(tokens, N))
        truth = own_source.hessian
        ours, imatrix, without = (
            _error(w, "fq4", method, h, truth)
            for method, h in (("gptq", leaning), ("imatrix", leaning), ("gptq", alone))
        )
        assert ours < imatrix
        assert ours < 1.02 * without, tokens
