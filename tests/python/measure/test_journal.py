"""Scores of unfinished evaluations: whole or dropped, kept until their results are delivered."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from test_evaluate import count_decodes

from eval_models import make_model, text_of
from ggml_ext.cli import entry as cli
from ggml_ext.core import outputs
from ggml_ext.measure import journal, scoring
from ggml_ext.measure.evaluate import perplexity

CTX = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.gguf, noisy.gguf and text.txt of some 600 tokens."""
    made = tmp_path_factory.mktemp("models")
    make_model(made / "base.gguf")
    make_model(made / "noisy.gguf", noise=0.1)
    (made / "text.txt").write_text(text_of(400))
    return made


def test_old_journals_are_removed(own_cache: Path) -> None:
    """Unless they are none, or a run holds them."""
    root = own_cache / "evaluate"
    old, users, held = (root / name for name in ("0" * 32, "my-scores", "1" * 32))
    for each in (old, users, held):
        each.mkdir(parents=True)
        (each / "a.scores").write_text("scores")
        (each / "lock").touch()
        for path in (*each.iterdir(), each):
            os.utime(path, (1, 1))
    with (held / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with journal.Journal({}, 31):
            pass
    assert not old.exists()
    assert users.exists()
    assert held.exists()


def scores_of(rows: int, value: float) -> NDArray[np.void]:
    return np.full(rows, value, scoring.SCORE)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-5], lambda data: data[:-100] + bytes(100), lambda _: bytes(5000)]
)
def test_a_damaged_journal_gives_whole_windows_only(
    own_cache: Path, damage: Callable[[bytes], bytes]
) -> None:
    """Torn, or filled with zeros after a power failure, which would count as perfect predictions."""
    with journal.Journal({"a": 1}, 31) as first:
        for value in (1, 2, 3):
            first.append("model", scores_of(31, value))
    (file,) = own_cache.glob("evaluate/*/*.scores")
    file.write_bytes(damage(file.read_bytes()))
    with journal.Journal({"a": 1}, 31) as second:
        found = second.windows("model")
        assert len(found) in (0, 2)
        for value, window in enumerate(found, 1):
            np.testing.assert_array_equal(window, scores_of(31, value))
        second.append("model", scores_of(31, 9))
        whole = len(second.windows("model"))
    with journal.Journal({"a": 1}, 31) as third:
        assert len(third.windows("model")) == whole


def test_without_locks_there_is_a_journal(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And windows that two runs have written at once are not counted twice."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with journal.Journal({}, 31) as one, journal.Journal({}, 31) as two:
        assert one.windows("model") == two.windows("model") == []
        one.append("model", scores_of(31, 1))
        two.append("model", scores_of(31, 1))
    with journal.Journal({}, 31) as third:
        assert len(third.windows("model")) == 1


def test_another_part_of_a_split_model_is_another_model(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_text("part")
    first = tmp_path / "m-00001-of-00002.gguf"
    before = outputs.identity(first)
    (tmp_path / "m-00002-of-00002.gguf").write_text("another part")
    assert outputs.identity(first) != before


def test_without_a_home_folder_one_can_measure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a container with a random user id."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GGML_EXT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert perplexity(folder / "base.gguf", folder / "text.txt", ctx=CTX, threads=1).windows > 0
    assert "set GGML_EXT_CACHE; this run cannot be resumed" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["perplexity", "compare"])
def test_results_that_cannot_be_written_are_not_lost(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    """A disk that is full at the end of hours: the same command, repeated, goes on from the scores."""
    base, out = str(folder / "base.gguf"), tmp_path / "o.json"
    arguments = [
        command,
        base,
        "-f",
        str(folder / "text.txt"),
        "--ctx",
        str(CTX),
        "-t",
        "1",
        "--json",
        str(out),
    ]
    if command == "compare":
        arguments[2:2] = [str(folder / "noisy.gguf"), "--rounds", "0", "--layers", "0"]
    monkeypatch.setattr(sys, "argv", ["ggml-ext", *arguments])

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 1
    assert "No space left" in capsys.readouterr().err
    assert not out.exists()
    decoded = count_decodes(monkeypatch)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert not decoded
    assert json.loads(out.read_text())


@pytest.mark.parametrize("command", ["perplexity", "inspect"])
def test_terminals_that_lack_signs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """A name that is not UTF-8, and a terminal without the plus-minus sign."""
    model = tmp_path / os.fsdecode(b"b\xe9.gguf")
    try:
        model.write_bytes((folder / "base.gguf").read_bytes())
    except OSError:
        pytest.skip("this file system does not know such names")
    arguments = [command, str(model)] + (
        ["-f", str(folder / "text.txt"), "-t", "1"] if command == "perplexity" else []
    )
    for encoding in ("ascii", "utf-8"):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors="strict"))
        monkeypatch.setattr(sys, "argv", ["ggml-ext", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        sys.stdout.flush()
        assert end.value.code == 0
        assert b"gguf" in written.getvalue()
