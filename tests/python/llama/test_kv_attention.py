"""Policy attention of a paged KV cache: scores by what the latest queries look at.

numpy computes the probabilities of the one layer over what is left, ubatch by ubatch, and applies the rule of
docs/kv-cache.md to the scores that the cache itself had before: what goes must be the same to the slot. What
would break these: queries of another ubatch, heads of another group, recent slots scored, a slot's score left
behind when it moves, neighbours that are none, a cut that leaves what was chosen for another question.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ggml_ext.runtime.llama import log_lines
from kv_evicted import KV_HEADS, Kept, OneLayer, attended, different_tokens, drop_lowest, kept, pooled
from kv_paged import F16, Q8_0, open_cache, read

LAYER = OneLayer()
KV = "paged,budget=256,policy=attention"
WINDOW, RECENT, DECAY = 32, 64, 0.5


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return LAYER.write(tmp_path_factory.mktemp("attention") / "one-layer.gguf")


def _step(before: Kept, count: int, blocks: int) -> list[list[int]]:
    """Positions behind a ubatch of ``count`` tokens that follow what ``before`` has."""
    lists = [list(some) for some in before.positions]
    used = sum(-(-len(held) // 64) for held in lists)
    needed = sum(max(0, -(-(count - -len(held) % 64) // 64)) for held in lists)
    if needed > KV_HEADS * blocks - used:
        scores = [pooled(some, 3) for some in before.scores]
        drop_lowest(lists, scores, KV_HEADS * blocks, blocks // 4 * 64, count, recent=RECENT)
    end = max((held[-1] + 1 for held in before.positions if held), default=0)
    return [held + list(range(end, end + count)) for held in lists]


def _scores(before: Kept, positions: Sequence[int], head: int, tokens: list[int], count: int) -> np.ndarray:
    """Of a list behind the ubatch, from those before it."""
    old = dict(zip(before.positions[head], before.scores[head], strict=True))
    scores = np.array([old.get(position, np.inf) for position in positions])
    if 4 * count < WINDOW:
        return scores
    seen = attended(LAYER, tokens, positions, head, min(WINDOW, count))
    due = np.array(positions) <= positions[-1] - RECENT
    scored = np.where(np.isinf(scores), seen, np.maximum(DECAY * scores, seen))
    return np.where(due, scored, scores)


@pytest.mark.parametrize(
    ("sizes", "threads"),
    [([64] * 12, 1), ([64] * 12, 2), ([128] * 5 + [1] * 20 + [70, 1, 7, 8, 9], 1), ([50] * 12, 1)],
)
def test_the_least_looked_at_go(path: Path, sizes: list[int], threads: int) -> None:
    tokens = different_tokens(sum(sizes) + 1)
    blocks = 4 if max(sizes) <= 64 else 6
    kv = f"paged,budget={64 * blocks},policy=attention"
    with open_cache(path, kv, n_ctx=1024, ubatch=max(sizes), batch=max(sizes), threads=threads) as context:
        assert any("policy attention, sink 16, recent 64 stay" in line for line in context.log)
        before, n, gone = Kept([[]] * KV_HEADS, [[]] * KV_HEADS), 0, 0
        for count in sizes:
            logits = context.decode(tokens[n : n + count], n)
            n += count
            after = kept(context.save())
            assert after.positions == _step(before, count, blocks)
            for head, positions in enumerate(after.positions):
                expected = _scores(before, positions, head, tokens[:n], count)
                assert np.array_equal(np.isinf(expected), np.isinf(after.scores[head]))
                finite = np.isfinite(expected)
                found = np.array(after.scores[head])[finite]
                # Keys and queries have 8 bits; squares have twice the error.
                off = np.abs(found / expected[finite] - 1)
                assert off.max(initial=0) < 0.3
                assert off[expected[finite] > 1e-5].mean() < 0.05 if finite.any() else True
                gone += n - len(positions)
            before = after
        assert gone > 100
        first, second = after.positions
        assert first != second
        expected_logits = LAYER.logits(tokens[:n], after.positions)
        assert np.abs(logits - expected_logits).max() < 0.05 * np.abs(expected_logits).max()


def test_what_was_chosen_for_one_question_serves_no_other(path: Path) -> None:
    """Behind the last lost position a sequence can be cut, in front of it only as a whole."""
    tokens = different_tokens(700)
    with open_cache(path, KV, n_ctx=1024) as context:
        read(context, tokens[:250])
        assert context.pos_min() == 0
        assert context.remove(0, 200)
        read(context, tokens[200:], 200)
        lists = kept(context.save()).positions
        lost = max(set(range(700)) - (set(lists[0]) & set(lists[1])))
        assert 300 < lost < 700 - RECENT
        assert context.pos_min() == lost + 1
        for p0, p1 in ((lost, -1), (20, -1), (1, 699), (0, 600)):
            assert not context.remove(0, p0, p1)
        assert kept(context.save()).positions == lists
        state = context.save()
        assert context.remove(0, lost + 1)
        assert context.pos_min() == context.pos_max() == lost  # it cannot be cut further
        read(context, tokens[lost + 1 :], lost + 1)
        assert context.remove(0, 0)
        assert context.pos_min() == -1
        read(context, tokens[:10])
        assert context.pos_min() == 0
        assert context.remove(0, 5)
        context.remove(0, 0)
        assert context.restore(state)
        assert context.pos_min() == lost + 1
        assert not context.remove(0, lost)


def test_copies_know_what_is_lost(path: Path) -> None:
    tokens = different_tokens(900)
    kv = KV.replace("256", "192")
    with open_cache(path, kv, n_ctx=4096, n_seq=3, unified=True) as context:
        read(context, tokens[:800])
        least = context.pos_min()
        assert least > 100
        context.copy(0, 1)
        context.copy(0, 2, 0, 16)
        assert context.pos_min(1) == least
        assert not context.remove(1, least - 1)
        assert context.remove(1, 0)
        assert context.pos_min(0) == least
        assert context.pos_min(2) == 0
        assert context.remove(2, 3)
        context.copy(0, 1)
        read(context, tokens[800:], 800)  # what both share goes from both
        assert context.pos_min(1) == context.pos_min() > least


@pytest.mark.parametrize("types", [(Q8_0, Q8_0), (F16, F16)])
def test_a_state_goes_on_as_the_cache_would(path: Path, types: tuple[int, int]) -> None:
    tokens = different_tokens(1000)
    with (
        open_cache(path, KV, n_ctx=1024, types=types) as context,
        open_cache(path, KV, n_ctx=1024, types=types) as other,
        open_cache(path, KV.replace("attention", "norm"), n_ctx=1024, types=types) as norm,
    ):
        read(context, tokens[:700])
        state = context.save()
        assert other.restore(state)
        assert other.save() == state
        a, b = (read(c, tokens[700:], 700) for c in (context, other))
        assert np.array_equal(a, b)
        assert context.save() == other.save()
        assert not norm.restore(state)
        assert any("saved by a cache of another policy" in line for line in log_lines())


def test_several_sequences_in_a_ubatch(path: Path) -> None:
    """Each is scored by its own queries: as if it were alone, but for what is lost to the others."""
    tokens = {s: different_tokens(100, s) for s in range(2)}
    with (
        open_cache(path, KV, n_ctx=4096, n_seq=2, unified=True, ubatch=128, batch=128) as together,
        open_cache(path, KV, n_ctx=4096, ubatch=128, batch=128) as alone,
    ):
        for at in (0, 50):
            together.decode_all([(tokens[s][p], p, s) for s in range(2) for p in range(at, at + 50)])
        for s, some in tokens.items():
            alone.remove(0, 0)
            alone.decode(some[:50])
            alone.decode(some[50:], 50)
            expected, found = kept(alone.save()), kept(together.save(s))
            assert found.positions == expected.positions
            assert np.allclose(found.scores, expected.scores, rtol=1e-3)
            assert np.isfinite(found.scores[0][: 100 - RECENT]).all()


def test_too_small_a_ubatch_is_refused(path: Path) -> None:
    with open_cache(path, KV, ubatch=7, batch=7) as context:
        assert not context.context
        assert any("scores by a ubatch's queries, and 7 are too few" in line for line in context.log)
