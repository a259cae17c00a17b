"""Every call that touches a file fails once: inputs stay, outputs are whole or absent, nothing is left.

Of the slow commands it is some calls of every kind, spread evenly over a run (Command.most)."""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from eval_models import make_model, text_of
from ggml_ext.cli import entry as cli
from ggml_ext.core import atomic
from ggml_ext.gguf.source import open_gguf

FAULTS = {
    "open": (errno.EACCES, [(builtins, "open"), (io, "open"), (os, "open")]),
    "replace": (errno.EIO, [(os, "replace"), (os, "rename")]),
    "fsync": (errno.ENOSPC, [(os, "fsync")]),
    "chmod": (errno.EPERM, [(os, "chmod")]),
    "symlink": (errno.EPERM, [(os, "symlink")]),
    "flock": (errno.ENOLCK, [(fcntl, "flock")]),
    "unlink": (errno.EPERM, [(os, "unlink"), (os, "remove")]),
    "mkdir": (errno.EROFS, [(os, "mkdir")]),
}

OLDER = b"an older file"

HARMLESS = ("chmod", "symlink", "flock")
"""What some file systems refuse always; nothing depends on it."""


class Faults:
    """Calls of some functions that concern files below ``folder``; number ``fails`` of them fails."""

    def __init__(self, folder: Path, number: int, patch: pytest.MonkeyPatch) -> None:
        self.calls, self.fails = 0, -1
        self._folder, self._number, self._patch = str(folder), number, patch

    def install(self, module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if self._concerns(arguments[0]):
                self.calls += 1
                if self.calls - 1 == self.fails:
                    raise OSError(self._number, os.strerror(self._number), str(arguments[0]))
            return real(*arguments, **options)

        self._patch.setattr(module, name, call)

    def _concerns(self, what: Any) -> bool:
        if isinstance(what, (str, bytes, os.PathLike)):
            return Path(os.fsdecode(what)).absolute().is_relative_to(self._folder)
        handle = what if isinstance(what, int) else what.fileno()
        return Path(f"/proc/self/fd/{handle}").readlink().is_relative_to(self._folder)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def is_whole_model(path: Path) -> bool:
    return len(open_gguf(path).tensors) == 2


def is_probed_model(path: Path) -> bool:
    return [tensor.name[-9:] for tensor in open_gguf(path).tensors[-2:]] == [".kv_probe", "v_probe_b"]


def is_coded_model(path: Path) -> bool:
    return [tensor.name[-7:] for tensor in open_gguf(path).tensors[-2:]] == [".kv_cq2", ".kv_cq1"]


def is_whole_json(path: Path) -> bool:
    return bool(json.loads(path.read_text()))


def is_report(path: Path) -> bool:
    return path.read_text().endswith("|\n") or path.read_text().endswith(".\n")


def is_whole_plot(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.read_bytes()[-8:-4] == b"IEND"


@dataclass(frozen=True)
class Command:
    """``outputs``: name of a file below out/ -> whether it is whole. ``folder``: below out/, which a run that
    failed may leave begun and the next one goes on with. ``most``: calls of a fault that fail, where there
    are more spread evenly over them, since the command takes its time."""

    line: str
    outputs: dict[str, Callable[[Path], bool]]
    folder: str = "none"
    most: int = 12


COMMANDS = {
    "convert": Command("convert small.gguf -o out/m.gguf", {"m.gguf": is_whole_model}),
    "kv-probe": Command(
        "kv-probe model.gguf -o out/m.gguf --calibration text.txt --ctx 32 -t 1", {"m.gguf": is_probed_model}
    ),
    "kv-codebook": Command(
        "kv-codebook model.gguf -o out/m.gguf --calibration long.txt --ctx 256 --samples 2 -t 1",
        {"m.gguf": is_coded_model},
        folder="m.gguf.codebooks",
        most=6,
    ),
    "inspect": Command("inspect small.gguf --json out/i.json", {"i.json": is_whole_json}),
    "perplexity": Command(
        "perplexity model.gguf -f text.txt --ctx 64 -t 1 --json out/p.json", {"p.json": is_whole_json}
    ),
    "compare": Command(
        "compare model.gguf model.gguf -f text.txt --ctx 64 -t 1 --rounds 0 --layers 1 --json out/c.json "
        "--report out/c.md --plot out/c.png",
        {"c.json": is_whole_json, "c.md": is_report, "c.png": is_whole_plot},
        most=3,
    ),
    "observe": Command(
        "observe model.gguf -o out/seen --calibration text.txt --ctx 32 --samples 4 -t 1 --json out/o.json",
        {"o.json": is_whole_json},
        folder="seen",
        most=6,
    ),
    "calibrate": Command(
        "calibrate model.gguf -o out/made --calibration text.txt --ctx 32 --samples 4 --type q4_0 "
        "--rounding gptq -t 1",
        {},
        folder="made",
        most=4,
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    random = np.random.default_rng(5)
    tensors = {f"blk.{i}.attn_q.weight": random.standard_normal((8, 256), np.float32) for i in range(2)}
    models.write_gguf(folder / "small.gguf", tensors)
    make_model(folder / "model.gguf")
    (folder / "text.txt").write_text(text_of(150))
    (folder / "long.txt").write_text(text_of(350))
    (folder / "out").mkdir()
    return folder


def run(place: Path, fault: str, fails: int = -1) -> tuple[int, int]:
    """The command line's status and how many calls of the fault's functions there were; number ``fails`` of
    them fails."""
    number, functions = FAULTS[fault]
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(place, number, patch)
        faults.fails = fails
        for module, function in functions:
            faults.install(module, function)
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
    atomic.tidy()  # as at the process's end
    return status, faults.calls


def clean(place: Path) -> None:
    """No outputs, and nothing in the cache that spares a run its calls."""
    for folder in (place / "out", place / "cache"):
        shutil.rmtree(folder, ignore_errors=True)
    (place / "out").mkdir()


def spread(calls: int, most: int) -> list[int]:
    """Numbers of all calls, or of ``most`` of them with the first and the last."""
    return sorted({round(index) for index in np.linspace(0, calls - 1, min(calls, most))})


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files come from /proc")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_call_fails_once(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    fault: str,
) -> None:
    """Outputs are new and replace an older file in turns, those of quick commands both."""
    its = COMMANDS[command]
    place = shutil.copytree(inputs, tmp_path / "place")
    monkeypatch.chdir(place)
    monkeypatch.setenv("GGML_EXT_CACHE", str(place / "cache"))
    monkeypatch.setattr(sys, "argv", ["ggml-ext", *its.line.split()])
    before = content(place)
    status, calls = run(place, fault)
    assert status == 0, capsys.readouterr().err
    finished = {path.name for path in (place / "out" / its.folder).rglob("*")}
    for index, fails in enumerate(spread(calls, its.most)):
        for exists in (False, True) if its.most >= 12 else (index % 2 == 1,):
            clean(place)
            for name in its.outputs if exists else ():
                (place / "out" / name).write_bytes(OLDER)
            status, _ = run(place, fault, fails)
            error = capsys.readouterr().err
            check(place, its, fault, status, error)
            kept = {"cache", *(f"out/{name}" for name in its.outputs), f"out/{its.folder}"}
            left = {
                path: data
                for path, data in content(place).items()
                if not any(Path(path).is_relative_to(part) for part in kept)
            }
            assert left == before, f"call {fails} of {fault}: {error}"
            if its.folder != "none":
                assert run(place, fault)[0] == 0, f"after call {fails} of {fault}: {capsys.readouterr().err}"
                check(place, its, fault, 0, "")
                assert {path.name for path in (place / "out" / its.folder).rglob("*")} == finished


def check(place: Path, its: Command, fault: str, status: int, error: str) -> None:
    """The command has ended as it should, its files are whole, or the older ones, or absent."""
    assert status in ((0,) if fault in HARMLESS else (0, 1)), error
    assert "Traceback" not in error
    if status == 1:
        (line,) = [line for line in error.splitlines() if line.startswith("ggml-ext: error: ")]
        assert ".ggml-ext-" not in line, "a name that the user does not know"
    for name, is_whole in its.outputs.items():
        out = place / "out" / name
        if status == 0 or (out.exists() and out.read_bytes() != OLDER):
            assert is_whole(out), error
