"""Paged storage of the KV cache: the same logits as from llama.cpp's cache, blocks shared and given back.

The oracle is the same context without paging: equal bits where a sequence's tokens lie in whole blocks, the
order of upstream's cells. What would break these: a row in another slot, a run that ends too early, a block
that goes back while a sequence still sees it, a position looked up in another sequence's part of the mask.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import fold_files as folds
import server_files
from arch_models import ArchModel
from ggml_ext.runtime.llama import log_lines
from kv_context import Context

F16, Q4_0, Q5_0, Q8_0, IQ4_NL = 1, 2, 6, 8, 20
NEAR = 2e-3  # of the largest logit: other sums of the same 8-bit products


@pytest.fixture(scope="module")
def llama(architectures: dict[str, ArchModel]) -> Path:
    return architectures["llama-dense"].path


def _tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 128, n).tolist()  # type: ignore[no-any-return]


def _open(path: Path, kv: str = "paged", **options: object) -> Context:
    values: dict[str, object] = {
        "n_ctx": 512,
        "types": (Q8_0, Q8_0),
        "flash": True,
        "ubatch": 64,
        "batch": 512,
    }
    return Context(path, kv=kv, **(values | options))  # type: ignore[arg-type]


def _read(context: Context, tokens: Sequence[int], first: int = 0, sequence: int = 0) -> NDArray[np.float32]:
    for at in range(0, len(tokens), context.batch):
        logits = context.decode(tokens[at : at + context.batch], first + at, sequence)
    return logits


def _close(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return bool(np.abs(a - b).max() <= NEAR * np.abs(b).max())


def _story(context: Context, tokens: Sequence[int], prompt: int) -> list[NDArray[np.float32]]:
    """A prompt and then a token at a time."""
    results = [_read(context, tokens[:prompt])]
    return results + [context.decode([token], prompt + i) for i, token in enumerate(tokens[prompt:])]


TYPES = [(Q8_0, Q8_0), (Q4_0, Q4_0), (Q5_0, Q5_0), (IQ4_NL, IQ4_NL), (Q8_0, Q4_0)]


@pytest.mark.parametrize("types", TYPES)
def test_bits_of_a_sequence(llama: Path, types: tuple[int, int]) -> None:
    tokens = _tokens(70)
    with _open(llama, "off", types=types) as plain, _open(llama, types=types) as paged:
        assert any("paged: " in line and "room for 512 of 512 tokens" in line for line in paged.log)
        for a, b in zip(_story(plain, tokens, 65), _story(paged, tokens, 65), strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize(("ubatch", "prompt"), [(1, 63), (7, 64), (64, 257), (512, 257)])
@pytest.mark.parametrize("threads", [1, 3])
def test_bits_at_the_edges_of_blocks(llama: Path, ubatch: int, prompt: int, threads: int) -> None:
    tokens = _tokens(prompt + 3)
    with _open(llama, "off", ubatch=ubatch) as plain, _open(llama, ubatch=ubatch, threads=threads) as paged:
        for a, b in zip(_story(plain, tokens, prompt), _story(paged, tokens, prompt), strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize(
    "name", ["gemma3-dense", "gpt-oss-moe", "falcon-h1-dense", "bloom-dense", "gemma2-dense"]
)
def test_other_graphs(architectures: dict[str, ArchModel], name: str) -> None:
    """Sliding windows, sinks, recurrent layers beside, ALiBi, a softcap."""
    path, tokens = architectures[name].path, _tokens(300)
    with _open(path, "off") as plain, _open(path) as paged:
        for a, b in zip(_story(plain, tokens, 297), _story(paged, tokens, 297), strict=True):
            assert np.array_equal(a, b)


def test_f16_within_its_rounding(llama: Path) -> None:
    tokens = _tokens(100)
    with _open(llama, "off", types=(F16, F16)) as plain, _open(llama, types=(F16, F16)) as paged:
        a, b = _read(plain, tokens), _read(paged, tokens)
    assert 0 < np.abs(a - b).max() < 0.05 * np.abs(a).max()


@pytest.mark.parametrize("unified", [False, True])
def test_sequences_beside_each_other(llama: Path, unified: bool) -> None:
    """Bits for streams; in a unified cache each sequence is read alone, where upstream looks at all cells."""
    a, b = _tokens(200), _tokens(200, seed=1)
    logits = []
    for kv in ("off", "paged"):
        with _open(llama, kv, n_seq=2, unified=unified, n_ctx=512, ubatch=32) as both:
            for first in range(0, 200, 16):
                entries = [(t, first + i, 0) for i, t in enumerate(a[first : first + 16])]
                entries += [(t, first + i, 1) for i, t in enumerate(b[first : first + 16])]
                last = both.decode_all(entries)
            logits.append([last, both.decode([7], 200, 0), both.decode([9], 200, 1)])
    for plain, paged in zip(*logits, strict=True):
        assert _close(paged, plain) if unified else np.array_equal(paged, plain)


@pytest.mark.parametrize("unified", [False, True])
def test_copies_share_and_diverge(llama: Path, unified: bool) -> None:
    prompt, n_ctx = _tokens(150), 1024 if unified else 512
    with _open(llama, "off", n_seq=2, unified=unified, n_ctx=n_ctx) as plain:
        results = []
        with _open(llama, "paged,budget=40%", n_seq=2, unified=unified, n_ctx=n_ctx) as paged:
            for context in (plain, paged):
                _read(context, prompt)
                context.copy(0, 1)
                more = [_read(context, _tokens(60, seed=s + 1), 150, s) for s in (0, 1)]
                assert context.remove(0, -1)
                more.append(context.decode([3], 210, 1))
                assert context.remove(1, 160)
                results.append([*more, context.decode([4], 160, 1)])
    assert all(_close(b, a) for a, b in zip(*results, strict=True))


def test_cuts_and_holes(llama: Path) -> None:
    """A tail that is cut is read again; a hole stays one, with the tokens behind it."""
    tokens = _tokens(200)
    results = []
    for kv in ("off", "paged"):
        with _open(llama, kv) as context:
            _read(context, tokens)
            assert context.remove(0, 130)
            again = _read(context, tokens[130:], 130)
            assert context.remove(0, 20, 90)
            results.append([again, context.decode([5], 200)])
            assert context.pos_min() == 0
            assert context.remove(0, 0)
            assert context.pos_min() == -1
            results[-1].append(_read(context, tokens))
    for plain, paged in zip(*results, strict=True):
        assert _close(paged, plain)


def test_a_full_pool_is_told_before_anything_is_computed(llama: Path) -> None:
    """The batch is refused with nothing changed; what is given back can be used."""
    tokens = _tokens(300)
    with _open(llama, "paged,budget=50%") as paged:
        _read(paged, tokens[:200])
        entries = [(t, 200 + i, 0) for i, t in enumerate(tokens[200:300])]
        assert paged.try_decode(entries) == 1
        assert paged.pos_max() == 199
        expected = paged.decode(tokens[200:250], 200)
        assert paged.try_decode([(1, 250 + i, 0) for i in range(7)]) == 1
        assert paged.remove(0, 200)
        assert np.array_equal(paged.decode(tokens[200:250], 200), expected)


def test_blocks_come_back(llama: Path) -> None:
    """Sequences come and go for as long as one wants."""
    with _open(llama, "paged,budget=256", n_seq=3, unified=True, n_ctx=768) as paged:
        for i in range(12):
            sequence = i % 3
            paged.remove(sequence, 0)
            _read(paged, _tokens(190, seed=i), 0, sequence)
            paged.remove((sequence + 1) % 3, 64 * (i % 3))


@pytest.mark.parametrize("unified", [False, True])
def test_states_go_from_one_kind_of_cache_to_the_other(llama: Path, unified: bool) -> None:
    tokens = _tokens(150)
    options = {"n_seq": 2, "unified": unified, "n_ctx": 512}
    with _open(llama, "off", **options) as plain, _open(llama, **options) as paged:
        for context in (plain, paged):
            _read(context, _tokens(40, seed=5), 0, 1)
            _read(context, tokens)
        for sequence in (0, 1):
            a, b = plain.save(sequence), paged.save(sequence)
            assert len(a) == len(b) if unified else a == b  # unified, layers behind the first have other bits
        for source, target in ((plain, paged), (paged, plain), (paged, paged)):
            assert target.restore(source.save(0), 1)
            for context in (source, target):
                context.remove(0, 150)
                context.remove(1, 150)
            assert _close(target.decode([3], 150, 1), source.decode([3], 150, 0))
        whole = paged.save_all()
        expected = paged.decode([8], 151, 0)
        assert paged.remove(-1, 0)
        assert paged.restore_all(whole)
        assert _close(paged.decode([8], 151, 0), expected)


def test_a_state_that_does_not_fit(llama: Path) -> None:
    with _open(llama) as large, _open(llama, "paged,budget=128") as small:
        _read(large, _tokens(200))
        state = large.save()
        _read(small, _tokens(30, seed=1))
        assert not small.restore(state)
        assert not small.restore(state[: len(state) // 2])
        assert any("of the pool's blocks are free" in line for line in log_lines())
        assert small.pos_min() == -1
        _read(small, _tokens(120))


@pytest.mark.parametrize(
    ("options", "kv", "line"),
    [
        ({"types": (0, 0)}, "paged", "no kernels for a cache of type f32; take -ctk"),
        ({"types": (F16, F16), "flash": False}, "paged", "needs flash attention; take -fa on"),
        ({}, "paged,budget=1K", "is less than 1 for -ub 64"),
        ({}, "paged,sink=4", "is 'paged,sink=4'; set it to off; paged"),
        ({}, "budget=4G", "is 'budget=4G'"),
        ({}, "budget=10%,paged", "is 'budget=10%,paged'"),
    ],
)
def test_refusals(llama: Path, options: dict[str, object], kv: str, line: str) -> None:
    with _open(llama, kv, **options) as context:
        assert not context.context
        assert any(line in text for text in context.log), context.log


def test_a_latent_cache_is_refused(architectures: dict[str, ArchModel]) -> None:
    with _open(architectures["deepseek2-moe"].path) as context:
        assert not context.context
        assert any("latent cache (architecture deepseek2) cannot be paged" in text for text in context.log)


def test_attention_that_is_off(llama: Path, patched_bin_dir: Path) -> None:
    """The setting is read once per process."""
    environment = {**os.environ, "GGML_EXT_KV": "paged", "GGML_EXT_ATTN": "off"}
    command = [patched_bin_dir / "llama-server", "-m", llama, "-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert (
        "paged attention is computed in 8-bit integers; unset GGML_EXT_ATTN=off" in done.stdout + done.stderr
    )


def test_the_size_is_what_it_says(llama: Path) -> None:
    """2 layers of 2 heads of 128 at q8_0: blocks of 256 + 64 * 2 * 136 bytes."""
    with _open(llama, "paged,budget=8M", n_ctx=8192) as paged:
        line = next(text for text in paged.log if "ggml-ext: paged: " in text)
    found = re.search(r"paged: ([\d.]+) MiB, (\d+) blocks of 64 tokens for each of 4 heads", line)
    assert found
    assert int(found[2]) == 8 * 2**20 // (4 * (256 + 64 * 2 * 136))
    assert float(found[1]) == pytest.approx(int(found[2]) * 4 * (256 + 64 * 2 * 136) / 2**20, abs=0.01)


def test_the_server(
    architectures: dict[str, ArchModel],
    patched_bin_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Slots that come and go, prompts that go on or branch off; the same tokens as from a plain cache."""
    model, tokens = architectures["llama-dense"], _tokens(300)
    prompts = [tokens, [*tokens, 5, 6], [*tokens[:100], *_tokens(50, seed=2)], _tokens(90, seed=3), tokens]
    answers = []
    for kv in ("off", "paged"):
        monkeypatch.setenv("GGML_EXT_KV", kv)
        options = ["-c", "1024", "-ub", "64", "-np", "2", "-kvu", "-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"]
        options += ["--override-kv", f"{model.arch}.context_length=int:1024"]
        log = tmp_path / kv
        with server_files.server(patched_bin_dir / "llama-server", model.path, log, *options) as ask:
            answers.append(
                [
                    ask("completion", {"prompt": p, "n_predict": 4, "temperature": 0})[1]["content"]
                    for p in prompts
                ]
            )
    assert answers[0] == answers[1]
    assert "ggml-ext: paged: " in log.read_text()


