"""Paged caches and what is not as it should be: damaged states, copies that nobody expects, settings.

What would break these: a position of a state that is used as an index unchecked, two tokens at one place, a
failed restore that zeroes rows which are not there, room promised to sequences that the context was not made
for, a setting that is silently without effect.
"""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from arch_models import ArchModel
from ggml_ext.runtime.llama import log_lines
from kv_evicted import OneLayer, different_tokens
from kv_paged import open_cache, random_tokens, read

N = 200
POLICIES = ["paged", "paged,budget=256,policy=norm", "paged,budget=256,policy=attention"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return OneLayer().write(tmp_path_factory.mktemp("trust") / "one-layer.gguf")


def _cells(state: bytes) -> int:
    """Where a state of N tokens of one sequence has its cells: position, 1, the sequence; 12 bytes each."""
    first = struct.pack("<IiIi", N, 0, 1, 0)
    assert state.count(first) == 1
    return state.index(first) + 4


def _position(cell: int, value: int) -> Callable[[bytes], bytes]:
    def change(state: bytes) -> bytes:
        at = _cells(state) + 12 * cell
        return state[:at] + struct.pack("<i", value) + state[at + 4 :]

    return change


def _of_no_sequence(state: bytes) -> bytes:
    at = _cells(state) + 12 * 7 + 4
    return state[:at] + struct.pack("<I", 0) + state[at + 8 :]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "negative": (_position(5, -1), "the state has position -1, a paged KV cache takes 0 to"),
    "very negative": (_position(5, -2), "the state has position -2, a paged KV cache takes 0 to"),
    "least": (_position(0, -(2**31)), "the state has position -2147483648"),
    "far": (_position(N - 1, 2**24), "the state has position 16777216"),
    "twice": (_position(6, 5), "the state has position 5 of a sequence twice"),
    "last twice": (_position(N - 1, 0), "the state has position 0 of a sequence twice"),
    "nobody's": (_of_no_sequence, "the state has position 7 of no sequence"),
}


