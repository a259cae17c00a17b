"""Contexts with a paged KV cache, and what is read in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kv_context import Context

F16, Q4_0, Q5_0, Q8_0, IQ4_NL = 1, 2, 6, 8, 20
NEAR = 2e-3  # of the largest logit: other sums of the same 8-bit products


def random_tokens(n: int, seed: int = 0) -> list[int]:
    """Of the tiny models' 128."""
    return np.random.default_rng(seed).integers(0, 128, n).tolist()  # type: ignore[no-any-return]


def open_cache(path: Path, kv: str = "paged", **options: object) -> Context:
    """A q8_0 cache with flash attention."""
    values: dict[str, object] = {
        "n_ctx": 512,
        "types": (Q8_0, Q8_0),
        "flash": True,
        "ubatch": 64,
        "batch": 512,
    }
    return Context(path, kv=kv, **(values | options))  # type: ignore[arg-type]


def read(context: Context, tokens: Sequence[int], first: int = 0, sequence: int = 0) -> NDArray[np.float32]:
    """Logits of the last token."""
    for at in range(0, len(tokens), context.batch):
        logits = context.decode(tokens[at : at + context.batch], first + at, sequence)
    return logits


def close(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    """Equal but for other sums."""
    return bool(np.abs(a - b).max() <= NEAR * np.abs(b).max())