def test_positions_that_have_no_place(llama: Path) -> None:
    """Two tokens of one position, which upstream takes, and positions that no table can be made for."""
    with _open(llama) as paged, _open(llama, "off") as plain:
        entries = [(5, 0, 0), (6, 1, 0), (7, 1, 0)]
        assert plain.try_decode(entries) == 0
        assert paged.try_decode(entries) == 1
        assert any("position 1 of sequence 0: in a paged KV cache positions rise" in s for s in log_lines())
        last = 2**24 - 1
        assert paged.try_decode([(5, last, 0), (6, last + 1, 0)]) == 1
        assert paged.try_decode([(5, last, 0)]) == 0
        assert paged.remove(0, 0)
        assert plain.remove(0, 0)
        assert plain.try_decode([(5, 2**30, 0)]) == 0
        assert not paged.restore(plain.save())
        _read(paged, _tokens(70))


def test_every_other_architecture(architectures: dict[str, ArchModel]) -> None:
    """Equal bits, or a context that is refused in one line."""
    tokens, refused = _tokens(104), []
    for name in sorted(architectures):
        logits = []
        with _open(architectures[name].path, "off", n_ctx=256, batch=32, ubatch=32) as plain:
            if not plain.context:
                continue  # heads that q8_0 does not divide, other attention
            logits.append(
                [_read(plain, tokens[:97]), *(plain.decode([t], 97 + i) for i, t in enumerate(tokens[97:]))]
            )
        with _open(architectures[name].path, n_ctx=256, batch=32, ubatch=32) as paged:
            if not paged.context:
                assert any("GGML_EXT_KV: " in line for line in paged.log), name
                refused.append(name)
                continue
            logits.append(
                [_read(paged, tokens[:97]), *(paged.decode([t], 97 + i) for i, t in enumerate(tokens[97:]))]
            )
        assert np.array_equal(*logits), name
    assert len(refused) < 30, refused


