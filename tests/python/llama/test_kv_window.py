"""A budget for the KV cache, policy "window": what sequences keep, what can be cut, what is refused.

The oracle is a cache with a cell for every position from which the same positions are removed by hand,
before the ubatch whose queries no longer see them. What would break these: eviction for one ubatch that
another one's queries still need, sinks that go, sequences that take each other's cells, a cut where
positions are missing that leaves a prompt shorter than its caller believes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from arch_models import ArchModel
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.runtime.llama import Model
from kv_context import Context

CELLS, SINK = 512, 16
KV = f"budget={CELLS},policy=window,sink={SINK},recent=64"


@pytest.fixture(scope="module")
def llama(architectures: dict[str, ArchModel]) -> Path:
    return architectures["llama-dense"].path


def _tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 128, n).tolist()  # type: ignore[no-any-return]


def _run(context: Context, tokens: Sequence[int], step: int, sequence: int = 0) -> NDArray[np.float32]:
    for first in range(0, len(tokens), step):
        logits = context.decode(tokens[first : first + step], first, sequence)
    return logits


def _by_hand(context: Context, tokens: Sequence[int], step: int, keeps: int) -> NDArray[np.float32]:
    for first in range(0, len(tokens), step):
        ubatch = tokens[first : first + step]
        from_there = first - (keeps - len(ubatch) - SINK)
        if from_there > SINK:
            assert context.remove(0, SINK, from_there)
        logits = context.decode(ubatch, first)
    return logits


@pytest.mark.parametrize("ubatch", [1, 7, 64, 256])
def test_the_window_is_what_removing_by_hand_leaves(llama: Path, ubatch: int) -> None:
    tokens = _tokens(1000 if ubatch > 1 else 560)
    with Context(llama, ubatch=ubatch) as full:
        expected = _by_hand(full, tokens, ubatch, CELLS)
    with Context(llama, ubatch=ubatch) as full:
        complete = _run(full, tokens, ubatch)
    with Context(llama, kv=KV, ubatch=ubatch) as window:
        assert any("512 cells for 1 sequences and 1024 positions, sink 16" in line for line in window.log)
        got = _run(window, tokens, ubatch)
    scale = np.abs(expected).max()
    assert np.abs(got - expected).max() < 1e-5 * scale
    assert np.abs(got - complete).max() > 1e-3 * scale, "the test does not see what is evicted"


@pytest.mark.parametrize("name", ["gemma3-dense", "falcon-h1-dense", "bloom-dense", "deepseek2-moe"])
def test_other_caches(architectures: dict[str, ArchModel], name: str) -> None:
    """Sliding windows or recurrent layers beside, ALiBi, latent attention: one batch of many ubatches gives
    what one ubatch at a time does, and the cut is refused."""
    path, tokens = architectures[name].path, _tokens(900)
    results = []
    for batch in (64, 512):
        with Context(path, kv=KV, ubatch=64, batch=batch) as window:
            results.append(_run(window, tokens, batch))
            assert window.pos_min() > SINK
            assert not window.remove(0, 100)
    assert np.abs(results[0] - results[1]).max() <= 1e-5 * np.abs(results[0]).max()
    assert np.isfinite(results[0]).all()


def test_sliding_layers_keep_their_own_cache(architectures: dict[str, ArchModel]) -> None:
    path, tokens = architectures["gemma3-dense"].path, _tokens(900)
    with Context(path, ubatch=64) as full:
        expected = _by_hand(full, tokens, 64, CELLS)
    with Context(path, kv=KV, ubatch=64) as window:
        got = _run(window, tokens, 64)
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("batch", [64, 256, 1000])
def test_many_ubatches_of_a_batch(llama: Path, batch: int, flash: bool) -> None:
    """All ubatches of a batch get their cells before the first one is computed."""
    tokens = _tokens(1000)
    with Context(llama, kv=KV, ubatch=64, flash=flash) as one:
        expected = _run(one, tokens, 64)
    with Context(llama, kv=KV, ubatch=64, batch=batch, flash=flash) as many:
        got = _run(many, tokens, batch)
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("unified", [False, True])
def test_sequences_have_their_share(llama: Path, unified: bool) -> None:
    """Two sequences in turn: each as if alone in its share, and a share grows when the other one goes."""
    a, b = _tokens(700), _tokens(700, seed=1)
    kv = "budget=50%,sink=16,recent=64"
    n_ctx = 2048 if unified else 1024
    with Context(llama, kv=kv, n_ctx=n_ctx, n_seq=2, ubatch=64, unified=unified) as both:
        assert any("cells for" in line for line in both.log)
        for first in range(0, 700, 32):
            entries = [(t, first + i, 0) for i, t in enumerate(a[first : first + 32])]
            entries += [(t, first + i, 1) for i, t in enumerate(b[first : first + 32])]
            last = both.decode_all(entries)
        lost = both.pos_min(0)
        assert lost == both.pos_min(1) > SINK
        assert both.remove(0, -1)
        assert both.pos_min(0) == -1
        both.decode(_tokens(1), 700, 1)
    with Context(llama, n_ctx=1024, ubatch=32) as full:
        expected = _by_hand(full, b, 32, CELLS)
    assert np.abs(last - expected).max() < 1e-5 * np.abs(expected).max()


def test_cuts(llama: Path) -> None:
    """Refused where positions are missing, and then nothing is gone."""
    tokens = _tokens(800)
    with Context(llama, kv=KV, ubatch=64) as window:
        assert window.pos_min() == -1
        _run(window, tokens[:256], 64)
        assert window.pos_min() == 0
        assert window.remove(0, 200)  # nothing is missing yet
        _run_from(window, tokens[:800], 200)
        boundary = window.pos_min() - 1
        assert SINK < boundary < 800 - 64
        for p0, p1 in ((boundary, -1), (SINK + 1, -1), (0, 50), (700, 750), (SINK, 799)):
            assert not window.remove(0, p0, p1), (p0, p1)
            assert not window.remove(-1, p0, p1), (p0, p1)
        assert window.pos_min() == boundary + 1
        assert not window.api.llama_memory_can_shift(window.memory)
        assert window.remove(0, 780)
        again = window.decode(tokens[780:], 780)
        assert window.remove(0, 900)  # nothing there
        assert window.remove(0, SINK)  # the sinks are a whole prompt of their own
        assert window.pos_min() == 0
        assert window.remove(0, -1)
        assert window.pos_min() == -1
        assert np.isfinite(again).all()


def _run_from(context: Context, tokens: Sequence[int], first: int) -> None:
    for begin in range(first, len(tokens), 64):
        context.decode(tokens[begin : begin + 64], begin)


def test_copies_share_and_diverge(llama: Path) -> None:
    """In a unified cache a copy's cells are the original's, and neither loses what the other evicts."""
    a, b = _tokens(600), _tokens(300, seed=2)
    with Context(llama, kv="budget=512,sink=16", n_ctx=2048, n_seq=2, ubatch=64, unified=True) as window:
        _run(window, a[:400], 64)
        window.api.llama_memory_seq_cp(window.memory, 0, 1, -1, -1)
        for first in range(0, 256, 32):
            entries = [(t, 400 + first + i, 0) for i, t in enumerate(b[first : first + 32])]
            entries += [(t, 400 + first + i, 1) for i, t in enumerate(b[first : first + 32])]
            assert window.try_decode(entries) == 0
        left, right = (window.decode([5], 656, s) for s in (0, 1))
        assert window.pos_min(0) > SINK
    assert np.abs(left - right).max() < 1e-4 * np.abs(left).max()


def test_a_copy_keeps_what_the_original_evicts(llama: Path) -> None:
    """Also while a batch of many ubatches looks for cells, when both still have them."""
    a, b = _tokens(400), _tokens(1024, seed=2)
    with Context(llama, ubatch=64) as full:
        _run(full, a, 64)
        expected = full.decode([5], 400)
    kv = "budget=512,sink=16"
    with Context(llama, kv=kv, n_ctx=2048, n_seq=2, ubatch=64, batch=512, unified=True) as window:
        _run(window, a, 64)
        window.api.llama_memory_seq_cp(window.memory, 0, 1, -1, -1)
        for first in (0, 512):
            window.decode(b[first : first + 512], 400 + first, 0)
        assert window.pos_min(0) > 400
        assert window.pos_min(1) == 0
        assert np.abs(window.decode([5], 400, 1) - expected).max() < 1e-4 * np.abs(expected).max()


def test_states(llama: Path) -> None:
    """Restored into a cache with a budget the same follows; a cache without one refuses positions that may be
    missing, and one with a budget what a whole one saved."""
    tokens = _tokens(800)
    with Context(llama, kv=KV, ubatch=64, n_seq=2) as window:
        _run(window, tokens, 64)
        state = window.save()
        boundary = window.pos_min()
        expected = window.decode([3], 800)
        assert window.restore(state, 1)
        assert window.pos_min(1) == boundary
        assert np.abs(window.decode([3], 800, 1) - expected).max() < 1e-5 * np.abs(expected).max()
        with Context(llama, ubatch=64, n_seq=2) as full:
            assert not full.restore(state)
            _run(full, tokens[:128], 64)
            assert not window.restore(full.save())


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("budget=101%", "is 'budget=101%'; set it to off; paged"),
        ("budget=0", "is 'budget=0'"),
        ("25%", "is '25%'"),
        ("budget=25%,policy=best", "is 'budget=25%,policy=best'"),
        ("policy=window", "is 'policy=window'"),
        ("budget=25%,", "is 'budget=25%,'"),
        ("budget=25%,recent=0", "is 'budget=25%,recent=0'"),
        ("", "is ''.*,recent=N$"),
    ],
)
def test_wrong_settings_load_no_model(
    llama: Path, monkeypatch: pytest.MonkeyPatch, value: str, line: str
) -> None:
    monkeypatch.setenv("GGML_EXT_KV", value)
    with pytest.raises(GgmlExtError, match=f"environment variable GGML_EXT_KV {line}"):
        Model(llama).close()


@pytest.mark.parametrize(
    ("name", "kv", "line"),
    [
        (
            "llama-dense",
            "budget=256,sink=16,recent=64",
            "256 cells is less than 1 x .sink 16 . recent 64. . 256",
        ),
        ("deepseek32-moe", "budget=50%", "architecture deepseek32 cannot have a budget"),
        ("qwen2vl-dense", "budget=50%", "positions of several dimensions"),
    ],
)
def test_contexts_that_cannot_have_a_budget(
    architectures: dict[str, ArchModel], monkeypatch: pytest.MonkeyPatch, name: str, kv: str, line: str
) -> None:
    monkeypatch.setenv("GGML_EXT_KV", kv)
    with Model(architectures[name].path) as model, pytest.raises(GgmlExtError, match=line):
        model.start(n_ctx=1024, n_seq=1, n_batch=256)


def test_a_budget_of_everything_changes_nothing(llama: Path) -> None:
    tokens = _tokens(300)
    with Context(llama, kv="budget=100%") as budget, Context(llama) as full:
        assert any("nothing is evicted" in line for line in budget.log)
        assert np.array_equal(_run(budget, tokens, 64), _run(full, tokens, 64))
        assert budget.remove(0, 100)
        assert budget.restore(full.save())
