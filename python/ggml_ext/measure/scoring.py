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

from ggml_ext.measure.standard_error import Interval, TextErrors, independent_error, interval

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


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over ``count`` scored tokens.

    ppl_se, ppl_ci95: its standard error and 95 % interval by ``TextErrors`` with ``error_df`` degrees of
    freedom, None where the text is too short for them; ppl_se_independent: llama-perplexity's error, which
    takes tokens for independent.
    """

    ppl: float
    ppl_se: float | None
    ppl_ci95: Interval | None
    ppl_se_independent: float
    count: int
    error_df: int


@dataclass(frozen=True)
class Divergence:
    """How far a model is from its base. Every mean with error and interval, as in ``Perplexity``.

    kld: mean KL divergence in nats; top1: share of positions at which both find the same token most likely;
    ln_ppl_ratio: ln(PPL / PPL of the base); p_diff_rms, p_diff_mean: difference of the probability given to
    the token of the text; kld_percentiles: "99.9" -> nats.
    """

    kld: float
    kld_se: float | None
    kld_ci95: Interval | None
    kld_se_independent: float
    kld_max: float
    kld_percentiles: dict[str, float]
    top1: float
    top1_se: float | None
    top1_ci95: Interval | None
    top1_se_independent: float
    ln_ppl_ratio: float
    ln_ppl_ratio_se: float | None
    ln_ppl_ratio_ci95: Interval | None
    ln_ppl_ratio_se_independent: float
    p_diff_mean: float
    p_diff_mean_se: float | None
    p_diff_mean_ci95: Interval | None
    p_diff_mean_se_independent: float
    p_diff_rms: float
    p_diff_rms_se: float | None
    p_diff_rms_ci95: Interval | None
    p_diff_rms_se_independent: float

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain Python values."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """A model less its rival on the same tokens, with the errors of the differences.

    kld_diff: in nats; ln_ppl_diff: ln(PPL / PPL of the rival); resolved: the 95 % interval does not hold 0.
    """

    kld_diff: float
    kld_diff_se: float | None
    kld_diff_ci95: Interval | None
    kld_diff_resolved: bool
    ln_ppl_diff: float
    ln_ppl_diff_se: float | None
    ln_ppl_diff_ci95: Interval | None
    ln_ppl_diff_resolved: bool

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain Python values."""
        return asdict(self)


def _mean(values: NDArray[Any], errors: TextErrors) -> tuple[float, float | None, Interval | None, float]:
    """Mean of ``values`` [n], error, 95 % interval, and the error that independent tokens would have."""
    mean, error = float(np.mean(values, dtype=np.float64)), errors.error(values)
    return mean, error, interval(mean, error), independent_error(values)


def perplexity_of(scores: NDArray[np.void], errors: TextErrors) -> Perplexity:
    """Perplexity of positions ``scores`` [n] of dtype SCORE, and its error from that of its logarithm."""
    nll, error, bounds, independent = _mean(scores["nll"], errors)
    ppl = float(np.exp(nll))
    return Perplexity(
        ppl=ppl,
        ppl_se=None if error is None else ppl * error,
        ppl_ci95=None if bounds is None else (float(np.exp(bounds[0])), float(np.exp(bounds[1]))),
        ppl_se_independent=ppl * independent,
        count=len(scores),
        error_df=errors.df,
    )


def divergence_of(scores: NDArray[np.void], errors: TextErrors) -> Divergence:
    """Figures of positions ``scores`` [n] of dtype SCORE against the base."""
    p_diff = np.exp(-scores["nll"]) - np.exp(-scores["nll_base"])
    square, square_error, _, square_independent = _mean(np.square(p_diff), errors)
    rms = float(np.sqrt(square))
    slope = 0.5 / rms if rms > 0 else 0.0  # of the root
    rms_error = None if square_error is None else slope * square_error
    means = {
        "kld": _mean(scores["kld"], errors),
        "top1": _mean(scores["same_top"], errors),
        # The error of a mean difference is that of the differences: variances less covariance.
        "ln_ppl_ratio": _mean(scores["nll"] - scores["nll_base"], errors),
        "p_diff_mean": _mean(p_diff, errors),
        "p_diff_rms": (rms, rms_error, interval(rms, rms_error), slope * square_independent),
    }
    figures: dict[str, Any] = {
        f"{name}{suffix}": figure
        for name, mean in means.items()
        for suffix, figure in zip(("", "_se", "_ci95", "_se_independent"), mean, strict=True)
    }
    return Divergence(
        **figures,
        kld_max=float(scores["kld"].max()),
        kld_percentiles={f"{q:g}": float(np.percentile(scores["kld"], q)) for q in PERCENTILES},
    )


def difference_of(scores: NDArray[np.void], rival: NDArray[np.void], errors: TextErrors) -> Difference:
    """Positions ``scores`` [n] of dtype SCORE less those of ``rival`` [n], the same tokens."""
    kld, kld_error, kld_bounds, _ = _mean(scores["kld"] - rival["kld"], errors)
    nll, nll_error, nll_bounds, _ = _mean(scores["nll"] - rival["nll"], errors)
    return Difference(
        kld_diff=kld,
        kld_diff_se=kld_error,
        kld_diff_ci95=kld_bounds,
        kld_diff_resolved=_resolved(kld_bounds),
        ln_ppl_diff=nll,
        ln_ppl_diff_se=nll_error,
        ln_ppl_diff_ci95=nll_bounds,
        ln_ppl_diff_resolved=_resolved(nll_bounds),
    )


def _resolved(bounds: Interval | None) -> bool:
    return bounds is not None and not bounds[0] <= 0 <= bounds[1]
