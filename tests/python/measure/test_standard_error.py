"""Errors of means over a text: simulated texts whose tokens, windows and topics are correlated.

Each process has a known mean; the printed interval must hold it in 90 to 98 % of the texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from ggml_ext.measure import standard_error
from ggml_ext.measure.standard_error import NORMAL, TextErrors, independent_error

CTX, ROWS = 512, 255
LENGTHS = (8, 27, 100)
TEXTS = 500
STEP = 16
"""Tokens for which a drift stands still."""

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Cut:
    """Where the scored tokens of a text lie: ``rows`` before the last token of every window."""

    windows: int
    rows: int = ROWS
    ctx: int = CTX

    def positions(self) -> NDArray[np.int64]:
        begins = np.arange(self.windows)[:, None] * self.ctx + self.ctx - 1 - self.rows
        return (begins + np.arange(self.rows)).ravel()

    def errors(self) -> TextErrors:
        return TextErrors(self.windows, self.rows, self.ctx)


def drift(random: np.random.Generator, cut: Cut, length: float) -> F32:
    """[scored tokens, TEXTS], normal, whose correlation falls as exp(-distance / length)."""
    decay = np.float32(math.exp(-STEP / length))
    out = random.standard_normal((-(-cut.windows * cut.ctx // STEP), TEXTS), np.float32)
    out[1:] *= np.float32(math.sqrt(1 - decay**2))
    for i in range(1, len(out)):
        out[i] += decay * out[i - 1]
    return out[cut.positions() // STEP]


def topics(random: np.random.Generator, cut: Cut, length: float) -> F32:
    """[scored tokens, TEXTS], normal, constant for topics of random lengths whose mean is ``length``."""
    out = random.standard_normal((-(-cut.windows * cut.ctx // STEP), TEXTS), np.float32)
    for i in range(1, len(out)):
        out[i] = np.where(random.random(TEXTS, np.float32) < STEP / length, out[i], out[i - 1])
    return out[cut.positions() // STEP]


def noise(random: np.random.Generator, cut: Cut) -> F32:
    """[scored tokens, TEXTS], normal, all independent."""
    return random.standard_normal((cut.windows * cut.rows, TEXTS), np.float32)


def within_windows(random: np.random.Generator, cut: Cut) -> F32:
    return drift(random, cut, 100)


def across_windows(random: np.random.Generator, cut: Cut) -> F32:
    return drift(random, cut, 1000)


def perplexity_like(random: np.random.Generator, cut: Cut) -> F32:
    """Independent tokens on a slow drift of 3 % of the variance, as negative log-likelihoods have it."""
    slow = np.float32(math.sqrt(0.03)) * drift(random, cut, 800)
    return slow + np.float32(math.sqrt(0.97)) * noise(random, cut)


def slow_topics(random: np.random.Generator, cut: Cut) -> F32:
    return topics(random, cut, 800) + noise(random, cut)


def divergence_like(random: np.random.Generator, cut: Cut) -> F32:
    """Positive, mean 1, heavy tails: log-normal tokens (skewness 33) times a log-normal drift."""
    slow = np.float32(0.6) * drift(random, cut, 400)
    return np.exp(slow + np.float32(1.5) * noise(random, cut) - np.float32(0.6**2 / 2 + 1.5**2 / 2))


def student_tails(random: np.random.Generator, cut: Cut) -> F32:
    """Student-t(3) tokens, whose fourth moment is infinite, on a drift."""
    heavy = noise(random, cut)
    heavy /= np.sqrt(random.standard_gamma(1.5, heavy.shape, np.float32) / np.float32(1.5))
    return 3 * heavy + drift(random, cut, 300)


PROCESSES = (
    noise,
    within_windows,
    across_windows,
    perplexity_like,
    slow_topics,
    divergence_like,
    student_tails,
)


def coverage(text: F32, cut: Cut, truth: float) -> float:
    """Share of the texts [tokens, TEXTS] whose interval holds the true mean; the first tokens are used."""
    values = np.ascontiguousarray(text[: cut.windows * cut.rows].T)
    away = np.abs(values.mean(axis=-1, dtype=np.float64) - truth)
    return float(np.mean(away < NORMAL * cut.errors().errors(values)))


@pytest.mark.parametrize("process", PROCESSES)
def test_intervals_cover_the_truth(process: Callable[[np.random.Generator, Cut], F32]) -> None:
    """90 to 98 % of 500 texts at a nominal 95 %. What would break it: tokens or windows taken for independent
    (3 and 64 % with 8 windows of ``across_windows``), or normal instead of Student quantiles."""
    text = process(np.random.default_rng(5), Cut(LENGTHS[-1]))
    truth = 1.0 if process is divergence_like else 0.0
    found = {windows: coverage(text, Cut(windows), truth) for windows in LENGTHS}
    print(f"{process.__name__}: {found}")
    assert all(0.90 <= share <= 0.98 for share in found.values()), found


@pytest.mark.parametrize(
    "cut", [Cut(64, 63, 128), Cut(8, 1023, 2048), Cut(2, 4095, 8192), Cut(1, 8191, 16384)]
)
def test_short_and_long_windows(cut: Cut) -> None:
    """The length of the text decides, not how it is cut: one long window tells an error too."""
    text = across_windows(np.random.default_rng(6), cut)
    assert 0.90 <= coverage(text, cut, 0.0) <= 0.98


def test_what_independent_tokens_would_say() -> None:
    """llama-perplexity's error on a correlated text is several times too small."""
    cut = Cut(27)
    values = perplexity_like(np.random.default_rng(7), cut).T
    theirs = np.array([independent_error(text) for text in values])
    assert cut.errors().errors(values).mean() / theirs.mean() > 2
    assert (np.abs(values.mean(axis=-1)) < NORMAL * theirs).mean() < 0.7


def test_a_pair_is_known_better_than_its_parts() -> None:
    """Two models scored on the same tokens: the difference has its own error, and that one is right."""
    random, cut = np.random.default_rng(8), Cut(27)
    common = divergence_like(random, cut)
    other = common * (np.float32(1.1) + np.float32(0.03) * noise(random, cut))
    errors, difference = cut.errors(), (other - common).T
    held = np.abs(difference.mean(axis=-1, dtype=np.float64) - 0.1) < NORMAL * errors.errors(difference)
    assert 0.90 <= held.mean() <= 0.98
    assert errors.errors(difference).mean() < 0.2 * errors.errors(common.T).mean()


def test_the_error_of_independent_tokens_is_found() -> None:
    """Without correlation the error is that of independent tokens times t / 1.96, about."""
    cut = Cut(100)
    values = noise(np.random.default_rng(9), cut).T
    errors = cut.errors()
    assert errors.df == 6
    mean_square = np.square(errors.errors(values)).mean() * values.shape[1]
    assert math.sqrt(mean_square) == pytest.approx(stats.t.ppf(0.975, 6) / NORMAL, rel=0.05)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 9, 30, 101])
def test_quantiles_of_student(df: int) -> None:
    assert standard_error.student_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-9)


def test_a_text_of_one_window_tells_no_error() -> None:
    errors = TextErrors(1, ROWS, CTX)
    assert errors.df == 0
    assert errors.error(np.ones(ROWS)) is None
    assert standard_error.interval(1.0, None) is None


def test_a_shift_and_a_scale_carry_over() -> None:
    values = np.random.default_rng(10).standard_normal(8 * ROWS)
    errors = TextErrors(8, ROWS, CTX)
    error = errors.error(values)
    assert error is not None
    assert errors.error(3 * values + 1000) == pytest.approx(3 * error, rel=1e-9)