PREFIX = 192  # three blocks of 64


def _two(path: Path, kv: str, **options: object) -> Context:
    values: dict[str, object] = {"n_seq": 3, "unified": True, "n_ctx": 1536}
    return _open(path, kv, **(values | options))


@pytest.mark.parametrize("unified", [False, True])
def test_equal_beginnings_are_stored_once(llama: Path, unified: bool) -> None:
    """Three requests of four blocks, three of them common, in a pool of nine; the logits of a cache that has
    room for all."""
    requests = [[*_tokens(PREFIX), *_tokens(20, seed=s + 1)] for s in range(3)]
    results = []
    for kv in ("off", "paged,budget=192"):
        with _two(llama, kv, unified=unified, n_ctx=1536 if unified else 512) as context:
            results.append([_read(context, request, 0, s) for s, request in enumerate(requests)])
            results[-1] += [context.decode([3], PREFIX + 20, s) for s in range(3)]
    for plain, paged in zip(*results, strict=True):
        assert _close(paged, plain)


def _leaves_room(context: Context, tokens: Sequence[int]) -> bool:
    """Whether sequence 1 leaves room for a third one beside sequence 0."""
    _read(context, tokens, 0, 1)
    context.decode([1], len(tokens), 1)
    return context.try_decode([(t, i, 2) for i, t in enumerate(_tokens(PREFIX, seed=9))]) == 0


