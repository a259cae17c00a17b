"""A Llama of one layer and what it computes when each KV head sees positions of its own: numpy's word on a
cache that evicts. K and V of one layer do not depend on what was evicted before."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from kv_context import Context
from kv_paged import read

WIDTH, FFN, HEADS, KV_HEADS, HEAD, VOCABULARY = 64, 96, 4, 2, 32, 1024
_EPSILON, _BASE = 1e-5, 10000.0
_MARKER = b"GGXE"
_RANDOM = 2  # the policy without scores
SLOTS = 64

Floats = NDArray[np.float64]


def _norm(x: Floats, weight: Floats) -> Floats:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + _EPSILON) * weight


def rope(x: Floats, positions: NDArray[np.int64]) -> Floats:
    """Pairs of neighbours are turned, as llama.cpp has it for Llama; x: [n_tokens, n_heads, HEAD]."""
    angle = positions[:, None] * _BASE ** (-np.arange(0, HEAD, 2) / HEAD)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def different_tokens(n: int, seed: int = 0) -> list[int]:
    """None twice, since equal ones have keys of one norm."""
    return np.random.default_rng(seed).permutation(VOCABULARY)[:n].tolist()  # type: ignore[no-any-return]


class OneLayer:
    """``write`` makes the file; ``logits`` is what it computes."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)

        def matrix(rows: int, columns: int) -> NDArray[np.float32]:
            return (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

        self.tensors = {
            "token_embd": random.standard_normal((VOCABULARY, WIDTH)).astype(np.float32),
            "output": matrix(VOCABULARY, WIDTH),
            "output_norm": random.uniform(0.5, 1.5, WIDTH).astype(np.float32),
            "blk.0.attn_norm": random.uniform(0.5, 1.5, WIDTH).astype(np.float32),
            "blk.0.ffn_norm": random.uniform(0.5, 1.5, WIDTH).astype(np.float32),
            "blk.0.attn_q": 2 * matrix(HEADS * HEAD, WIDTH),
            "blk.0.attn_k": 2 * matrix(KV_HEADS * HEAD, WIDTH),
            "blk.0.attn_v": matrix(KV_HEADS * HEAD, WIDTH),
            "blk.0.attn_output": 2 * matrix(WIDTH, HEADS * HEAD),
            "blk.0.ffn_gate": matrix(FFN, WIDTH),
            "blk.0.ffn_up": matrix(FFN, WIDTH),
            "blk.0.ffn_down": matrix(WIDTH, FFN),
        }

    def write(self, path: Path) -> Path:
        """As GGUF in F32."""
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_context_length(1 << 16)
        writer.add_embedding_length(WIDTH)
        writer.add_feed_forward_length(FFN)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_rope_dimension_count(HEAD)
        writer.add_key_length(HEAD)
        writer.add_value_length(HEAD)
        writer.add_layer_norm_rms_eps(_EPSILON)
        writer.add_vocab_size(VOCABULARY)
        writer.add_tokenizer_model("no_vocab")
        for name, values in self.tensors.items():
            writer.add_tensor(f"{name}.weight", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _weight(self, name: str) -> Floats:
        return self.tensors[name].astype(np.float64)

    def _heads(self, name: str, x: Floats, n: int) -> Floats:
        return (x @ self._weight(f"blk.0.attn_{name}").T).reshape(len(x), n, HEAD)

    def keys(self, tokens: Sequence[int]) -> Floats:
        """[n_tokens, KV_HEADS, HEAD], of positions 0, 1, ..."""
        x = _norm(self._weight("token_embd")[list(tokens)], self._weight("blk.0.attn_norm"))
        return rope(self._heads("k", x, KV_HEADS), np.arange(len(tokens)))

    def queries(self, tokens: Sequence[int]) -> Floats:
        """[n_tokens, HEADS, HEAD], of positions 0, 1, ..."""
        return rope(self._heads("q", self.inputs(tokens), HEADS), np.arange(len(tokens)))

    def inputs(self, tokens: Sequence[int]) -> Floats:
        """What attn_k reads, [n_tokens, WIDTH]."""
        return _norm(self._weight("token_embd")[list(tokens)], self._weight("blk.0.attn_norm"))

    def probabilities(self, tokens: Sequence[int]) -> Floats:
        """Of causal attention over all tokens, [HEADS, n_queries, n_keys]."""
        query, n = self.queries(tokens), len(tokens)
        keys = np.repeat(self.keys(tokens), HEADS // KV_HEADS, axis=1)
        score = np.einsum("qhd,khd->hqk", query, keys) / np.sqrt(HEAD)
        score[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        weight = np.exp(score - score.max(-1, keepdims=True))
        result: Floats = weight / weight.sum(-1, keepdims=True)
        return result

    def logits(self, tokens: Sequence[int], seen: Sequence[Sequence[int]]) -> Floats:
        """Of the last token, whose query sees positions ``seen[head]`` of each KV head."""
        embedded = self._weight("token_embd")[list(tokens)]
        x = _norm(embedded, self._weight("blk.0.attn_norm"))
        values = self._heads("v", x, KV_HEADS)
        keys = self.keys(tokens)
        query = rope(self._heads("q", x[-1:], HEADS), np.array([len(tokens) - 1]))[0]
        out = []
        for head in range(HEADS):
            group = head * KV_HEADS // HEADS
            at = list(seen[group])
            score = keys[at, group] @ query[head] / np.sqrt(HEAD)
            weight = np.exp(score - score.max())
            out.append(weight @ values[at, group] / weight.sum())
        return self.behind_attention(tokens[-1], np.concatenate(out))

    def behind_attention(self, token: int, out: Floats) -> Floats:
        """Logits of a token whose query heads have seen ``out``, one head after the other."""
        y = self._weight("token_embd")[token] + self._weight("blk.0.attn_output") @ out
        z = _norm(y, self._weight("blk.0.ffn_norm"))
        gate = self._weight("blk.0.ffn_gate") @ z
        gated = gate / (1 + np.exp(-gate)) * (self._weight("blk.0.ffn_up") @ z)
        y = y + self._weight("blk.0.ffn_down") @ gated
        result: Floats = self._weight("output") @ _norm(y, self._weight("output_norm"))
        return result


@dataclass
class Kept:
    """What a sequence's saved state holds: of each list the positions, and the scores."""

    positions: list[list[int]]
    scores: list[list[float]]


def kept(state: bytes, n_lists: int = KV_HEADS) -> Kept:
    """Reads a sequence's state of one layer. docs/kv-cache.md has the format; in front of it llama.cpp has a
    number of cells and for each of them position, 1 and the sequence, 12 bytes."""
    marker = state.index(_MARKER)
    counts = [n for n in range(marker // 12) if state[marker - 12 * n - 4 :][:4] == struct.pack("<I", n)]
    n_cells = counts[-1]
    cells = [struct.unpack_from("<i", state, marker - 12 * (n_cells - i))[0] for i in range(n_cells)]
    at = marker + len(_MARKER)
    policy, n_layer = struct.unpack_from("<2I", state, at)
    assert n_layer == 1
    at += 8
    found: list[NDArray[np.float64]] = []  # positions and scores of a list
    for _ in range(n_lists):
        (n,) = struct.unpack_from("<I", state, at)
        index = struct.unpack_from(f"<{n}I", state, at + 4)
        found.append(np.array([[cells[i] for i in index], [0.0] * n]))
        at += 4 + 4 * n
    end = len(state)
    for some in reversed(found if policy != _RANDOM else []):
        end -= 4 * some.shape[1]
        some[1] = np.frombuffer(state, "<f4", some.shape[1], end)
    found = [some[:, np.argsort(some[0])] for some in found]
    return Kept([some[0].astype(int).tolist() for some in found], [some[1].tolist() for some in found])


def simulate(
    scores: Floats,
    ubatches: Sequence[int],
    *,
    blocks: int,
    sink: int = 16,
    recent: int = 64,
    floor: float = 1.0,
) -> list[list[int]]:
    """The positions that a policy leaves a lone sequence in each list, after ``ubatches`` tokens came one
    after the other; scores: [n_tokens, n_lists]; blocks: per list."""
    n_lists = scores.shape[1]
    lists: list[list[int]] = [[] for _ in range(n_lists)]
    position = 0
    for count in ubatches:
        used = sum(-(-len(held) // SLOTS) for held in lists)
        needed = sum(max(0, -(-(count - -len(held) % SLOTS) // SLOTS)) for held in lists)
        if needed > blocks * n_lists - used:
            its = [scores[held, index].tolist() for index, held in enumerate(lists)]
            least = int(floor * blocks) * SLOTS
            drop_lowest(lists, its, blocks * n_lists, least, count, sink=sink, recent=recent)
        for held in lists:
            held.extend(range(position, position + count))
        position += count
    return lists


def drop_lowest(
    lists: list[list[int]],
    scores: Sequence[Sequence[float]],
    left: int,
    least: int,
    incoming: int,
    *,
    sink: int = 16,
    recent: int = 64,
) -> None:
    """Takes the positions of the lowest scores, each beside its own, out of lists until ``left`` blocks hold
    the rest and ``incoming`` ones more in each list, 48 at least, which is then not below ``least``."""
    incoming = max(incoming, 48)
    loose = []
    for index, (held, its) in enumerate(zip(lists, scores, strict=True)):
        end = held[-1] + 1 - recent
        free = sorted((score, p) for score, p in zip(its, held, strict=True) if sink <= p < end)
        stays = max(len(held) - len(free), min(len(held), least - incoming))
        loose += [(*which, index) for which in free[: len(held) - stays]]
    for _, position, index in sorted(loose):
        if sum(-(-(len(held) + incoming) // SLOTS) for held in lists) <= left:
            break
        lists[index].remove(position)


def pooled(scores: Sequence[float], width: int) -> list[float]:
    """The highest of each and its neighbours that have been scored; what has not been stays infinite."""
    return [
        max([score, *(s for s in scores[max(0, i - width) : i + width + 1] if s < np.inf)])
        for i, score in enumerate(scores)
    ]


def attended(
    layer: OneLayer, tokens: Sequence[int], positions: Sequence[int], head: int, window: int
) -> Floats:
    """Mean over the last ``window`` tokens of the squares of the probabilities that KV head ``head``'s query
    heads give ``positions``, which are all that they see; [n_positions]."""
    n, group = len(tokens), HEADS // KV_HEADS
    at = np.array(positions)
    query, keys = layer.queries(tokens)[n - window :], layer.keys(tokens)[at, head]
    seen = np.zeros(len(at))
    for each in range(head * group, (head + 1) * group):
        score = query[:, each] @ keys.T / np.sqrt(HEAD)
        score[at[None] > np.arange(n - window, n)[:, None]] = -np.inf
        weight = np.exp(score - score.max(-1, keepdims=True))
        seen += ((weight / weight.sum(-1, keepdims=True)) ** 2).mean(0)
    return seen


def three_sequences(
    context: Context, cuts: Sequence[int], latest: int | None = None
) -> Iterator[tuple[int, list[int], NDArray[np.float32]]]:
    """A walk of 60 steps over three sequences, of which two share a beginning; at steps ``cuts`` one loses
    what is behind a random position, one of its ``latest``. Yields the sequence, its tokens and what the
    newest gave."""
    random = np.random.default_rng(4)
    tokens = {0: different_tokens(400, 1), 2: different_tokens(40, 2)}
    read(context, tokens[0])
    read(context, tokens[2], sequence=2)
    context.copy(0, 1)
    tokens[1] = list(tokens[0])
    for step in range(60):
        mine = tokens[sequence := int(random.integers(3))]
        if step in cuts:
            at = int(random.integers(len(mine) - latest if latest else 1, len(mine)))
            assert context.remove(sequence, at)
            del mine[at:]
        more = different_tokens(int(random.integers(1, 50)), 10 + step)
        logits = read(context, more, len(mine), sequence)
        mine += more
        yield sequence, mine, logits
