"""What codebooks of a KV cache are fitted to, and the fit.

numpy says what keys before RoPE, values and weights are, and what a fit may not do. What would break these:
keys of another pairing or position, a head taken for another, queries that are not far enough behind.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.observe.kv_codebook import lloyd, relative_error
from ggml_ext.observe.kv_samples import Heads
from ggml_ext.runtime.native import nearest_words
from ggml_ext.runtime.rope import Rope
from kv_coded import read_window
from kv_evicted import HEAD, HEADS, KV_HEADS, OneLayer, different_tokens
from rewritten import Arrays, rewritten

LAYER = OneLayer()
NORM = np.random.default_rng(5).uniform(0.5, 1.5, HEAD).astype(np.float32)
CTX = 256
TOKENS = CTX - 129
"""Of a window, that queries 128 tokens behind and more look at."""


NORMS = {"blk.0.attn_q_norm.weight": np.ones(HEAD, np.float32), "blk.0.attn_k_norm.weight": NORM}
"""Qwen3's, of each head's queries and keys before RoPE."""


def _one_matrix() -> Arrays:
    """Q, K and V of one product, whose rows the graph's V is a view of."""
    parts = {f"blk.0.attn_{which}.weight": LAYER.tensors[f"blk.0.attn_{which}"] for which in "qkv"}
    return {
        "blk.0.attn_qkv.weight": np.concatenate(list(parts.values())),
        **dict.fromkeys(parts, np.empty(0)),
    }


YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
    "rope.freq_base": 1e6,
}