def test_what_is_not_equal_is_not_shared(llama: Path) -> None:
    """One token of the first block, the order of blocks, a beginning that is cut and read anew."""
    tokens = _tokens(PREFIX)
    kv = "paged,budget=192"  # 9 blocks per list
    with _two(llama, kv) as paged:
        _read(paged, tokens)
        assert _leaves_room(paged, tokens)
    for other in ([*tokens[:5], tokens[5] + 1, *tokens[6:]], [*tokens[64:128], *tokens[:64], *tokens[128:]]):
        with _two(llama, kv) as paged:
            _read(paged, tokens)
            assert not _leaves_room(paged, other)
    with _two(llama, kv) as paged:
        _read(paged, tokens)
        paged.remove(0, 10)
        changed = [*tokens[:10], *_tokens(PREFIX - 10, seed=4)]
        _read(paged, changed[10:], 10)
        assert not _leaves_room(paged, tokens)
        assert _close(paged.decode([1], PREFIX, 0), _alone(llama, [*changed, 1]))


def _alone(path: Path, tokens: Sequence[int]) -> NDArray[np.float32]:
    with _two(path, "off") as plain:
        return _read(plain, tokens)


def test_a_shared_beginning_outlives_its_first_reader(llama: Path) -> None:
    tokens = _tokens(PREFIX)
    with _two(llama, "paged,budget=192") as paged:
        for s in (0, 1):
            _read(paged, tokens, 0, s)
            paged.decode([1], PREFIX, s)
        paged.remove(0, 0)
        _read(paged, _tokens(PREFIX, seed=5), 0, 0)  # takes what became free
        assert _close(paged.decode([2], PREFIX + 1, 1), _alone(llama, [*tokens, 1, 2]))
        paged.remove(1, 70)  # into the shared part
        _read(paged, tokens[70:100], 70, 1)
        assert _close(paged.decode([2], 100, 1), _alone(llama, [*tokens[:100], 2]))


