"""Codebooks of a KV cache: 256 words for each group of adjacent channels of a head, which share a byte
(coupled quantisation, arXiv 2405.03917).

Words are what weighted k-means (Lloyd) finds among a text's keys before RoPE and values (kv_samples.py). The
weights matter: on SmolLM2-135M, K at 2 bits, the KL divergence is 0.036 without them and 0.028 with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.cpus import threads_or_cores
from ggml_ext.core.errors import GgmlExtError, Warn
from ggml_ext.core.progress import Advance, size_text, track
from ggml_ext.gguf.inspect import bits_text
from ggml_ext.gguf.source import Source, open_gguf
from ggml_ext.observe.kv_samples import BEHIND, SINKS, Half, Heads, KvReader, SampleFile
from ggml_ext.observe.nodes import reading_of
from ggml_ext.observe.samples import read_text, windows
from ggml_ext.runtime.llama import Model
from ggml_ext.runtime.native import nearest_words

WORDS = 256
CHANNELS = {2: 4, 1: 8}
"""That share a byte, by bits per channel."""

BITS = tuple(CHANNELS)

_ROUNDS = 10
_MOST_TOKENS = 32768  # of a head
_HELD_OUT = 8  # every so many windows one

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Codebook:
    """Of K or V of a layer at some bits: ``words`` float16 [n_head_kv, d / c, 256, c]. ``error``: squared, of
    the windows held out, weighted and relative to their squares, a mean over heads."""

    words: Half
    error: float


@dataclass(frozen=True)
class Codebooks:
    """By layer, "k" or "v", and bits. ``heads``: of all layers. ``tokens``: of each head, fitted to."""

    layers: dict[tuple[int, str, int], Codebook]
    heads: int
    tokens: int

    def tensors(self) -> dict[str, Half]:
        """As docs/gguf.md has them."""
        return {
            f"blk.{layer}.attn_{which}.kv_cq{bits}": book.words
            for (layer, which, bits), book in self.layers.items()
        }

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(book.words.nbytes for book in self.layers.values())

    def errors(self) -> dict[int, dict[str, float]]:
        """Mean over layers by bits, then "k" or "v"."""
        found: dict[int, dict[str, list[float]]] = {}
        for (_, which, bits), book in self.layers.items():
            found.setdefault(bits, {}).setdefault(which, []).append(book.error)
        return {
            bits: {which: float(np.mean(errors)) for which, errors in both.items()}
            for bits, both in found.items()
        }

    def summary(self) -> str:
        """One line for the end of a command."""
        errors = self.errors()
        of_bits = "; ".join(
            f"K {of['k']:.3f} and V {of['v']:.3f} at {bits_text([bits])}" for bits, of in errors.items()
        )
        return (
            f"codebooks of {self.heads} heads, {bits_text(list(errors))}, {size_text(self.bytes)}, fitted to "
            f"{self.tokens} tokens; relative squared error in windows held out: {of_bits}"
        )


def fit(
    model: Path,
    text: Path,
    state: Path,
    *,
    bits: Sequence[int],
    samples: int,
    ctx: int,
    seed: int,
    threads: int | None,
    warn: Warn,
) -> Codebooks:
    """Fits codebooks of these ``bits`` per channel, 2 or 1, for every layer with keys and values of its own,
    to at most ``samples`` windows of ``ctx`` tokens of the text. ``state``: a file of the samples;
    interrupted, the same call goes on from there.

    ``state`` takes 2 (d_k + d_v + 1) bytes for each KV head and each of at most 32768 tokens, and an eighth
    more. Raises GgmlExtError for windows that are too few or too short, a ``state`` of another fit, latent
    attention, RoPE that cannot be undone, and a graph that does not show keys and values.
    """
    if ctx <= SINKS + BEHIND:
        raise GgmlExtError(
            f"windows of {ctx} tokens: no query is {BEHIND} tokens behind another; give a larger --ctx"
        )
    source = open_gguf(model)
    if f"{source.arch}.attention.kv_lora_rank" in source.keys:
        raise GgmlExtError(f"{model}: latent attention has no heads of keys; codebooks need another model")
    content = read_text(text)
    cut = windows(model, text, ctx=ctx, samples=samples, seed=seed, warn=warn, content=content)
    if len(cut) < 2:
        raise GgmlExtError(f"{text}: {len(cut)} window of {ctx} tokens; codebooks need two or more")
    fitted, held_out = _shares(len(cut))
    rows = SINKS + _rows(ctx - BEHIND - SINKS, _MOST_TOKENS // len(fitted))
    kept = SampleFile(state, reading_of(source, cut), len(rows))
    try:
        _read(source, cut, kept, KvReader(source, ctx, rows), threads)
        _name_missing(source, kept.layers, warn)
        places = sum(h.n * (h.k + h.v) // CHANNELS[b] for h in kept.layers for b in bits)
        with (
            ThreadPoolExecutor(threads_or_cores(threads)) as pool,
            track(places, "fitting", "codebooks") as advance,
        ):
            fit_ = _Fit(kept, fitted, held_out, bits, seed, pool, advance)
            found = {key: book for heads in kept.layers for key, book in fit_.layer(heads)}
    except KeyboardInterrupt:
        warn(f"{state}: {kept.windows} of {len(cut)} windows are done; the same command goes on there")
        raise
    return Codebooks(found, sum(heads.n for heads in kept.layers), len(fitted) * len(rows))


def _shares(n: int) -> tuple[list[int], list[int]]:
    """Numbers of the windows that words are fitted to, and of those held out."""
    held_out = [index for index in range(n) if index % _HELD_OUT == _HELD_OUT - 1] or [n - 1]
    return [index for index in range(n) if index not in held_out], held_out


def _rows(n: int, most: int) -> NDArray[np.int64]:
    """At most ``most`` of n tokens, evenly spaced."""
    count = max(1, min(n, most))
    return np.arange(count, dtype=np.int64) * n // count


def _read(
    source: Source, cut: NDArray[np.int64], kept: SampleFile, reader: KvReader, threads: int | None
) -> None:
    """The windows that ``kept`` has not yet. Raises GgmlExtError where they show nothing."""
    ctx = cut.shape[1]
    positions, sequences = np.arange(ctx, dtype=np.int32), np.zeros(ctx, np.int32)
    with Model(source.path, threads=threads) as loaded, track(len(cut), "reading", "windows") as advance:
        loaded.start(n_ctx=ctx, n_seq=1, n_batch=ctx, exact=True, observer=(reader.address, 0))
        advance(kept.windows)
        while kept.windows < len(cut):
            reader.clear()
            loaded.clear()
            loaded.decode(cut[kept.windows].astype(np.int32), positions, sequences, positions == ctx - 1)
            if reader.error is not None:
                raise reader.error
            if not reader.heads():
                raise GgmlExtError(
                    f"{source.path}: the graph of {source.arch} shows no keys and values (Kcur, Vcur, "
                    "kq_soft_max) in heads of a multiple of 32 channels; use a quantised cache, -ctk q8_0"
                )
            kept.add(reader)
            advance(1)


def _name_missing(source: Source, layers: list[Heads], warn: Warn) -> None:
    missing = sorted(set(range(source.n_blocks)) - {heads.layer for heads in layers})
    if missing:
        warn(
            f"{source.path}: no codebooks of layers {', '.join(map(str, missing))}: the graph shows no keys "
            "and values of their own in heads of a multiple of 32 channels"
        )


@dataclass(frozen=True)
class _Fit:
    kept: SampleFile
    fitted: list[int]
    held_out: list[int]
    bits: Sequence[int]
    seed: int
    pool: ThreadPoolExecutor
    advance: Advance

    def layer(self, heads: Heads) -> Iterator[tuple[tuple[int, str, int], Codebook]]:
        found: dict[tuple[str, int], list[tuple[Half, float]]] = {}
        for number in range(heads.n):
            fitted, held_out = (
                self.kept.head(heads, number, share) for share in (self.fitted, self.held_out)
            )
            for which in ("k", "v"):
                for bits in self.bits:
                    words = self._words(
                        getattr(fitted, which),
                        fitted.weight,
                        CHANNELS[bits],
                        (self.seed, heads.layer, number, "kv".index(which), bits),
                    )
                    error = relative_error(getattr(held_out, which), held_out.weight, words)
                    found.setdefault((which, bits), []).append((words, error))
        for (which, bits), of_heads in found.items():
            error = float(np.mean([error for _, error in of_heads]))
            yield (heads.layer, which, bits), Codebook(np.stack([words for words, _ in of_heads]), error)

    def _words(self, x: Half, weight: Floats, channels: int, seed: tuple[int, ...]) -> Half:
        """[d / channels, 256, channels] of a head's x [tokens, d]."""

        def place(index: int) -> Floats:
            part = x[:, index * channels : (index + 1) * channels].astype(np.float32, order="C")
            return lloyd(part, weight, np.random.default_rng((*seed, index)))

        futures = [self.pool.submit(place, index) for index in range(x.shape[1] // channels)]
        words = []
        try:
            for future in futures:
                words.append(future.result())
                self.advance(1)
        except BaseException:
            self.pool.shutdown(wait=False, cancel_futures=True)
            raise
        return np.stack(words).astype(np.float16)


def lloyd(x: Floats, weight: Floats, random: np.random.Generator, rounds: int = _ROUNDS) -> Floats:
    """256 words [256, c] of x [tokens, c], by k-means with positive weights [tokens].

    They begin as different tokens, drawn in proportion to their weights, again from the first where there are
    fewer; a word that is nearest to none becomes one of the tokens with the largest error.
    """
    drawn = np.argsort(random.standard_exponential(len(x)) / weight, kind="stable")[:WORDS]
    words = np.resize(x[drawn], (WORDS, x.shape[1]))
    weighted = (x * weight[:, None]).T.astype(np.float64)
    for _ in range(rounds):
        codes = nearest_words(x, words)
        mass = np.bincount(codes, weight, WORDS)
        used = mass > 0
        for channel, values in enumerate(weighted):
            words[used, channel] = np.bincount(codes, values, WORDS)[used] / mass[used]
        empty = np.flatnonzero(~used)
        if len(empty):
            errors = weight * np.square(x - words[codes]).sum(1)
            worst = np.argsort(-errors, kind="stable")[: len(empty)]
            worst = worst[errors[worst] > 0]
            words[empty[: len(worst)]] = x[worst]
    return words


def relative_error(x: Half, weight: Floats, words: Half) -> float:
    """Of x [tokens, d], coded with words [d / c, 256, c]: squared, weighted, relative to its squares."""
    true, (_, _, channels) = x.astype(np.float32), words.shape
    squared = 0.0
    for index, book in enumerate(words.astype(np.float32)):
        part = np.ascontiguousarray(true[:, index * channels : (index + 1) * channels])
        coded = book[nearest_words(part, book)]
        squared += float((weight * np.square(part - coded).sum(1)).sum(dtype=np.float64))
    total = float((weight * np.square(true).sum(1)).sum(dtype=np.float64))
    return squared / total if total else 0.0