@pytest.mark.parametrize(
    "of", ["adjacent pairs", "one matrix", "pairs half a head apart", "YaRN, half a head"]
)
def test_keys_are_those_before_rope(tmp_path: Path, of: str) -> None:
    path, normed = LAYER.write(tmp_path / "llama.gguf"), False
    if of == "one matrix":
        path = rewritten(path, tmp_path / "m.gguf", "llama", {}, _one_matrix())
    elif of != "adjacent pairs":
        keys = YARN if "YaRN" in of else {}
        path, normed = rewritten(path, tmp_path / "m.gguf", "qwen3", keys, NORMS), True
    tokens, rows = different_tokens(CTX), np.array([0, 1, 50, 126])
    reader = read_window(path, tokens, rows)
    assert reader.heads() == [Heads(0, KV_HEADS, HEAD, HEAD)]
    rope = reader._ropes[0]
    assert rope.adjacent != normed
    assert (len(rope.frequencies), rope.length > 1) == (16, "YaRN" in of)
    found = reader.sample(reader.heads()[0]).astype(np.float64)
    x = LAYER.inputs(tokens)[rows]
    k, v = ((x @ LAYER.tensors[f"blk.0.attn_{which}"].T).reshape(len(rows), KV_HEADS, HEAD) for which in "kv")
    if normed:
        k = k / np.sqrt(np.square(k).mean(2, keepdims=True) + 1e-5) * NORM
    assert np.allclose(found[..., :HEAD].swapaxes(0, 1), k, rtol=2e-3, atol=2e-3)
    assert np.allclose(found[..., HEAD : 2 * HEAD].swapaxes(0, 1), v, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("adjacent", [True, False])
def test_channels_that_are_not_turned(adjacent: bool) -> None:
    random = np.random.default_rng(1)
    before, positions = random.standard_normal((6, 2, 32)), np.array([0, 1, 2, 500, 4095, 100000])
    frequencies = random.uniform(0, 1, 4)
    order = np.arange(8).reshape(4, 2) if adjacent else np.arange(8).reshape(2, 4).T
    turned = before.copy()
    pairs = (before[..., order[:, 0]] + 1j * before[..., order[:, 1]]) * 1.5
    pairs *= np.exp(1j * positions[:, None] * frequencies)[:, None]
    turned[..., order[:, 0]], turned[..., order[:, 1]] = pairs.real, pairs.imag
    undone = Rope(frequencies, adjacent, 1.5).undo(turned.astype(np.float32), positions)
    assert np.allclose(undone, before, atol=1e-6)
    none = Rope(np.empty(0), adjacent, 1.0).undo(turned.astype(np.float32), positions)
    assert np.array_equal(none, turned.astype(np.float32))


def test_tokens_weigh_what_later_queries_give_them(tmp_path: Path) -> None:
    tokens, rows = different_tokens(CTX), np.arange(TOKENS)
    reader = read_window(LAYER.write(tmp_path / "m.gguf"), tokens, rows)
    seen = LAYER.probabilities(tokens).reshape(KV_HEADS, HEADS // KV_HEADS, CTX, CTX).sum(1)
    found = reader.sample(reader.heads()[0])[..., -1]
    for head in range(KV_HEADS):
        mean = np.array([seen[head, t + 129 :, t].mean() for t in range(TOKENS)])
        assert np.allclose(found[head], mean / mean[16:].mean() + 0.02, rtol=5e-3)


@pytest.mark.parametrize("channels", [4, 8])
def test_nearest_words(channels: int) -> None:
    random = np.random.default_rng(channels)
    x, words = (random.standard_normal((n, channels)).astype(np.float32) for n in (1000, 256))
    words[200] = words[7]
    x[:10] = words[:10]
    distances = np.square(x[:, None].astype(np.float64) - words).sum(2)
    codes = nearest_words(x, words)
    assert codes[:10].tolist() == list(range(10))
    assert np.allclose(distances[np.arange(1000), codes], distances.min(1), atol=1e-5)


def _error(x: NDArray[np.float32], weight: NDArray[np.float32], words: NDArray[np.float32]) -> float:
    distances = np.square(x[:, None].astype(np.float64) - words).sum(2)
    return float((weight * distances.min(1)).sum())


@pytest.mark.parametrize("channels", [4, 8])
def test_no_round_of_lloyd_adds_error(channels: int) -> None:
    """Also where one token's weight draws most words, which are re-seeded."""
    random = np.random.default_rng(channels)
    x = random.standard_normal((3000, channels)).astype(np.float32)
    weight = random.exponential(size=3000).astype(np.float32) + np.float32(0.02)
    x[:400], weight[:400] = x[0], 1000
    errors = [
        _error(x, weight, lloyd(x, weight, np.random.default_rng(1), rounds))
        for rounds in (0, 1, 2, 3, 6, 10)
    ]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < 0.6 * errors[0]
    plain = lloyd(x, np.ones_like(weight), np.random.default_rng(1))
    assert errors[-1] < _error(x, weight, plain)


def test_few_vectors_are_words_themselves() -> None:
    random = np.random.default_rng(2)
    few = random.standard_normal((200, 4)).astype(np.float32)
    x = few[random.permutation(1000) % 200]
    words = lloyd(x, np.ones(1000, np.float32), np.random.default_rng(1))
    assert _error(x, np.ones(1000, np.float32), words) < 1e-8
    one = lloyd(x[:1], np.ones(1, np.float32), np.random.default_rng(1))
    assert np.array_equal(one, np.repeat(x[:1], 256, 0))


def test_relative_error() -> None:
    random = np.random.default_rng(3)
    x, words = random.standard_normal((50, 32)).astype(np.float16), random.standard_normal((8, 256, 4))
    weight = random.exponential(size=50).astype(np.float32)
    books = words.astype(np.float16)
    parts = x.astype(np.float32).reshape(50, 8, 4)
    squared = sum(_error(parts[:, g], weight, books[g].astype(np.float32)) for g in range(8))
    total = (weight[:, None] * x.astype(np.float64) ** 2).sum()
    assert relative_error(x, weight, books) == pytest.approx(squared / total, rel=1e-4)
    assert relative_error(np.zeros_like(x), weight, books) == 0


def test_a_form_of_rope_that_cannot_be_undone(tmp_path: Path) -> None:
    sections = rewritten(
        LAYER.write(tmp_path / "one.gguf"),
        tmp_path / "s.gguf",
        "qwen3vl",
        {"rope.dimension_sections": [4, 6, 6, 0]},
        NORMS,
    )
    with pytest.raises(GgmlExtError, match="keys of layer 0: a form of RoPE that cannot be undone"):
        read_window(sections, different_tokens(CTX), np.arange(4))