def test_adapters_make_other_rows(llama: Path, tmp_path: Path) -> None:
    """The same tokens under an adapter are other rows, under the same one the same."""
    tokens = _tokens(PREFIX)
    shapes = {"blk.0.attn_k.weight": (256, 256), "blk.0.ffn_down.weight": (256, 384)}
    adapter = folds.write_adapter(tmp_path / "a.gguf", shapes)
    for before, after, room in ((0.0, 1.0, False), (1.0, 1.0, True), (1.0, 0.5, False)):
        with _two(llama, "paged,budget=192") as paged:
            paged.adapt(adapter, before)
            _read(paged, tokens)
            paged.adapt(adapter, after)
            assert _leaves_room(paged, tokens) == room, (before, after)


def test_rows_of_an_aborted_graph_are_not_shared(llama: Path) -> None:
    """They are removed, but in a block whose beginning stays."""
    tokens, results = _tokens(64), []
    for kv in ("off", "paged"):
        with _two(llama, kv) as context:
            _read(context, tokens[:32])
            context.stop_after(12)
            assert context.try_decode([(t, 32 + i, 0) for i, t in enumerate(tokens[32:])]) == 2
            context.stop_after(None)
            assert context.pos_max() == 31
            results.append([_read(context, tokens, 0, 1), context.decode([5], 64, 1)])
            results[-1] += [_read(context, tokens[32:], 32), context.decode([5], 64)]
    for plain, paged in zip(*results, strict=True):
        assert _close(paged, plain)


def test_rows_that_see_later_tokens_are_not_shared(llama: Path) -> None:
    results = []
    for kv in ("off", "paged"):
        with _two(llama, kv, ubatch=128, batch=128) as context:
            context.api.llama_set_causal_attn(context.context, False)
            for s in (0, 1):
                _read(context, [*_tokens(64), *_tokens(40, seed=s + 1)], 0, s)
            context.api.llama_set_causal_attn(context.context, True)
            results.append([context.decode([3], 104, s) for s in (0, 1)])
    for plain, paged in zip(*results, strict=True):
        assert _close(paged, plain)
