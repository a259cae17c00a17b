"""What is measured: vocabularies, logits, batches and chains."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

VOCABULARIES = {"32k": 32000, "128k": 128256, "152k": 151936, "256k": 256000}
"""Of Llama 2, Llama 3, Qwen 2 and Gemma."""

LOGITS = ("flat", "peaked")
BATCHES = (1, 32)
ROUNDS, QUICK_ROUNDS = 7, 3

_OFF: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "temperature": 0.8}

CHAINS: dict[str, dict[str, Any]] = {
    "defaults": {**_OFF, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    "top-k 40": {**_OFF, "top_k": 40},
    "top-p 0.95": {**_OFF, "top_p": 0.95},
    "min-p 0.05": {**_OFF, "min_p": 0.05},
    "typical 0.95": {**_OFF, "typical_p": 0.95},
    "top-p, min-p, typical": {**_OFF, "top_p": 0.95, "min_p": 0.05, "typical_p": 0.95},
    "temperature 0.8": _OFF,
    "temperature 0": {**_OFF, "temperature": 0.0},
}
"""Parameters of ggml_ext.runtime.sampling.fused; what is not named is off, the temperature 0.8."""


@dataclass(frozen=True)
class Case:
    """One row of the table: names of VOCABULARIES, LOGITS and CHAINS, and a batch."""

    vocabulary: str
    logits: str
    batch: int
    chain: str

    def __str__(self) -> str:
        return f"{self.vocabulary}, {self.logits}, batch {self.batch}, {self.chain}"


def cases(*, quick: bool) -> list[Case]:
    """All cases; quick: two vocabularies and three chains of one token."""
    vocabularies = ("32k", "152k") if quick else tuple(VOCABULARIES)
    batches = (1,) if quick else BATCHES
    chains = ("defaults", "top-p 0.95", "temperature 0.8") if quick else tuple(CHAINS)
    return [Case(*found) for found in itertools.product(vocabularies, LOGITS, batches, chains)]


def make_logits(kind: str, n_vocab: int, rows: int) -> NDArray[np.float32]:
    """Logits [rows, n_vocab], the same in every run.

    flat: standard normal, so that top-p 0.95 keeps most of the vocabulary. peaked: in random order,
    probabilities that fall with the square of the rank, so that it keeps a dozen tokens.
    """
    random = np.random.default_rng(1)
    values = random.standard_normal((rows, n_vocab), np.float32)
    if kind == "peaked":
        order = np.argsort(values, axis=1)
        ranks = np.arange(1, n_vocab + 1, dtype=np.float32)
        np.put_along_axis(values, order, np.broadcast_to(-2 * np.log(ranks), values.shape), axis=1)
    return values
