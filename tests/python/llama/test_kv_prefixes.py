"""Equal beginnings of independent sequences in a paged KV cache: stored once, and nothing else is.

What would break these: a beginning that is known by a hash, rows of another adapter, of a graph that was
aborted or that saw later tokens, blocks that go with their first reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import fold_files as folds
from arch_models import ArchModel
from kv_context import Context
from kv_paged import close, open_cache, random_tokens, read

PREFIX = 192  # three blocks of 64


@pytest.fixture(scope="module")
def llama(architectures: dict[str, ArchModel]) -> Path:
    return architectures["llama-dense"].path


def _two(path: Path, kv: str, **options: object) -> Context:
    values: dict[str, object] = {"n_seq": 3, "unified": True, "n_ctx": 1536}
    return open_cache(path, kv, **(values | options))


@pytest.mark.parametrize("unified", [False, True])
def test_equal_beginnings_are_stored_once(llama: Path, unified: bool) -> None:
    """Three requests of four blocks, three of them common, in a pool of nine; the logits of a cache that has
    room for all."""
    requests = [[*random_tokens(PREFIX), *random_tokens(20, seed=s + 1)] for s in range(3)]
    results = []
    for kv in ("off", "paged,budget=192"):
        with _two(llama, kv, unified=unified, n_ctx=1536 if unified else 512) as context:
            results.append([read(context, request, 0, s) for s, request in enumerate(requests)])
            results[-1] += [context.decode([3], PREFIX + 20, s) for s in range(3)]
    for plain, paged in zip(*results, strict=True):
        assert close(paged, plain)


def _leaves_room(context: Context, tokens: Sequence[int]) -> bool:
    """Whether sequence 1 leaves room for a third one beside sequence 0."""
    read(context, tokens, 0, 1)
    context.decode([1], len(tokens), 1)
    return context.try_decode([(t, i, 2) for i, t in enumerate(random_tokens(PREFIX, seed=9))]) == 0


def test_what_is_not_equal_is_not_shared(llama: Path) -> None:
    """One token of the first block, the order of blocks, a beginning that is cut and read anew."""
    tokens = random_tokens(PREFIX)
    kv = "paged,budget=192"  # 9 blocks per list
    with _two(llama, kv) as paged:
        read(paged, tokens)
        assert _leaves_room(paged, tokens)
    for other in ([*tokens[:5], tokens[5] + 1, *tokens[6:]], [*tokens[64:128], *tokens[:64], *tokens[128:]]):
        with _two(llama, kv) as paged:
            read(paged, tokens)
            assert not _leaves_room(paged, other)
    with _two(llama, kv) as paged:
        read(paged, tokens)
        paged.remove(0, 10)
        changed = [*tokens[:10], *random_tokens(PREFIX - 10, seed=4)]
        read(paged, changed[10:], 10)
        assert not _leaves_room(paged, tokens)
        assert close(paged.decode([1], PREFIX, 0), _alone(llama, [*changed, 1]))


def _alone(path: Path, tokens: Sequence[int]) -> NDArray[np.float32]:
    with _two(path, "off") as plain:
        return read(plain, tokens)


def test_a_shared_beginning_outlives_its_first_reader(llama: Path) -> None:
    tokens = random_tokens(PREFIX)
    with _two(llama, "paged,budget=192") as paged:
        for s in (0, 1):
            read(paged, tokens, 0, s)
            paged.decode([1], PREFIX, s)
        paged.remove(0, 0)
        read(paged, random_tokens(PREFIX, seed=5), 0, 0)  # takes what became free
        assert close(paged.decode([2], PREFIX + 1, 1), _alone(llama, [*tokens, 1, 2]))
        paged.remove(1, 70)  # into the shared part
        read(paged, tokens[70:100], 70, 1)
        assert close(paged.decode([2], 100, 1), _alone(llama, [*tokens[:100], 2]))


def test_adapters_make_other_rows(llama: Path, tmp_path: Path) -> None:
    """The same tokens under an adapter are other rows, under the same one the same."""
    tokens = random_tokens(PREFIX)
    shapes = {"blk.0.attn_k.weight": (256, 256), "blk.0.ffn_down.weight": (256, 384)}
    adapter = folds.write_adapter(tmp_path / "a.gguf", shapes)
    for before, after, room in ((0.0, 1.0, False), (1.0, 1.0, True), (1.0, 0.5, False)):
        with _two(llama, "paged,budget=192") as paged:
            paged.adapt(adapter, before)
            read(paged, tokens)
            paged.adapt(adapter, after)
            assert _leaves_room(paged, tokens) == room, (before, after)


def test_rows_of_an_aborted_graph_are_not_shared(llama: Path) -> None:
    """They are removed, but in a block whose beginning stays."""
    tokens, results = random_tokens(64), []
    for kv in ("off", "paged"):
        with _two(llama, kv) as context:
            read(context, tokens[:32])
            context.stop_after(12)
            assert context.try_decode([(t, 32 + i, 0) for i, t in enumerate(tokens[32:])]) == 2
            context.stop_after(None)
            assert context.pos_max() == 31
            results.append([read(context, tokens, 0, 1), context.decode([5], 64, 1)])
            results[-1] += [read(context, tokens[32:], 32), context.decode([5], 64)]
    for plain, paged in zip(*results, strict=True):
        assert close(paged, plain)


def test_rows_that_see_later_tokens_are_not_shared(llama: Path) -> None:
    results = []
    for kv in ("off", "paged"):
        with _two(llama, kv, ubatch=128, batch=128) as context:
            context.api.llama_set_causal_attn(context.context, False)
            for s in (0, 1):
                read(context, [*random_tokens(64), *random_tokens(40, seed=s + 1)], 0, s)
            context.api.llama_set_causal_attn(context.context, True)
            results.append([context.decode([3], 104, s) for s in (0, 1)])
    for plain, paged in zip(*results, strict=True):
        assert close(paged, plain)
