"""SIGTERM, SIGHUP and SIGKILL: what they leave behind, in our folders and of our children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import models
from eval_models import make_model, text_of
from ggml_ext.core import atomic, process
from ggml_ext.core.signals import Terminated, as_interrupts

_MAIN = "import sys; from ggml_ext.cli.entry import main; sys.exit(main())"


def _hear_signals() -> None:
    """Also where the tests run under nohup, or in the background of a shell."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def start(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _MAIN, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        preexec_fn=_hear_signals,
    )


def wait_until(ready: Callable[[], bool], seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < limit
        time.sleep(0.02)


def names_in_command_lines(text: str) -> bool:
    """Whether a running process was started with the text among its arguments."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(text) in path.read_bytes():
                return True
        except OSError:
            continue
    return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="children are looked for in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_conversion_that_is_ended(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, number: signal.Signals
) -> None:
    """While llama.cpp's converter runs: it ends too, and its file, as large as the model, goes."""
    out = tmp_path / "m.gguf"
    child = start("convert", models.llama_dir(tmp_path_factory.getbasetemp()), "-o", out)
    inside = f"{tmp_path}/.m.gguf."
    wait_until(lambda: child.poll() is not None or names_in_command_lines(inside))
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    wait_until(lambda: not names_in_command_lines(inside), seconds=20)
    if number == signal.SIGKILL:
        assert list(tmp_path.iterdir())
        atomic.write_text(tmp_path / "other", "text")
        assert [path.name for path in tmp_path.iterdir()] == ["other"]
        return
    assert child.returncode == 128 + number, errors
    assert f"ggml-ext: ended by {number.name}\n" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_weights_that_are_being_rounded(tmp_path: Path, number: signal.Signals) -> None:
    matrix = np.random.default_rng(6).standard_normal((2048, 1024), np.float32).astype(np.float16)
    src = models.write_gguf(tmp_path / "src.gguf", {f"blk.{i}.attn_q.weight": matrix for i in range(24)})
    folder = tmp_path / "out"
    folder.mkdir()
    child = start("convert", src, "-o", folder / "m.gguf", "-t", "1")
    wait_until(lambda: child.poll() is not None or any(p.stat().st_size for p in folder.glob(".*.part")))
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + number, errors
    assert list(folder.iterdir()) == []


def test_a_measurement_that_is_ended_goes_on(tmp_path: Path) -> None:
    """Within a long call of llama.cpp, where Python's own handlers do not run."""
    text = tmp_path / "text.txt"
    text.write_text(text_of(300_000))
    arguments = ["perplexity", make_model(tmp_path / "m.gguf", vocabulary=8000), "-f", text, "--ctx", "256"]
    cache = tmp_path / "cache"
    child = start(*arguments, "-t", "1", GGML_EXT_CACHE=str(cache))
    wait_until(lambda: child.poll() is not None or any(p.stat().st_size for p in cache.glob("*/*/*.scores")))
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 143, errors
    assert "Traceback" not in errors
    assert list(cache.glob("evaluate/*/*.scores"))


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    """As nohup does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with as_interrupts():
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(Terminated) as raised:
                signal.raise_signal(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # at once: the cleaning up goes on
            time.sleep(0.01)
        assert raised.value.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
def test_a_child_does_not_outlive_us(tmp_path: Path) -> None:
    """One that writes nothing would not notice that its pipe has no reader."""
    sleeper = f"import time; open({str(tmp_path / 'runs')!r}, 'w'); time.sleep(60)"
    code = f"import sys; from ggml_ext.core import process; process.run([sys.executable, '-c', {sleeper!r}])"
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_until((tmp_path / "runs").exists)
    parent.kill()
    parent.wait()
    wait_until(lambda: not names_in_command_lines(str(tmp_path / "runs")), seconds=10)


def test_children_of_a_dead_parent_end_before_they_begin() -> None:
    arrange = process.die_with_parent()
    if arrange is None:
        pytest.skip("PR_SET_PDEATHSIG is Linux's")
    child = os.fork()
    if child == 0:
        arrange()  # its parent is the caller of die_with_parent
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
