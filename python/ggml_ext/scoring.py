"""From logits to figures: perplexity, KL divergence, top-1 agreement, with llama-perplexity's definitions.

Every position is scored in float64 from the float32 logits. llama-perplexity stores the base model's
log-probabilities in 16 bits over the top 16 nats of each row and leaves tokens below e^-16 out of the sum;
here nothing is rounded and nothing left out. The figures differ by less than 1 % of the KL divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCORE = np.dtype([("nll", "<f8"), ("nll_base", "<f8"), ("kld", "<f8"), ("same_top", "?")])
"""One scored position: -ln p(token) under the model and the base, KL(base || model) in nats, whether both
models find the same token most likely. A base model scores (nll, nll, 0, True)."""

TILE = 1 << 16
"""Logits per tile: the three float64 temporaries of a tile take 1.5 MiB and stay in the cache."""

THREADS = 2

PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1)

BaseRows = Callable[[int, int], NDArray[np.float32]]
"""Base logits [stop - start, n_vocab] of rows start..stop."""


def _score_tile(
    logits: NDArray[np.float32],
    targets: NDArray[np.int32],
    base: NDArray[np.float32] | None,
    out: NDArray[np.void],
) -> None:
    """Score a few rows [n, n_vocab] into ``out`` [n] of dtype SCORE."""
    rows = np.arange(len(targets))
    top = logits.argmax(axis=1)
    # ln of the odds to the top token
    shifted = np.subtract(logits, logits[rows, top][:, None], dtype=np.float64)
    log_sum = np.log(np.exp(shifted).sum(axis=1))
    out["nll"] = log_sum - shifted[rows, targets]
    if base is None:
        out["nll_base"], out["kld"], out["same_top"] = out["nll"], 0.0, True
        return
    base_top = base.argmax(axis=1)
    base_shifted = np.subtract(base, base[rows, base_top][:, None], dtype=np.float64)
    weights = np.exp(base_shifted)
    base_sum = weights.sum(axis=1)
    base_log_sum = np.log(base_sum)
    out["nll_base"] = base_log_sum - base_shifted[rows, targets]
    # KL = sum p_base (ln p_base - ln p) with ln p = shifted - log_sum
    np.subtract(base_shifted, shifted, out=shifted)
    out["kld"] = np.einsum("ij,ij->i", weights, shifted) / base_sum - base_log_sum + log_sum
    out["same_top"] = top == base_top


def score(
    logits: NDArray[np.float32],
    targets: NDArray[np.int32],
    base: BaseRows | None = None,
    *,
    threads: int = THREADS,
) -> NDArray[np.void]:
    """Score ``logits`` [n, n_vocab] against the tokens ``targets`` [n] that came next.

    ``base`` gives the base model's logits of the same rows in pieces (it is called from several threads);
    without it the model is its own base. Returns an array [n] of dtype SCORE; a NaN or infinite logit
    makes its row's figures non-finite. Takes a few MiB beside its arguments, whatever the vocabulary.
    """
    out = np.zeros(len(targets), SCORE)
    step = max(1, TILE // logits.shape[1])

    def tile(start: int) -> None:
        stop = min(start + step, len(targets))
        rows = None if base is None else base(start, stop)
        with np.errstate(invalid="ignore", over="ignore"):
            _score_tile(logits[start:stop], targets[start:stop], rows, out[start:stop])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(tile, range(0, len(targets), step)))
    return out


def mean_and_error(values: NDArray[Any]) -> tuple[float, float]:
    """Mean of ``values`` [n] and its standard error, sqrt(var / (n - 1)), as llama-perplexity has it."""
    count = len(values)
    mean = float(np.mean(values, dtype=np.float64))
    variance = float(np.mean(np.square(values, dtype=np.float64))) - mean * mean
    return mean, float(np.sqrt(max(variance, 0.0) / (count - 1))) if count > 1 else 0.0


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over ``count`` scored tokens and its standard error."""

    ppl: float
    ppl_se: float
    count: int


@dataclass(frozen=True)
class Divergence:
    """How far a model is from its base, each figure with its standard error (``_se``) where it is a mean.

    kld: mean KL divergence in nats; top1: share of positions at which both find the same token most likely;
    ln_ppl_ratio: ln(PPL / PPL of the base); p_diff_rms, p_diff_mean: difference of the probability given to
    the token of the text; kld_percentiles: "99.9" -> nats.
    """

    kld: float
    kld_se: float
    kld_max: float
    kld_percentiles: dict[str, float]
    top1: float
    top1_se: float
    ln_ppl_ratio: float
    ln_ppl_ratio_se: float
    p_diff_mean: float
    p_diff_mean_se: float
    p_diff_rms: float
    p_diff_rms_se: float

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain Python values."""
        return asdict(self)


def perplexity_of(scores: NDArray[np.void]) -> Perplexity:
    """Perplexity of positions ``scores`` [n] of dtype SCORE."""
    nll, nll_se = mean_and_error(scores["nll"])
    ppl = float(np.exp(nll))
    return Perplexity(ppl, ppl * nll_se, len(scores))


def divergence_of(scores: NDArray[np.void]) -> Divergence:
    """Figures of positions ``scores`` [n] of dtype SCORE against the base."""
    count = len(scores)
    kld, kld_se = mean_and_error(scores["kld"])
    top1 = float(np.mean(scores["same_top"]))
    # The error of a mean difference is that of the differences: llama-perplexity's variances less covariance.
    ratio, ratio_se = mean_and_error(scores["nll"] - scores["nll_base"])
    p_diff = np.exp(-scores["nll"]) - np.exp(-scores["nll_base"])
    p_mean, p_mean_se = mean_and_error(p_diff)
    p_square, p_square_se = mean_and_error(np.square(p_diff))
    p_rms = float(np.sqrt(p_square))
    return Divergence(
        kld=kld,
        kld_se=kld_se,
        kld_max=float(scores["kld"].max()),
        kld_percentiles={f"{q:g}": float(np.percentile(scores["kld"], q)) for q in PERCENTILES},
        top1=top1,
        top1_se=float(np.sqrt(top1 * (1.0 - top1) / (count - 1))) if count > 1 else 0.0,
        ln_ppl_ratio=ratio,
        ln_ppl_ratio_se=ratio_se,
        p_diff_mean=p_mean,
        p_diff_mean_se=p_mean_se,
        p_diff_rms=p_rms,
        p_diff_rms_se=0.5 / p_rms * p_square_se if p_rms > 0 else 0.0,
    )
