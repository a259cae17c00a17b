"""Every call that touches a file fails once: inputs stay, outputs are whole or absent, nothing is left."""

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


def is_whole_json(path: Path) -> bool:
    return bool(json.loads(path.read_text()))


COMMANDS: dict[str, tuple[list[str], str, Callable[[Path], bool]]] = {
    "convert": (["convert", "small.gguf", "-o", "out/m.gguf"], "m.gguf", is_whole_model),
    "kv-probe": (
        ["kv-probe", "model.gguf", "-o", "out/m.gguf", "--calibration", "text.txt", "--ctx", "32", "-t", "1"],
        "m.gguf",
        is_probed_model,
    ),
    "inspect": (["inspect", "small.gguf", "--json", "out/i.json"], "i.json", is_whole_json),
    "perplexity": (
        ["perplexity", "model.gguf", "-f", "text.txt", "--ctx", "64", "-t", "1", "--json", "out/p.json"],
        "p.json",
        is_whole_json,
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
    (folder / "out").mkdir()
    return folder


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files come from /proc")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("exists", [False, True], ids=["new", "replaced"])
def test_every_call_fails_once(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    fault: str,
    exists: bool,
) -> None:
    arguments, name, is_whole = COMMANDS[command]
    place = shutil.copytree(inputs, tmp_path / "place")
    monkeypatch.chdir(place)
    monkeypatch.setenv("GGML_EXT_CACHE", str(place / "cache"))
    monkeypatch.setattr(sys, "argv", ["ggml-ext", *arguments])
    before = content(place)
    number, functions = FAULTS[fault]
    fails, calls = 0, 1
    while fails < calls:
        out = place / "out" / name
        out.unlink(missing_ok=True)
        if exists:
            out.write_bytes(b"an older file")
        with monkeypatch.context() as patch:
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
        calls = faults.calls
        error = capsys.readouterr().err
        assert status in ((0,) if fault in HARMLESS else (0, 1))
        assert "Traceback" not in error
        if status == 1:
            (line,) = [line for line in error.splitlines() if line.startswith("ggml-ext: error: ")]
            assert ".ggml-ext-" not in line, "a name that the user does not know"
            assert not exists or out.read_bytes() == b"an older file" or is_whole(out)
        else:
            assert is_whole(out)
        left = {path: data for path, data in content(place).items() if not path.startswith("cache")}
        left.pop(f"out/{name}", None)
        assert left == before, f"call {fails} of {fault}: {error}"
        shutil.rmtree(place / "cache", ignore_errors=True)
        fails += 1
