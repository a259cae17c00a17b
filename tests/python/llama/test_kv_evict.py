"""A paged KV cache that evicts by head.

numpy says which positions policy norm keeps, by the rule of docs/kv-cache.md, and what the model computes
when each head sees those alone. What would break these: a score of another slot, a row that was moved
elsewhere, a list that another head is read by, an eviction of sinks or recent tokens, room that is promised
and not there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import transform_files
from arch_models import ArchModel
from ggml_ext.runtime.llama import log_lines
from kv_evicted import HEAD, KV_HEADS, OneLayer, different_tokens, kept, simulate, three_sequences
from kv_paged import F16, Q8_0, close, open_cache, random_tokens, read

LAYER = OneLayer()
BUDGET = "paged,budget=256,policy="
NORM = BUDGET + "norm"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return LAYER.write(tmp_path_factory.mktemp("evict") / "one-layer.gguf")


def _ubatches(total: int, size: int) -> list[int]:
    return [min(size, total - at) for at in range(0, total, size)]


def _agrees(logits: np.ndarray, tokens: list[int], seen: list[list[int]]) -> None:
    """Within what a q8_0 cache costs, which is much less than a tenth of the positions does."""
    error = np.abs(logits - LAYER.logits(tokens, seen)).max()
    whole = np.abs(logits - LAYER.logits(tokens, [list(range(len(tokens)))] * KV_HEADS)).max()
    assert error < 0.05 * np.abs(logits).max()
    if any(len(some) < 0.9 * len(tokens) for some in seen):
        assert error < 0.3 * whole, (error, whole)


@pytest.mark.parametrize(("ubatch", "prompt"), [(64, 700), (1, 300), (48, 500), (50, 333), (128, 640)])
@pytest.mark.parametrize("threads", [1, 2])
def test_norm_keeps_the_smallest_keys(path: Path, ubatch: int, prompt: int, threads: int) -> None:
    tokens = different_tokens(prompt + 70)
    norms = (LAYER.keys(tokens) ** 2).sum(-1)
    with open_cache(path, NORM, n_ctx=1024, ubatch=ubatch, batch=ubatch, threads=threads) as context:
        assert any("policy norm, sink 16, recent 64 stay" in line for line in context.log)
        logits = read(context, tokens[:prompt])
        sizes = _ubatches(prompt, ubatch)
        for n in range(prompt, len(tokens)):
            if n > prompt:
                logits = context.decode([tokens[n - 1]], n - 1)
                sizes = [*sizes, 1]
            if n not in (prompt, prompt + 1, prompt + 30, prompt + 69):
                continue
            found = kept(context.save())
            assert found.positions == simulate(-norms[:n], sizes, blocks=4)
            assert all(len(some) <= 256 for some in found.positions)
            for head, some in enumerate(found.positions):
                assert np.allclose(found.scores[head], -norms[some, head], rtol=1e-5)
            _agrees(logits, tokens[:n], found.positions)


def test_norms_are_those_before_a_learned_transform(path: Path, tmp_path: Path) -> None:
    """P, which is not orthogonal, changes what is stored and not what goes."""
    model = transform_files.transform_heads(transform_files.read(path), HEAD)
    tokens = different_tokens(500)
    norms = (LAYER.keys(tokens) ** 2).sum(-1)
    with open_cache(model.write(tmp_path / "heads.gguf"), NORM, n_ctx=1024, batch=64) as context:
        logits = read(context, tokens)
        found = kept(context.save())
        assert found.positions == simulate(-norms, _ubatches(500, 64), blocks=4)
        assert np.allclose(found.scores[0], -norms[found.positions[0], 0], rtol=1e-5)
        _agrees(logits, tokens, found.positions)


def test_heads_keep_different_positions(path: Path) -> None:
    with open_cache(path, NORM, n_ctx=1024) as context:
        read(context, different_tokens(700))
        first, second = kept(context.save()).positions
        assert first != second
        assert first[:16] == second[:16] == list(range(16))
        assert set(range(700 - 64, 700)) <= set(first) & set(second)


def test_random_is_the_control(path: Path) -> None:
    tokens = different_tokens(701)
    with open_cache(path, BUDGET + "random,sink=3,recent=20", n_ctx=1024) as context:
        read(context, tokens[:700])
        logits = context.decode(tokens[700:], 700)
        first, second = kept(context.save()).positions
        _agrees(logits, tokens, [first, second])
        assert first != second
        assert first[:3] == second[:3] == [0, 1, 2]
        assert set(range(681, 701)) <= set(first) & set(second)
        assert first[3] < 350 < first[-100]


@pytest.mark.parametrize("policy", ["norm", "random"])
def test_nothing_goes_while_there_is_room(path: Path, policy: str) -> None:
    tokens = different_tokens(256)
    with (
        open_cache(path) as plain,
        open_cache(path, BUDGET + policy) as context,
    ):
        assert np.array_equal(read(plain, tokens), read(context, tokens))
        assert kept(context.save()).positions == [list(range(256))] * KV_HEADS


@pytest.mark.parametrize("unified", [False, True])
def test_several_sequences(path: Path, unified: bool) -> None:
    most = 3 * 256
    with open_cache(path, NORM, n_ctx=4096, n_seq=3, unified=unified) as context:
        for sequence, tokens, logits in three_sequences(context, cuts=(20, 40), latest=30):
            seen = kept(context.save(sequence)).positions
            _agrees(logits, tokens, seen)
            for some in seen:
                assert len(some) <= most
                assert some[:16] == list(range(16))
                assert set(range(max(0, len(tokens) - 64), len(tokens))) - set(some) == set()


def test_equal_beginnings_are_shared_until_something_goes(path: Path) -> None:
    tokens = different_tokens(128)
    with open_cache(path, "paged,budget=144,policy=norm", n_ctx=4096, n_seq=8, unified=True) as context:
        for sequence in range(8):
            read(context, tokens + different_tokens(40, sequence), 0, sequence)
        for sequence in range(8):  # of 18 blocks; without sharing they took 24
            assert kept(context.save(sequence)).positions == [list(range(168))] * KV_HEADS
        for sequence in range(8):
            more = different_tokens(300, 10 + sequence)
            logits = read(context, more, 168, sequence)
            seen = kept(context.save(sequence)).positions
            _agrees(logits, tokens + different_tokens(40, sequence) + more, seen)


def test_a_beginning_with_holes_is_nobodys(path: Path) -> None:
    """A sequence that lost early tokens is cut back among them and goes on as before: its first block has 64
    tokens from position 0 on again, but not the first 64."""
    tokens = different_tokens(600)
    with open_cache(path, NORM, n_ctx=4096, n_seq=2, unified=True) as context:
        read(context, tokens)
        assert len(kept(context.save()).positions[0]) < 600
        assert context.remove(0, 50)
        read(context, tokens[50:200], 50)
        assert 10 < len([p for p in kept(context.save()).positions[0] if p < 64]) < 64
        logits = read(context, tokens[:200], 0, 1)
        assert kept(context.save(1)).positions == [list(range(200))] * KV_HEADS
        _agrees(logits, tokens[:200], [list(range(200))] * KV_HEADS)


def test_sequences_in_one_ubatch(path: Path) -> None:
    """What one finds in its open block may be gone when room is made for another."""
    tokens = {s: different_tokens(150 + 20 * s, s) for s in range(4)}
    with open_cache(path, NORM, n_ctx=4096, n_seq=4, unified=True) as context:
        for sequence, some in tokens.items():
            read(context, some, 0, sequence)
        for step in range(250):
            for sequence, some in tokens.items():
                some.append((37 * step + 11 * sequence) % 1024)
            some = [(s, more) for s, more in tokens.items() if s == 3 or step % (s + 2) == 0 or step > 100]
            for sequence in {0, 1, 2} - {s for s, _ in some}:
                tokens[sequence].pop()
            logits = context.decode_all([(more[-1], len(more) - 1, s) for s, more in some])
            if step % 25 == 0:
                _agrees(logits, tokens[3], kept(context.save(3)).positions)


@pytest.mark.parametrize("types", [(Q8_0, Q8_0), (F16, F16)])
def test_a_state_goes_on_as_the_cache_would(path: Path, types: tuple[int, int]) -> None:
    tokens = different_tokens(1000)
    with (
        open_cache(path, NORM, n_ctx=1024, types=types) as context,
        open_cache(path, NORM, n_ctx=1024, types=types) as other,
    ):
        read(context, tokens[:700])
        state = context.save()
        assert other.restore(state)
        assert other.save() == state
        assert len(state) < 256 * KV_HEADS * 2 * 64 + 20000
        a, b = (read(c, tokens[700:], 700) for c in (context, other))
        assert np.array_equal(a, b)
        assert context.save() == other.save()


def test_a_state_makes_itself_room(path: Path) -> None:
    tokens, other = different_tokens(250), different_tokens(600, 1)
    with open_cache(path, NORM, n_ctx=4096, n_seq=2, unified=True) as context:
        read(context, tokens)
        state = context.save()
        context.remove(0, 0)
        read(context, other, 0, 1)
        before = kept(context.save(1)).positions
        assert context.restore(state)
        assert kept(context.save()).positions == [list(range(250))] * KV_HEADS
        after = kept(context.save(1)).positions
        assert all(set(some) < set(more) for some, more in zip(after, before, strict=True))
        logits = read(context, different_tokens(50, 3), 250)
        _agrees(logits, tokens + different_tokens(50, 3), kept(context.save()).positions)


def test_states_of_other_caches(path: Path) -> None:
    tokens = different_tokens(200)
    with (
        open_cache(path) as pages,
        open_cache(path, "off") as plain,
        open_cache(path, NORM) as norm,
        open_cache(path, BUDGET + "random") as other,
    ):
        for context in (pages, norm):
            read(context, tokens)
        states = [pages.save(), norm.save()]
        for context, foreign, line in [
            (pages, [states[1]], "saved by a cache that evicts"),
            (plain, [states[1]], "incompatible V transposition"),
            (norm, [states[0]], "saved by a cache of another policy"),
            (other, states, "saved by a cache of another policy"),
        ]:
            for state in foreign:
                assert not context.restore(state)
                assert any(line in logged for logged in log_lines())
                assert context.pos_max() == -1
        assert norm.restore(states[1])


def test_a_damaged_state(path: Path) -> None:
    with open_cache(path, NORM) as context:
        read(context, different_tokens(200))
        state = context.save()
        at = state.index(b"GGXE") + 12
        for damage in (b"\xff\xff\xff\xff", b"\xc9\0\0\0"):
            assert not context.restore(state[:at] + damage + state[at + 4 :])
        assert not context.restore(state[: at + 4] + b"\x05\0\0\0" + state[at + 8 :])
        last = at + 4 * 200
        assert state[last : last + 4] == b"\xc7\0\0\0"
        assert not context.restore(state[:last] + b"\xc8\0\0\0" + state[last + 4 :])
        assert not context.restore(state[:-1])
        assert context.restore(state)
        assert kept(context.save()).positions == [list(range(200))] * KV_HEADS


@pytest.mark.parametrize(
    ("options", "kv", "line"),
    [
        ({}, "paged,budget=128,policy=norm", "a budget of 2 blocks of 64 tokens is less than 3"),
        ({"ubatch": 256}, "paged,budget=320,policy=norm", "is less than 6 for -ub 256, sinks and recent"),
        (
            {"n_seq": 4},
            "paged,budget=128,policy=norm",
            "is less than 9 for -ub 64, sinks and recent tokens of 4",
        ),
        (
            {},
            "paged,budget=256,policy=norm,sink=4294967295,recent=65",
            "blocks of 64 tokens is less than 671088",
        ),
        ({}, "paged,budget=256,sink=3", "is 'paged,budget=256,sink=3'"),
        ({}, "paged,budget=256,policy=window", "is 'paged,budget=256,policy=window'"),
        ({}, "paged,budget=256,policy=norm,recent=0", "recent=0'"),
        ({}, "budget=256,policy=norm", "is 'budget=256,policy=norm'"),
    ],
)
def test_refusals(path: Path, options: dict[str, object], kv: str, line: str) -> None:
    with open_cache(path, kv, **options) as context:
        assert context.context is None or not context.context
        assert any("GGML_EXT_KV" in logged and line in logged for logged in context.log), context.log


def test_tokens_of_several_sequences(path: Path) -> None:
    """More blocks than a ubatch can have: refused with a full cache's status before anything is computed."""
    tokens = different_tokens(600)
    with open_cache(path, NORM, n_ctx=4096, n_seq=2, unified=True) as context:
        entries = [(token, i, [0, 1]) for i, token in enumerate(tokens[:100])]
        assert context.try_decode_shared(entries) == 0
        mixed = []
        for position in range(100, 140, 2):
            mixed += [(1, position, [0]), (2, position, [1]), (3, position + 1, [0, 1])]
        assert context.try_decode_shared(mixed) == 1
        assert context.pos_max() == 99
        logits = read(context, tokens[100:], 100)
        _agrees(logits, tokens, kept(context.save()).positions)


@pytest.mark.parametrize(
    "name", ["llama-dense", "gemma3-dense", "gpt-oss-moe", "falcon-h1-dense", "bloom-dense"]
)
@pytest.mark.parametrize("policy", ["norm", "attention"])
def test_other_graphs(architectures: dict[str, ArchModel], name: str, policy: str) -> None:
    """They run on, with finite logits, and a state carries them."""
    model, tokens = architectures[name].path, random_tokens(700)
    with (
        open_cache(model, BUDGET + policy, n_ctx=1024) as context,
        open_cache(model, BUDGET + policy, n_ctx=1024) as other,
    ):
        read(context, tokens[:600])
        assert other.restore(context.save())
        a, b = (read(c, tokens[600:], 600) for c in (context, other))
        assert np.isfinite(a).all()
        assert close(a, b)
