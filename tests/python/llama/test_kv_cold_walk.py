"""Random walks of one sequence through a cache of codes: reading, cuts, saved and restored states.

What would break these: a batch that is taken and then has no room (llama.cpp ends), a position that is both a
row and a code, or lost where nothing may be.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kv_coded import CodedLayer, Parts, parts_of
from kv_context import Context
from kv_evicted import different_tokens
from kv_paged import open_cache, read

SINK, RECENT, LONGEST = 16, 64, 1000


def _setting(choose: random.Random, ubatch: int) -> str:
    """The least rows that there can be, and few codes."""
    policy = choose.choice(["", "norm", "random"])
    if not policy:
        return f"paged,budget={choose.choice([256, 320, 512])},cold=cq2"
    rows = -(-(SINK + RECENT + max(ubatch, 48)) // 64)
    codes = choose.choice([rows + 2, rows + 3, 8])
    scores = 256 if policy == "norm" else 0
    size = 2 * (rows * (256 + 2 * 64 * 34 + scores) + codes * (256 + 2 * 64 * 8 + scores))
    return f"paged,budget={-(-size // 1024)}K,policy={policy},cold=cq2"


class _Walk:
    """``n``: tokens that the sequence has."""

    def __init__(self, context: Context, kv: str, choose: random.Random) -> None:
        self._context, self._choose = context, choose
        self._evicts, self._scored = "policy" in kv, "norm" in kv
        self.n = 0
        self._saved: tuple[bytes, int] | None = None

    def read(self) -> None:
        count = self._choose.choice([1, 1, 2, 5, 30, 48, 64, 65, 130, 300])
        if self.n + count > LONGEST:
            return
        tokens = [(self._choose.randrange(1024), self.n + i, 0) for i in range(count)]
        status = self._context.try_decode(tokens)
        assert status == 0 or (status == 1 and not self._evicts)
        self.n += 0 if status else count

    def cut(self) -> None:
        at = self._choose.randrange(self.n + 1)
        if self._context.remove(0, at):
            self.n = at

    def save(self) -> None:
        self._saved = (self._context.save(), self.n)

    def restore(self) -> None:
        if self._saved is not None:
            assert self._context.remove(0, 0)
            assert self._context.restore(self._saved[0])
            self.n = self._saved[1]

    def check(self) -> None:
        parts: Parts = parts_of(self._context.save(), 4, scored=self._scored)
        for old, rows in zip(parts.coded, parts.rows, strict=True):
            assert not set(old) & set(rows)
            assert set(range(min(SINK, self.n))) <= set(old + rows) <= set(range(self.n))
            assert self._evicts or sorted(old + rows) == list(range(self.n))


@pytest.mark.parametrize("seed", range(40))
def test_one_sequence(seed: int, tmp_path: Path) -> None:
    choose = random.Random(seed)
    ubatch = choose.choice([1, 7, 16, 48, 64, 100])
    kv = _setting(choose, ubatch)
    path = CodedLayer(2).write_coded(tmp_path / "m.gguf")
    with open_cache(path, kv, n_ctx=4096, ubatch=ubatch) as context:
        walk = _Walk(context, kv, choose)
        walk.read()
        for _ in range(30):
            choose.choices([walk.read, walk.cut, walk.save, walk.restore], [8, 2, 1, 1])[0]()
            if walk.n and choose.random() < 0.4:
                walk.check()


@pytest.mark.parametrize("policy", ["norm", "random"])
def test_a_state_whose_rows_lie_before_its_codes(policy: str, tmp_path: Path) -> None:
    """Of a cache with more sinks: what is coded next comes between and in front of what is."""
    path = CodedLayer(2).write_coded(tmp_path / "m.gguf")
    kv, options = f"paged,budget=37K,policy={policy},cold=cq2", {"n_ctx": 2048, "ubatch": 48}
    with open_cache(path, f"{kv},sink=40,recent=24", **options) as context:
        read(context, different_tokens(700))
        state = context.save()
        before = parts_of(state, 4, scored=policy == "norm")
        assert all(set(range(40)) <= set(rows) for rows in before.rows)
    with open_cache(path, kv, **options) as context:
        assert context.restore(state)
        for position in range(700, 900):
            context.decode([position % 256], position)
        after = parts_of(context.save(), 4, scored=policy == "norm")
        assert any(set(range(SINK, 40)) & set(old) for old in after.coded)
        for old, rows in zip(after.coded, after.rows, strict=True):
            assert old == sorted(old)
            assert set(range(SINK)) | set(range(900 - RECENT, 900)) <= set(rows)
            assert not set(old) & set(rows)