@pytest.mark.parametrize("kv", POLICIES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_cells_of_a_damaged_state(path: Path, kv: str, damage: str) -> None:
    """Refused, by the whole context's state and by a sequence's; the cache then is as good as new."""
    change, line = DAMAGES[damage]
    tokens = different_tokens(N)
    with open_cache(path, kv) as context:
        expected = read(context, tokens)
        for save, restore in ((context.save_all, context.restore_all), (context.save, context.restore)):
            state = save()
            assert not restore(change(state))
            # A sequence's cells have one sequence, which llama.cpp sees to itself.
            if damage != "nobody's" or save == context.save_all:
                assert any(line in logged for logged in log_lines()), log_lines()
            assert context.pos_max() == -1
            assert np.array_equal(read(context, tokens), expected)
            assert restore(state)
            assert context.pos_max() == N - 1
            context.remove(0, 0)
            read(context, tokens)


@pytest.mark.parametrize("kv", ["off", *POLICIES])
@pytest.mark.parametrize("name", ["falcon-h1-dense", "gemma3-dense", "llama-dense"])
def test_a_state_that_ends_early(architectures: dict[str, ArchModel], name: str, kv: str) -> None:
    """Of a hybrid model the recurrent part comes last: it fails when the attention's cells are restored."""
    tokens = random_tokens(150)
    with open_cache(architectures[name].path, kv) as context:
        read(context, tokens)
        state = context.save()
        for cut in (1, len(state) // 3, len(state) - 50):
            assert not context.restore(state[:-cut])
            assert context.pos_max() == -1
        read(context, tokens)
        assert context.restore(state)
        assert np.isfinite(read(context, [1, 2, 3], len(tokens))).all()


def test_more_sequences_than_the_context_was_made_for(path: Path) -> None:
    """Copies go to any of 256. What they need may leave no room for a ubatch: refused with a full cache's
    status before anything is computed, and fine again when some are gone."""
    with open_cache(path, "paged,budget=256,policy=norm", n_ctx=4096, unified=True) as context:
        n = 0
        statuses = []
        for copy in range(8):
            tokens = different_tokens(150, copy)
            statuses.append(context.try_decode([(token, n + i, 0) for i, token in enumerate(tokens[:64])]))
            n += 64 if statuses[-1] == 0 else 0
            context.copy(0, 10 + copy)
        assert statuses[0] == 0
        assert 1 in statuses
        assert any("raise the budget or lower -ub" in line for line in log_lines())
        for copy in range(8):
            assert context.remove(10 + copy, 0)
        assert np.isfinite(read(context, different_tokens(64, 9), n)).all()


@pytest.mark.parametrize("kv", POLICIES)
def test_a_copy_that_is_there_already(path: Path, kv: str) -> None:
    tokens = different_tokens(150)
    with open_cache(path, kv, n_ctx=4096, n_seq=3, unified=True) as context:
        read(context, tokens[:100])
        context.copy(0, 1, 0, 70)
        context.copy(0, 1)
        read(context, tokens[100:], 100)
        context.copy(0, 1, 100, 150)
        context.copy(0, 1, 100, 150)
        a, b = (context.decode([7], 150, sequence) for sequence in (0, 1))
        assert np.allclose(a, b, atol=1e-3 * np.abs(a).max())


@pytest.mark.parametrize("kv", POLICIES)
def test_a_copy_over_other_positions_is_left_out(path: Path, kv: str) -> None:
    with open_cache(path, kv, n_ctx=4096, n_seq=3, unified=True) as context:
        read(context, different_tokens(70))
        read(context, different_tokens(80, 1), 0, 1)
        expected = context.save(1)
        log_lines()
        context.copy(0, 1, 10, 20)
        assert any(
            "cannot copy positions 10 .. of sequence 0 into sequence 1" in line for line in log_lines()
        )
        context.remove(0, 0)
        assert np.isfinite(context.decode([7], 80, 1)).all()
        assert context.remove(1, 80)
        assert context.save(1)[-1000:] == expected[-1000:]


def test_a_window_whose_sum_overflows(path: Path) -> None:
    with open_cache(path, "budget=256,sink=4294967295,recent=65") as context:
        assert not context.context
        assert any("a budget of 256 cells is less than 1 x (sink 4294967295" in line for line in context.log)


@pytest.mark.parametrize(
    "kv", ["paged,budget=256,sink=3,recent=70,policy=norm", "paged,sink=3,budget=256,policy=norm"]
)
def test_the_order_of_a_setting_is_free(path: Path, kv: str) -> None:
    with open_cache(path, kv) as context:
        assert any("policy norm, sink 3" in line for line in context.log)


@pytest.mark.parametrize(("n_ctx", "warned"), [(2048, False), (4096, True)])
def test_a_budget_that_forgets_most_is_warned_of(path: Path, n_ctx: int, warned: bool) -> None:
    with open_cache(path, "paged,budget=256,policy=norm", n_ctx=n_ctx) as context:
        assert any("keeps less than 1 of 8 tokens" in line for line in context.log) == warned


@pytest.mark.parametrize("kv", ["paged", "paged,budget=128", "25%"])
def test_a_model_without_a_cache_says_so(architectures: dict[str, ArchModel], kv: str) -> None:
    kv = f"budget={kv}" if "%" in kv else kv
    with open_cache(architectures["mamba-dense"].path, kv) as context:
        assert any("this model has no cache that GGML_EXT_KV could act on" in line for line in context.log)
        assert np.isfinite(read(context, random_tokens(20))).all()


@pytest.mark.parametrize(
    ("kv", "fits"), [("paged", True), ("paged,budget=256", False), ("paged,policy=norm", False)]
)
def test_layers_on_another_device(
    path: Path, patched_bin_dir: Path, rpc_server: str, kv: str, fits: bool
) -> None:
    """Pages are for the CPU. What asked for no bound gets llama.cpp's cache; a budget is not dropped."""
    command = [str(patched_bin_dir / "llama-bench"), "-m", str(path), "--rpc", rpc_server, "-ngl", "99"]
    command += ["-p", "16", "-n", "0", "-r", "1", "-fa", "1", "-ctk", "q8_0", "-ctv", "q8_0", "-v"]
    done = subprocess.run(
        command, env=os.environ | {"GGML_EXT_KV": kv}, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode == 0) == fits, done.stderr[-2000:]
    assert "paged storage is for the CPU" in done.stderr
    assert ("so the cache stays llama.cpp's" in done.stderr) == fits
