"""llama-server on KV caches that have forgotten what lies in front of a boundary.

What would break these: a prompt that is continued where positions in front of it are missing, one that is
read anew though all that it needs is there, a refused cut that ends the server, a slot's figures that are
another one's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import server_files
from arch_models import ArchModel
from kv_coded import exact_codebooks
from kv_paged import random_tokens

PAGED = ["-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"]


def _prompt_tokens(ask: server_files.Ask, tokens: Sequence[int]) -> int:
    """How many tokens of the prompt llama-server has read."""
    body = {"prompt": tokens, "n_predict": 1, "cache_prompt": True, "temperature": 0}
    status, reply = ask("completion", body)
    assert status == 200, reply
    return int(reply["timings"]["prompt_n"])


@pytest.mark.parametrize("name", ["llama-dense", "gemma3-dense"])
@pytest.mark.parametrize(
    ("kv", "cache", "line"),
    [
        ("budget=512,policy=window,sink=16,recent=64", [], "policy window: 512 cells"),
        ("paged,budget=512,policy=attention", PAGED, "policy attention, sink 16, recent 64 stay"),
    ],
    ids=["window", "attention"],
)
def test_the_server_reads_again_what_is_missing(
    architectures: dict[str, ArchModel],
    patched_bin_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    kv: str,
    cache: list[str],
    line: str,
) -> None:
    """A prompt that goes on is continued; one that branches off where positions are missing is read from its
    beginning, and none makes the server end."""
    monkeypatch.setenv("GGML_EXT_KV", kv)
    program, log, tokens = patched_bin_dir / "llama-server", tmp_path / "log", random_tokens(800)
    model = architectures[name]
    options = ["-c", "1024", "-ub", "64", "--ctx-checkpoints", "0", *cache]
    options += ["--override-kv", f"{model.arch}.context_length=int:1024"]
    with server_files.server(program, model.path, log, *options) as ask:
        assert _prompt_tokens(ask, tokens) == 800
        assert _prompt_tokens(ask, [*tokens, 5, 6, 7]) < 10
        assert _prompt_tokens(ask, [*tokens[:200], *random_tokens(20, seed=3)]) == 220
        assert _prompt_tokens(ask, [*tokens[:200], *random_tokens(20, seed=4)]) <= 21
    assert line in log.read_text()


def _metrics(text: str) -> dict[str, list[float]]:
    """Values of our series, by slot."""
    found: dict[str, list[float]] = {}
    for name, value in re.findall(r'^ggml_ext:kv_(\w+)\{slot="\d+"\} (\S+)$', text, re.MULTILINE):
        found.setdefault(name, []).append(float(value))
    return found


@pytest.mark.parametrize(
    ("kv", "policy", "most"),
    [
        ("paged", "keep", 512),
        ("paged,budget=192,policy=norm", "norm", 384),
        ("budget=256,policy=window,sink=16,recent=64", "window", 512),
        ("paged,cold=cq2", "keep", 384),
    ],
)
def test_what_slots_hold(
    architectures: dict[str, ArchModel],
    patched_bin_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kv: str,
    policy: str,
    most: int,
) -> None:
    """In /slots and in /metrics: two prompts, of which the second begins as the first."""
    program, tokens = patched_bin_dir / "llama-server", random_tokens(800)
    model, coded = architectures["llama-dense"].path, "cold" in kv
    if coded:
        model = exact_codebooks(model, tokens, np.arange(16, 272), tmp_path / "coded.gguf")
    monkeypatch.setenv("GGML_EXT_KV", kv)
    options = ["-c", "2048", "-ub", "64", "-np", "2", "-kvu", "--no-cache-idle-slots", "--metrics", *PAGED]
    options += ["--override-kv", "llama.context_length=int:2048"]
    with server_files.server(program, model, tmp_path / "log", *options) as ask:
        for slot, prompt in ((0, tokens[:400]), (1, tokens[:480])):
            body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "id_slot": slot}
            assert ask("completion", body)[0] == 200
        figures = [slot["kv"] for slot in ask("slots")[1]]
        metrics = _metrics(ask("metrics")[1])
    for slot, its in enumerate(figures):
        assert (its["policy"], its["codes"] > 0) == (policy, coded)
        assert 400 + 80 * slot <= its["tokens"] <= 401 + 80 * slot
        assert its["rows"] + its["codes"] + its["evicted"] == its["tokens"]
        assert its["rows"] <= most
        assert {name: of_slots[slot] for name, of_slots in metrics.items()} == {
            **{f"tokens_{name}": its[name] for name in ("rows", "codes", "evicted", "shared")},
            "tokens": its["tokens"],
            "bytes": its["bytes"],
        }
    assert (sum(its["evicted"] for its in figures) == 0) == (policy == "keep")
    shared = 384 if kv == "paged" else 0  # whole blocks of the equal beginning
    assert [its["shared"] for its in figures] == [shared, shared]


def test_without_a_setting_there_is_nothing(
    architectures: dict[str, ArchModel], patched_bin_dir: Path, tmp_path: Path
) -> None:
    model = architectures["llama-dense"].path
    with server_files.server(patched_bin_dir / "llama-server", model, tmp_path / "log", "--metrics") as ask:
        assert "kv" not in ask("slots")[1][0]
        assert "ggml_ext" not in ask("metrics")[1]
