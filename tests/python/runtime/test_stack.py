"""Texts with long runs of one kind of character: tokenized, or one line; never a signal."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tiny_bpe
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.observe.importance import collect
from ggml_ext.runtime import stack
from ggml_ext.runtime.llama import Model
from ggml_ext.runtime.stack import longest_run

RUNS = ("a", " ", "=", "\n", "7", "字", "A", "_", "é\u0301")


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("", 0),
        ("one line.\nanother one\n", 11),
        ("x" * 5000 + ".\n", 5000),
        ("a b " * 100 + "\n", 400),
        ("." * 300, 300),
        ("._" * 300, 600),
        ("-" * 10 + "\n" * 90 + "a", 100),
        ("\u3000\n" * 50, 100),
        ("字" * 40 + "\n" + "b", 40),
    ],
)
def test_longest_run(text: str, length: int) -> None:
    assert longest_run(text.encode()) == length


def test_words_of_a_pre_tokenizer_on_whitespace() -> None:
    text = b"a,b." * 100
    assert longest_run(text) < 10
    assert longest_run(text, words=True) == 400


def test_bytes_that_are_no_utf8() -> None:
    assert longest_run(b"\xff" * 100 + b"\n") in (100, 101)


@pytest.fixture(scope="module", params=["gpt-4o", "tekken", "deepseek-llm"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pre-tokenizers that llama.cpp leaves to std::regex."""
    return tiny_bpe.write(tmp_path_factory.mktemp("bpe") / f"{request.param}.gguf", pre=request.param)


CHILD = """
import sys
from pathlib import Path
from ggml_ext.runtime.llama import Model
with Model(Path(sys.argv[1]), weights=False) as model:
    for run in sys.argv[3:]:
        tokens = model.tokenize(run.encode() * (int(sys.argv[2]) // len(run)))
        print(len(tokens), flush=True)
"""


def test_long_runs_are_tokenized(model: Path) -> None:
    """In a child, since what this guards against is a signal. Blanks take deepseek-llm quadratic time."""
    runs = [run for run in RUNS if run != " "] if "deepseek" in model.name else RUNS
    command = [sys.executable, "-c", CHILD, str(model), "60000", *runs]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    counts = [len(run.encode()) * (60000 // len(run)) for run in runs]  # the vocabulary is of bytes
    assert done.stdout.split() == [str(count) for count in counts]


def test_tokens_are_the_same_with_and_without_more_stack(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ("word " * 300 + "a" * 3000 + "== \n\n" * 300 + "12345" * 500 + " é字" * 400).encode()
    with Model(model, weights=False) as loaded:
        assert loaded.longest_run(text) > 2000
        in_thread = loaded.tokenize(text)
        np.testing.assert_array_equal(in_thread, loaded._tokenize(text, special=False))


def test_results_and_errors_come_back_from_the_thread() -> None:
    def fail() -> None:
        raise GgmlExtError("as it was")

    assert stack.call(lambda: 7, 1_000_000) == 7
    with pytest.raises(GgmlExtError, match="as it was"):
        stack.call(fail, 1_000_000)


def test_an_interruption_waits_for_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller then frees what the thread works on."""
    ended: list[bool] = []

    def work() -> None:
        time.sleep(0.5)
        ended.append(True)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stack, "_ORDINARY", 0)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            stack.call(work, 1)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ended == [True]


def test_a_run_beyond_memory_is_one_line() -> None:
    with pytest.raises(GgmlExtError, match=r"10000000000000 characters .* more than the system gives"):
        stack.call(lambda: 0, 10**13)


def test_importances_of_a_text_with_a_long_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tiny_bpe.write(tmp_path / "m.gguf", pre="gpt-4o")
    text = tmp_path / "text.txt"
    text.write_text("a" * 45000 + "\n" + "Some other words. " * 20)
    matrix, _ = collect(model, [model], text, tmp_path, ctx=1024, threads=1, warn=print)
    assert matrix.chunks == len(text.read_bytes()) // 1024
