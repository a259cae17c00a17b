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

import server_files
from arch_models import ArchModel
from ggml_ext.runtime.llama import log_lines
from kv_context import Context
from kv_paged import F16, IQ4_NL, Q4_0, Q5_0, Q8_0, close, open_cache, random_tokens, read


@pytest.fixture(scope="module")
def llama(architectures: dict[str, ArchModel]) -> Path:
    return architectures["llama-dense"].path


def _story(context: Context, tokens: Sequence[int], prompt: int) -> list[NDArray[np.float32]]:
    """A prompt and then a token at a time."""
    results = [read(context, tokens[:prompt])]
    return results + [context.decode([token], prompt + i) for i, token in enumerate(tokens[prompt:])]


TYPES = [(Q8_0, Q8_0), (Q4_0, Q4_0), (Q5_0, Q5_0), (IQ4_NL, IQ4_NL), (Q8_0, Q4_0)]


@pytest.mark.parametrize("types", TYPES)
def test_bits_of_a_sequence(llama: Path, types: tuple[int, int]) -> None:
    tokens = random_tokens(70)
    with open_cache(llama, "off", types=types) as plain, open_cache(llama, types=types) as paged:
        assert any("paged: " in line and "room for 512 of 512 tokens" in line for line in paged.log)
        for a, b in zip(_story(plain, tokens, 65), _story(paged, tokens, 65), strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize(("ubatch", "prompt"), [(1, 63), (7, 64), (64, 257), (512, 257)])
@pytest.mark.parametrize("threads", [1, 3])
def test_bits_at_the_edges_of_blocks(llama: Path, ubatch: int, prompt: int, threads: int) -> None:
    tokens = random_tokens(prompt + 3)
    with (
        open_cache(llama, "off", ubatch=ubatch) as plain,
        open_cache(llama, ubatch=ubatch, threads=threads) as paged,
    ):
        for a, b in zip(_story(plain, tokens, prompt), _story(paged, tokens, prompt), strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize(
    "name", ["gemma3-dense", "gpt-oss-moe", "falcon-h1-dense", "bloom-dense", "gemma2-dense"]
)
def test_other_graphs(architectures: dict[str, ArchModel], name: str) -> None:
    """Sliding windows, sinks, recurrent layers beside, ALiBi, a softcap."""
    path, tokens = architectures[name].path, random_tokens(300)
    with open_cache(path, "off") as plain, open_cache(path) as paged:
        for a, b in zip(_story(plain, tokens, 297), _story(paged, tokens, 297), strict=True):
            assert np.array_equal(a, b)


def test_f16_within_its_rounding(llama: Path) -> None:
    tokens = random_tokens(100)
    with open_cache(llama, "off", types=(F16, F16)) as plain, open_cache(llama, types=(F16, F16)) as paged:
        a, b = read(plain, tokens), read(paged, tokens)
    assert 0 < np.abs(a - b).max() < 0.05 * np.abs(a).max()


@pytest.mark.parametrize("unified", [False, True])
def test_sequences_beside_each_other(llama: Path, unified: bool) -> None:
    """Bits for streams; in a unified cache each sequence is read alone, where upstream looks at all cells."""
    a, b = random_tokens(200), random_tokens(200, seed=1)
    logits = []
    for kv in ("off", "paged"):
        with open_cache(llama, kv, n_seq=2, unified=unified, n_ctx=512, ubatch=32) as both:
            for first in range(0, 200, 16):
                entries = [(t, first + i, 0) for i, t in enumerate(a[first : first + 16])]
                entries += [(t, first + i, 1) for i, t in enumerate(b[first : first + 16])]
                last = both.decode_all(entries)
            logits.append([last, both.decode([7], 200, 0), both.decode([9], 200, 1)])
    for plain, paged in zip(*logits, strict=True):
        assert close(paged, plain) if unified else np.array_equal(paged, plain)


@pytest.mark.parametrize("unified", [False, True])
def test_copies_share_and_diverge(llama: Path, unified: bool) -> None:
    prompt, n_ctx = random_tokens(150), 1024 if unified else 512
    with open_cache(llama, "off", n_seq=2, unified=unified, n_ctx=n_ctx) as plain:
        results = []
        with open_cache(llama, "paged,budget=40%", n_seq=2, unified=unified, n_ctx=n_ctx) as paged:
            for context in (plain, paged):
                read(context, prompt)
                context.copy(0, 1)
                more = [read(context, random_tokens(60, seed=s + 1), 150, s) for s in (0, 1)]
                assert context.remove(0, -1)
                more.append(context.decode([3], 210, 1))
                assert context.remove(1, 160)
                results.append([*more, context.decode([4], 160, 1)])
    assert all(close(b, a) for a, b in zip(*results, strict=True))


def test_cuts_and_holes(llama: Path) -> None:
    """A tail that is cut is read again; a hole stays one, with the tokens behind it."""
    tokens = random_tokens(200)
    results = []
    for kv in ("off", "paged"):
        with open_cache(llama, kv) as context:
            read(context, tokens)
            assert context.remove(0, 130)
            again = read(context, tokens[130:], 130)
            assert context.remove(0, 20, 90)
            results.append([again, context.decode([5], 200)])
            assert context.pos_min() == 0
            assert context.remove(0, 0)
            assert context.pos_min() == -1
            results[-1].append(read(context, tokens))
    for plain, paged in zip(*results, strict=True):
        assert close(paged, plain)


def test_a_full_pool_is_told_before_anything_is_computed(llama: Path) -> None:
    """The batch is refused with nothing changed; what is given back can be used."""
    tokens = random_tokens(300)
    with open_cache(llama, "paged,budget=50%") as paged:
        read(paged, tokens[:200])
        entries = [(t, 200 + i, 0) for i, t in enumerate(tokens[200:300])]
        assert paged.try_decode(entries) == 1
        assert paged.pos_max() == 199
        expected = paged.decode(tokens[200:250], 200)
        assert paged.try_decode([(1, 250 + i, 0) for i in range(7)]) == 1
        assert paged.remove(0, 200)
        assert np.array_equal(paged.decode(tokens[200:250], 200), expected)


def test_blocks_come_back(llama: Path) -> None:
    """Sequences come and go for as long as one wants."""
    with open_cache(llama, "paged,budget=256", n_seq=3, unified=True, n_ctx=768) as paged:
        for i in range(12):
            sequence = i % 3
            paged.remove(sequence, 0)
            read(paged, random_tokens(190, seed=i), 0, sequence)
            paged.remove((sequence + 1) % 3, 64 * (i % 3))


@pytest.mark.parametrize("unified", [False, True])
def test_states_go_from_one_kind_of_cache_to_the_other(llama: Path, unified: bool) -> None:
    tokens = random_tokens(150)
    options = {"n_seq": 2, "unified": unified, "n_ctx": 512}
    with open_cache(llama, "off", **options) as plain, open_cache(llama, **options) as paged:
        for context in (plain, paged):
            read(context, random_tokens(40, seed=5), 0, 1)
            read(context, tokens)
        for sequence in (0, 1):
            a, b = plain.save(sequence), paged.save(sequence)
            assert len(a) == len(b) if unified else a == b  # unified, layers behind the first have other bits
        for source, target in ((plain, paged), (paged, plain), (paged, paged)):
            assert target.restore(source.save(0), 1)
            for context in (source, target):
                context.remove(0, 150)
                context.remove(1, 150)
            assert close(target.decode([3], 150, 1), source.decode([3], 150, 0))
        whole = paged.save_all()
        expected = paged.decode([8], 151, 0)
        assert paged.remove(-1, 0)
        assert paged.restore_all(whole)
        assert close(paged.decode([8], 151, 0), expected)


def test_a_state_that_does_not_fit(llama: Path) -> None:
    with open_cache(llama) as large, open_cache(llama, "paged,budget=128") as small:
        read(large, random_tokens(200))
        state = large.save()
        read(small, random_tokens(30, seed=1))
        assert not small.restore(state)
        assert not small.restore(state[: len(state) // 2])
        assert any("of the pool's blocks are free" in line for line in log_lines())
        assert small.pos_min() == -1
        read(small, random_tokens(120))


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
    with open_cache(llama, kv, **options) as context:
        assert not context.context
        assert any(line in text for text in context.log), context.log


def test_a_latent_cache_is_refused(architectures: dict[str, ArchModel]) -> None:
    with open_cache(architectures["deepseek2-moe"].path) as context:
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
    with open_cache(llama, "paged,budget=8M", n_ctx=8192) as paged:
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
    model, tokens = architectures["llama-dense"], random_tokens(300)
    prompts = [
        tokens,
        [*tokens, 5, 6],
        [*tokens[:100], *random_tokens(50, seed=2)],
        random_tokens(90, seed=3),
        tokens,
    ]
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
    with open_cache(llama) as paged, open_cache(llama, "off") as plain:
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
        read(paged, random_tokens(70))


def test_every_other_architecture(architectures: dict[str, ArchModel]) -> None:
    """Equal bits, or a context that is refused in one line."""
    tokens, refused = random_tokens(104), []
    for name in sorted(architectures):
        logits = []
        with open_cache(architectures[name].path, "off", n_ctx=256, batch=32, ubatch=32) as plain:
            if not plain.context:
                continue  # heads that q8_0 does not divide, other attention
            logits.append(
                [read(plain, tokens[:97]), *(plain.decode([t], 97 + i) for i, t in enumerate(tokens[97:]))]
            )
        with open_cache(architectures[name].path, n_ctx=256, batch=32, ubatch=32) as paged:
            if not paged.context:
                assert any("GGML_EXT_KV: " in line for line in paged.log), name
                refused.append(name)
                continue
            logits.append(
                [read(paged, tokens[:97]), *(paged.decode([t], 97 + i) for i, t in enumerate(tokens[97:]))]
            )
        assert np.array_equal(*logits), name
    assert len(refused) < 30, refused
