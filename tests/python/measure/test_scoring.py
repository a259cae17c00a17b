"""Scores of tokens from logits: of distributions that are known, and in little memory."""

from __future__ import annotations

import tracemalloc

import numpy as np

from ggml_ext.measure import scoring


def test_score_of_known_distributions() -> None:
    base = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32)) + 7
    model = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]], np.float32)) - 3
    scores = scoring.score(model, np.array([1, 2], np.int32), lambda start, stop: base[start:stop])
    np.testing.assert_allclose(scores["nll"], -np.log([0.5, 0.1]), rtol=1e-6)
    np.testing.assert_allclose(scores["nll_base"], -np.log([0.25, 0.1]), rtol=1e-6)
    np.testing.assert_allclose(scores["kld"], [0.25 * np.log(2), 0.0], atol=1e-7)
    assert scores["same_top"].tolist() == [False, True]


def test_scoring_a_large_vocabulary_takes_little_memory() -> None:
    vocabulary, rows = 152_000, 96
    logits = np.random.default_rng(0).standard_normal((rows, vocabulary), np.float32)
    targets = np.zeros(rows, np.int32)
    tracemalloc.start()
    try:
        scoring.score(logits, targets, lambda start, stop: logits[start:stop].copy())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6
