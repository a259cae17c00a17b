"""llama-server on KV caches that have forgotten what lies in front of a boundary.

What would break these: a prompt that is continued where positions in front of it are missing, one that is
read anew though all that it needs is there, a refused cut that ends the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

import server_files
from arch_models import ArchModel
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
