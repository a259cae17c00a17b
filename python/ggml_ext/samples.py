"""The parts of a calibration text that a model is calibrated on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggml_ext.errors import GgmlExtError
from ggml_ext.llama import Model

FEWEST_WINDOWS = 128
TOKENS_PER_CHANNEL = 8
"""Of the widest matrix, where nobody says how many windows to take; docs/rounding.md has the figures."""

_FEW_PER_CHANNEL = 4.0  # fewer are worth a remark


def enough(ctx: int, widest: int) -> int:
    """Windows of ``ctx`` tokens that calibrate matrices of up to ``widest`` channels."""
    return max(FEWEST_WINDOWS, -(-TOKENS_PER_CHANNEL * widest // ctx))


def few_tokens(n_tokens: int, ctx: int, widest: int) -> str | None:
    """A remark where ``n_tokens`` are few for matrices of ``widest`` channels, None where they are not."""
    per_channel = n_tokens / widest
    if per_channel >= _FEW_PER_CHANNEL:
        return None
    return (
        f"only {per_channel:.2g} calibration tokens per channel of the widest matrix ({widest} channels), so "
        f"rounding relies on little more than importances; a longer text and --samples {enough(ctx, widest)} "
        f"give {TOKENS_PER_CHANNEL} or more"
    )


def windows(
    model: Path,
    text: Path,
    *,
    ctx: int,
    samples: int,
    seed: int,
    warn: Callable[[str], None],
    content: bytes | None = None,
    parse_special: bool = False,
) -> NDArray[np.int64]:
    """Token windows int64 [n, ctx] of the text, n at most ``samples``, spread evenly over it.

    model: a GGUF file; its tokenizer is llama.cpp's, as at run time. warn: told when the text gives fewer.
    content: the text's bytes if they have been read, since a pipe can be read once. parse_special: spellings
    of control tokens in it, as in chats, are these tokens.

    The text's tokens are cut into n equal parts and a window is drawn within each, so windows do not overlap.
    BOS stands at the start of each where the model wants one, as in llama-perplexity and in chat. Raises
    GgmlExtError for a text shorter than one window.
    """
    with Model(model, weights=False) as loaded:
        loaded.check_ctx(ctx)
        content = text.read_bytes() if content is None else content
        tokens = loaded.tokenize(content, special=parse_special)
        bos = loaded.bos
    n = min(samples, len(tokens) // ctx)
    if n == 0:
        raise GgmlExtError(
            f"{text}: only {len(tokens)} tokens, and a window needs {ctx}; "
            "give a longer text or a smaller --ctx"
        )
    if n < samples:
        warn(f"{text}: {len(tokens)} tokens give {n} windows of {ctx} tokens, not {samples}")
    random = np.random.default_rng(seed)
    edges = np.linspace(0, len(tokens), n + 1).astype(np.int64)
    starts = [int(random.integers(low, high - ctx + 1)) for low, high in pairwise(edges)]
    cut = np.stack([tokens[start : start + ctx] for start in starts]).astype(np.int64)
    if bos is not None:
        cut[:, 0] = bos
    return cut
