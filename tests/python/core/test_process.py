"""Programs of llama.cpp as children: their output, their end, ours."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from ggml_ext.core import process
from ggml_ext.core.errors import GgmlExtError


def python(code: str, **options: object) -> process.Finished:
    return process.run([sys.executable, "-c", code], **options)  # type: ignore[arg-type]


def test_status_and_output_come_back() -> None:
    seen: list[str] = []
    code = "import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)"
    finished = python(code, watch=seen.append)
    assert finished.status == 3
    assert sorted(finished.output.split()) == ["one", "two"]
    assert seen[-1] == finished.output


def test_a_flood_of_output_is_cut_to_its_end() -> None:
    finished = python("print('x' * 1_000_000); print('the end')")
    assert finished.status == 0
    assert len(finished.output) <= 64 * 1024
    assert finished.output.endswith("the end\n")


def test_environment_and_folder(tmp_path: Path) -> None:
    code = "import os; print(os.environ['OURS'], os.getcwd(), 'PATH' in os.environ)"
    assert python(code, env={"OURS": "1"}, cwd=tmp_path).output.split() == ["1", str(tmp_path), "True"]


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(GgmlExtError, match=r"cannot start /no/such/tool: No such file"):
        process.run(["/no/such/tool"])


def test_an_exception_ends_the_program_and_its_children(tmp_path: Path) -> None:
    """The grandchild would write a file a second later."""
    late = tmp_path / "late"
    grandchild = f"import time; time.sleep(1); open({str(late)!r}, 'w')"
    start = f"subprocess.run([sys.executable, '-c', {grandchild!r}])"
    code = f"import subprocess, sys; print('go', flush=True); {start}"

    def interrupt(output: str) -> None:
        if "go" in output:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        python(code, watch=interrupt)
    time.sleep(1.5)
    assert not late.exists()


def test_last_words() -> None:
    assert process.last_words(python("print('fine')")) == "fine"
    assert process.last_words(python("raise ValueError('bad key')")) == "ValueError: bad key"
    assert process.last_words(python("import sys; sys.exit(4)")) == "exit status 4"
    killed = python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert process.last_words(killed) == "ended by signal 9: out of memory?"


def test_totals_become_steps() -> None:
    steps: list[float] = []
    done = process.up_to(steps.append)
    for n in (0, 2, 2, 5, 4, 6):
        done(n)
    assert steps == [2, 3, 1]
