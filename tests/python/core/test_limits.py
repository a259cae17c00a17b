"""What has no end or is beyond every machine is refused in a line, before it costs memory, time or a crash.

What would break this: a thread count handed to ggml, which has arrays for 512 and looks at no bound; a text
read whole from a device that never ends; a pipe opened twice; texts made to a length nobody bounded.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from command_paths import parameters
from eval_models import make_model, text_of
from ggml_ext.convert import convert
from ggml_ext.core import files
from ggml_ext.core.cpus import MAX_THREADS, threads_or_cores
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.measure import subjects
from ggml_ext.measure.bench import bench
from ggml_ext.measure.retrieval import MAX_LENGTH, parse_lengths
from ggml_ext.observe import samples
from ggml_ext.observe.observer import Observer
from ggml_ext.runtime.llama import Model

MEMORY = 6 << 30
"""Address space of a command that must refuse: one that reads on ends here, not the machine."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    make_model(folder / "m.gguf")
    (folder / "text.txt").write_text(text_of(200))
    return folder


def refused(place: Path, *arguments: str) -> str:
    """The one line of a command that fails with status 1."""
    done = subprocess.run(
        [sys.executable, "-m", "ggml_ext.cli.entry", *arguments],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
    )
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ggml-ext: error: ")]
    return line


def test_every_threads_option_has_ggmls_bound() -> None:
    found = {
        command: its.info.max
        for command, all_of_them in parameters().items()
        for its in all_of_them
        if its.name == "threads"
    }
    assert {"convert", "calibrate", "observe", "kv-probe", "kv-codebook"} <= found.keys()
    assert {"perplexity", "compare", "bench"} <= found.keys()
    assert found == dict.fromkeys(found, MAX_THREADS)


def test_the_python_interface_has_the_same_bound(place: Path) -> None:
    model, many = place / "m.gguf", MAX_THREADS + 1
    with pytest.raises(GgmlExtError, match="513 threads"):
        Model(model, threads=many)
    with pytest.raises(GgmlExtError, match="513 threads"):
        Observer(many)
    with pytest.raises(GgmlExtError, match="513 threads"):
        bench([model], prompt=1, generate=1, rounds=1, threads=many)
    with pytest.raises(GgmlExtError, match="513 threads"):
        convert(model, place / "out.gguf", threads=many)
    with pytest.raises(GgmlExtError, match="-1 threads"):
        Model(model, threads=-1)
    assert threads_or_cores(MAX_THREADS) == MAX_THREADS
    assert threads_or_cores(None) == threads_or_cores(0) >= 1


@pytest.mark.parametrize(
    "line",
    [
        "perplexity m.gguf -f /dev/zero",
        "compare m.gguf m.gguf --task retrieval -f /dev/zero",
        "convert m.gguf -o out.gguf --calibration /dev/zero",
        "observe m.gguf -o seen --calibration /dev/zero",
        "kv-probe m.gguf -o out.gguf --calibration /dev/zero",
        "kv-codebook m.gguf -o out.gguf --calibration /dev/zero",
        "convert m.gguf -o out.gguf --recipe flat4 --calibration text.txt --matrices /dev/zero",
    ],
)
def test_a_device_is_no_text(place: Path, line: str) -> None:
    assert "/dev/zero: is a device; name a file" in refused(place, *line.split())
    assert sorted(path.name for path in place.iterdir()) == ["m.gguf", "text.txt"]


@pytest.mark.parametrize("read", [samples.read_text, subjects.read_text])
def test_a_text_that_does_not_end(
    read: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe whose writer goes on for ever."""
    monkeypatch.setattr(files, "MOST_TEXT", 3 << 20)
    (tmp_path / "text").write_bytes(b"a" * (3 << 20))
    read(tmp_path / "text")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write() -> None:
        with contextlib.suppress(BrokenPipeError), pipe.open("wb") as file:
            while True:
                file.write(b"a" * (1 << 20))

    writer = threading.Thread(target=write)
    writer.start()
    with pytest.raises(GgmlExtError, match="pipe: a text of more than 3 MiB; give a part of it"):
        read(pipe)
    writer.join()


def test_importances_from_a_pipe_or_a_device(place: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        line = refused(place, "convert", "m.gguf", "-o", "out.gguf", "--type", "q4_0", "--imatrix", str(path))
        assert f"{path}: is no regular file" in line


def test_lengths_are_bounded() -> None:
    assert parse_lengths(f"512,{MAX_LENGTH}") == (512, MAX_LENGTH)
    with pytest.raises(GgmlExtError, match="99999999999 is beyond 1048576"):
        parse_lengths("512,99999999999")
