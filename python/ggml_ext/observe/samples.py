"""A calibration text and the parts of it that a model is calibrated on."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core import paths
from ggml_ext.core.errors import GgmlExtError, Warn
from ggml_ext.core.files import read_text_bytes
from ggml_ext.runtime.llama import Model

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


DEFAULT_TEXT = paths.PACKAGE / "texts" / "ggml-ext-default.txt"
"""What calibration reads where nobody says what: English prose and some C, in the public domain."""


def text_or_default(text: Path | None, warn: Warn) -> Path:
    """The text itself, or the package's, said in a line."""
    if text is None:
        warn(
            f"no --calibration: using the package's own text {DEFAULT_TEXT.name}, English prose and some C; "
            "give one of the kind that the model will meet"
        )
    return text or DEFAULT_TEXT


def read_text(text: Path) -> bytes:
    """The bytes of a calibration text. Raises GgmlExtError if it cannot be read or is empty."""
    try:
        content = read_text_bytes(text)
    except OSError as exc:
        raise GgmlExtError(f"{text}: {exc.strerror}; check the path of the calibration text") from exc
    if not content.strip():
        raise GgmlExtError(f"{text}: empty; calibration needs a text of the kind the model will meet")
    return content


def windows(
    model: Path,
    text: Path,
    *,
    ctx: int,
    samples: int,
    seed: int,
    warn: Warn,
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
    content = read_text(text) if content is None else content
    tokens, bos = _tokens(model, text, content, ctx, parse_special)
    n = min(samples, len(tokens) // ctx)
    if n < samples:
        warn(f"{text}: {len(tokens)} tokens give {n} windows of {ctx} tokens, not {samples}")
    random = np.random.default_rng(seed)
    edges = np.linspace(0, len(tokens), n + 1).astype(np.int64)
    starts = [int(random.integers(low, high - ctx + 1)) for low, high in pairwise(edges)]
    return _cut(tokens, starts, ctx, bos)


def consecutive(
    model: Path, text: Path, *, ctx: int, content: bytes, parse_special: bool
) -> NDArray[np.int64]:
    """All windows int64 [n, ctx] of the text from its start on, as llama-imatrix reads it: a line end at its
    very end is no part of it, and BOS takes the place of each window's first token. Otherwise as windows."""
    tokens, bos = _tokens(model, text, content.removesuffix(b"\n"), ctx, parse_special)
    return _cut(tokens, range(0, len(tokens) - ctx + 1, ctx), ctx, bos)


def _tokens(
    model: Path, text: Path, content: bytes, ctx: int, parse_special: bool
) -> tuple[NDArray[np.int32], int | None]:
    """The text's tokens, enough for a window, and BOS if the model wants one."""
    with Model(model, weights=False) as loaded:
        loaded.check_ctx(ctx)
        tokens, bos = loaded.tokenize(content, special=parse_special), loaded.bos
    if len(tokens) < ctx:
        raise GgmlExtError(
            f"{text}: only {len(tokens)} tokens, and a window needs {ctx}; "
            "give a longer text or a smaller --ctx"
        )
    return tokens, bos


def _cut(tokens: NDArray[np.int32], starts: Iterable[int], ctx: int, bos: int | None) -> NDArray[np.int64]:
    cut = np.stack([tokens[start : start + ctx] for start in starts]).astype(np.int64)
    if bos is not None:
        cut[:, 0] = bos
    return cut
