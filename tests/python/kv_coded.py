"""A Llama of one layer with codebooks, and what it computes when positions are coded: numpy's word on a cache
whose old tokens are codes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggml_ext.gguf.added import write_with
from ggml_ext.gguf.source import open_gguf
from ggml_ext.observe.kv_samples import KvReader
from ggml_ext.runtime.llama import Model
from kv_evicted import HEAD, HEADS, KV_HEADS, Floats, OneLayer, rope

WORDS = 256
MARKER = b"GGXC"


class Codebooks:
    """Of one head of K or V: words float16 [HEAD / channels, 256, channels]."""

    def __init__(self, x: Floats, channels: int, random: np.random.Generator) -> None:
        """Words are values of tokens, some of them moved; x: [n_tokens, HEAD]."""
        places = x.reshape(len(x), HEAD // channels, channels)
        chosen = np.stack([places[random.permutation(len(x))[:WORDS], i] for i in range(HEAD // channels)])
        self.words = (chosen + 0.05 * random.standard_normal(chosen.shape)).astype(np.float16)

    def rounded(self, shared: int) -> Floats:
        """The words in 8 bits, with a scale for ``shared`` channels, as docs/kv-cache.md has it."""
        places, _, channels = self.words.shape
        words = self.words.astype(np.float32).reshape(places * channels // shared, -1)
        largest = np.abs(words).max(1, keepdims=True)
        scale = np.maximum(largest / 127, 6e-5).astype(np.float16).astype(np.float32)
        return (np.rint(words / scale) * scale).reshape(self.words.shape).astype(np.float64)


class CodedLayer(OneLayer):
    """OneLayer whose file has codebooks of ``bits`` bits per channel."""

    def __init__(self, bits: int, seed: int = 0) -> None:
        super().__init__(seed)
        self.bits, self.channels = bits, 8 // bits
        random = np.random.default_rng(seed + 1)
        tokens = random.permutation(1024)[:600].tolist()
        of = {"k": self.unturned(tokens), "v": self.values(tokens)}
        self.books = {
            which: [Codebooks(x[:, head], self.channels, random) for head in range(KV_HEADS)]
            for which, x in of.items()
        }

    def unturned(self, tokens: Sequence[int]) -> Floats:
        """Keys before RoPE, [n_tokens, KV_HEADS, HEAD]."""
        return self._heads("k", self.inputs(tokens), KV_HEADS)

    def values(self, tokens: Sequence[int]) -> Floats:
        """[n_tokens, KV_HEADS, HEAD]."""
        return self._heads("v", self.inputs(tokens), KV_HEADS)

    def codebook_tensors(self) -> dict[str, NDArray[np.float16]]:
        """By name, [KV_HEADS, HEAD / channels, 256, channels]."""
        return {
            f"blk.0.attn_{which}.kv_cq{self.bits}": np.stack([book.words for book in books])
            for which, books in self.books.items()
        }

    def write_coded(self, path: Path, **changed: NDArray[np.generic]) -> Path:
        """The file with codebooks; ``changed``: other ones for "k" or "v", an empty one for none."""
        plain = self.write(path.with_suffix(".plain.gguf"))
        tensors: dict[str, NDArray[np.generic]] = {}
        for name, words in self.codebook_tensors().items():
            other = changed.get(name.split("attn_")[1][0], words)
            if other.size:
                tensors[name] = other
        write_with(plain, tensors, path)
        return path

    def decoded(self, which: str, head: int, codes: NDArray[np.uint8]) -> Floats:
        """Of codes [n, HEAD / channels]: [n, HEAD]."""
        words = self.books[which][head].rounded(self.channels if which == "k" else 32)
        return words[np.arange(codes.shape[1]), codes].reshape(len(codes), HEAD)

    def logits_coded(self, tokens: Sequence[int], parts: Parts) -> Floats:
        """Of the last token, whose query sees what is in ``parts`` of each KV head."""
        keys, values = self.keys(tokens), self.values(tokens)
        query = self.queries(tokens)[-1]
        out = []
        for head in range(HEADS):
            group = head * KV_HEADS // HEADS
            coded, rows = parts.coded[group], parts.rows[group]
            old = self.decoded("k", group, parts.k[group])
            turned = rope(old[:, None], np.array(coded, np.int64))[:, 0] if coded else old
            k = np.concatenate([turned, keys[rows, group]])
            v = np.concatenate([self.decoded("v", group, parts.v[group]), values[rows, group]])
            score = k @ query[head] / np.sqrt(HEAD)
            weight = np.exp(score - score.max())
            out.append(weight @ v / weight.sum())
        return self.behind_attention(tokens[-1], np.concatenate(out))


def read_window(path: Path, tokens: Sequence[int], rows: NDArray[np.int64]) -> KvReader:
    reader = KvReader(open_gguf(path), len(tokens), rows)
    n = len(tokens)
    with Model(path, threads=1) as model:
        model.start(n_ctx=n, n_seq=1, n_batch=n, exact=True, observer=(reader.address, 0))
        at = np.arange(n, dtype=np.int32)
        model.decode(np.array(tokens, np.int32), at, 0 * at, at == n - 1)
    if reader.error is not None:
        raise reader.error
    return reader


def exact_codebooks(path: Path, tokens: Sequence[int], rows: NDArray[np.int64], out: Path) -> Path:
    """A copy of a model whose words, of 2 bits, are what 256 or fewer of a text's tokens have: nothing is
    lost of them."""
    reader = read_window(path, tokens, rows)
    tensors: dict[str, NDArray[np.float16]] = {}
    for heads in reader.heads():
        sample = reader.sample(heads)
        for which, x in (("k", sample[..., : heads.k]), ("v", sample[..., heads.k : heads.k + heads.v])):
            places = x.reshape(heads.n, len(rows), -1, 4).swapaxes(1, 2)
            words = places[:, :, np.resize(np.arange(len(rows)), WORDS)]
            tensors[f"blk.{heads.layer}.attn_{which}.kv_cq2"] = words
    write_with(path, tensors, out)
    return out


@dataclass
class Parts:
    """A sequence's state: of each list the positions that are codes, with K's and V's codes, and those that
    are rows."""

    coded: list[list[int]]
    rows: list[list[int]]
    k: list[NDArray[np.uint8]]
    v: list[NDArray[np.uint8]]


def parts_of(state: bytes, channels: int, scored: bool = False, n_lists: int = KV_HEADS) -> Parts:
    """Reads a sequence's state of one layer, docs/kv-cache.md has the format; see kv_evicted.kept for what is
    in front of it."""
    marker = state.index(MARKER)
    counts = [n for n in range(marker // 12) if state[marker - 12 * n - 4 :][:4] == struct.pack("<I", n)]
    n_cells = counts[-1]
    cells = [struct.unpack_from("<i", state, marker - 12 * (n_cells - i))[0] for i in range(n_cells)]
    at = marker + len(MARKER)
    assert struct.unpack_from("<I", state, at) == (channels,)
    at += 12
    codes = HEAD // channels
    parts = Parts([], [], [], [])
    for part, size in ((parts.coded, codes), (parts.rows, HEAD // 32 * 34)):
        for _ in range(n_lists):
            (n,) = struct.unpack_from("<I", state, at)
            part.append([cells[i] for i in struct.unpack_from(f"<{n}I", state, at + 4)])
            at += 4 + 4 * n
        for rows in (parts.k, parts.v):
            type_, row = struct.unpack_from("<iQ", state, at)
            assert (type_, row) == (-1 if part is parts.coded else 8, size)
            at += 12
            for positions in part:
                if part is parts.coded:
                    flat = np.frombuffer(state, np.uint8, len(positions) * size, at)
                    rows.append(flat.reshape(len(positions), size))
                at += len(positions) * size
        at += sum(4 * len(positions) for positions in part) if scored else 0
    assert not any(state[at:])  # counts of other streams' cells
    return parts
