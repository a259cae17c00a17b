"""Bad input and bad surroundings: one line that names the place, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from ggml_ext.convert import convert
from ggml_ext.core import process
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.source import open_gguf
from imatrix_files import write_imatrix


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(autouse=True)
def _own_cache(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(base / "cache"))


def refused(match: str, src: Path, out: Path, **options: Any) -> str:
    """Converts, expects an error, checks that the output's folder is as before, and returns the line."""
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
    with pytest.raises(GgmlExtError, match=match) as caught:
        convert(src, out, warn=lambda _line: None, **options)
    assert "\n" not in str(caught.value)
    if before is not None:
        assert sorted(out.parent.iterdir()) == before
    return str(caught.value)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    random = np.random.default_rng(5)
    tensors = {f"blk.{i}.attn_q.weight": random.standard_normal((64, 256), np.float32) for i in range(4)}
    folder = tmp_path / "source"
    folder.mkdir()
    return models.write_gguf(folder / "small.gguf", tensors)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "m.gguf"


def test_missing_source(out: Path) -> None:
    refused(r"nowhere: no such file or directory", Path("nowhere"), out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_source(small: Path, out: Path) -> None:
    small.chmod(0)
    refused(r"small\.gguf: Permission denied", small, out)


def test_a_file_of_another_kind(tmp_path: Path, out: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"no model")
    refused(r"model\.bin: not a GGUF file", tmp_path / "model.bin", out)
    (tmp_path / "empty.gguf").write_bytes(b"")
    refused(r"empty\.gguf: not a GGUF file", tmp_path / "empty.gguf", out)


@pytest.mark.parametrize("part", [0.0001, 0.001, 0.002, 0.005, 0.5, 0.9999])
def test_truncated_gguf(small: Path, out: Path, part: float) -> None:
    data = small.read_bytes()
    small.write_bytes(data[: max(6, int(len(data) * part))])
    refused(r"small\.gguf: (truncated|damaged) GGUF file", small, out)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_weights_that_are_no_numbers(tmp_path: Path, out: Path, bad: float, dtype: type) -> None:
    array = np.ones((8, 256), np.float32)
    array[5, 7] = bad
    stored = models.to_bf16(array) if dtype == np.uint16 else array.astype(dtype)
    src = models.write_gguf(
        tmp_path / "src.gguf", {"good.weight": np.ones((2, 256), np.float32), "bad.weight": stored}
    )
    for type_name in ("fq4", "f16", "f32"):
        refused(r"src\.gguf: tensor bad\.weight holds NaN or Inf \(row 5\)", src, out, type_name=type_name)


def test_weights_of_a_directory_that_are_no_numbers(base: Path, tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models.llama_dir(base), folder)
    weights = models._weights(0)
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = 0x7FC0
    models.write_safetensors(folder / "model.safetensors", weights)
    line = refused(r"tensor blk\.1\.ffn_up\.weight holds NaN or Inf", folder, out)
    assert str(folder) in line
    assert "source.gguf" not in line


def test_llama_quantize_refuses_weights_that_are_no_numbers(base: Path, tmp_path: Path, out: Path) -> None:
    data = bytearray(models.llama_gguf(base).read_bytes())
    (tensor,) = (t for t in open_gguf(models.llama_gguf(base)).tensors if t.name == "blk.1.ffn_up.weight")
    data[tensor.offset : tensor.offset + 2] = b"\xc0\x7f"
    (tmp_path / "nan.gguf").write_bytes(data)
    refused(
        r"tensor 'blk\.1\.ffn_up\.weight' has invalid data", tmp_path / "nan.gguf", out, type_name="q4_k_m"
    )


def test_weights_that_a_type_cannot_hold(tmp_path: Path, out: Path) -> None:
    src = models.write_gguf(tmp_path / "src.gguf", {"big.weight": np.full((2, 256), 1e30, np.float32)})
    for type_name in ("f16", "q4_k", "fq4"):
        refused(rf"tensor big\.weight does not fit type {type_name}.*--keep", src, out, type_name=type_name)


def test_already_quantised(small: Path, tmp_path: Path, out: Path) -> None:
    convert(small, tmp_path / "q.gguf", warn=lambda _line: None)
    refused(r"blk\.0\.attn_q\.weight is already fq4", tmp_path / "q.gguf", out, type_name="q4_k")
    convert(tmp_path / "q.gguf", out, type_name="fq4", warn=lambda _line: None)


def test_requantising_a_stock_file(base: Path, tmp_path: Path, out: Path) -> None:
    convert(models.llama_gguf(base), tmp_path / "q.gguf", type_name="q5_0", warn=lambda _line: None)
    refused(r"requantizing from type q5_0", tmp_path / "q.gguf", out, type_name="q4_k_m")


def test_bad_options(small: Path, out: Path) -> None:
    refused(r"unknown type fq5; use fq4", small, out, type_name="fq5")
    refused(r"unknown type q4_k_m", small, out, type_for=[("attn", "q4_k_m")])
    refused(r"\(bad: not a regular expression", small, out, keep=["(bad"])
    refused(r"no tensor's name matches", small, out, keep=["nothing"])
    refused(r"give one of the two", small, out, imatrix=small, calibration=small)
    refused(r"fq4 is none of its types", small, out, type_name="q4_k_m", type_for=[("attn", "fq4")])


def test_types_that_need_importances(base: Path, small: Path, out: Path) -> None:
    refused(r"blk\.0\.attn_q.*needs an importance matrix", small, out, type_for=[("attn", "iq2_xxs")])
    refused(r"--type iq2_xxs.*--calibration", models.llama_gguf(base), out, type_name="iq2_xxs")


def test_importances_of_another_model(base: Path, tmp_path: Path, small: Path, out: Path) -> None:
    entries = {"blk.0.attn_q.weight": (np.ones((1, 512)), np.array([1]))}
    matrix = write_imatrix(tmp_path / "i.gguf", entries)
    for type_name, src in (("fq4", small), ("q4_k_m", models.llama_gguf(base))):
        refused(r"512 importances for blk\.0\.attn_q\.weight", src, out, imatrix=matrix, type_name=type_name)


def test_missing_importances_are_named(tmp_path: Path, small: Path, out: Path) -> None:
    matrix = write_imatrix(tmp_path / "i.gguf", {"blk.0.attn_q.weight": (np.ones((1, 256)), np.array([1]))})
    lines: list[str] = []
    convert(small, out, imatrix=matrix, warn=lines.append)
    names = ", ".join(f"blk.{i}.attn_q.weight" for i in (1, 2, 3))
    assert lines == [f"warning: no importances for 3 tensors: {names}; rounded without"]


@pytest.fixture
def folder(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny Llama; the converter must not be started on it."""

    def never(*_arguments: object, **_options: object) -> process.Finished:
        raise AssertionError("started the converter")

    copy = tmp_path / "model"
    shutil.copytree(models.llama_dir(base), copy)
    monkeypatch.setattr(process, "run", never)
    return copy


def test_directory_without_config(folder: Path, out: Path) -> None:
    (folder / "config.json").unlink()
    refused(r"model: no config\.json", folder, out)


def test_directory_with_a_broken_config(folder: Path, out: Path) -> None:
    (folder / "config.json").write_text("{")
    refused(r"config\.json: not valid JSON", folder, out)


def test_directory_without_weights(folder: Path, out: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(r"model: holds no weights", folder, out)


def test_directory_with_a_missing_shard(folder: Path, out: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(r"model-00002-of-00002\.safetensors: missing", folder, out)
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(r"index\.json: has no weight_map", folder, out)


def test_directory_with_a_shard_that_is_cut_off(folder: Path, out: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused(r"model\.safetensors: cut off", folder, out)
    path.write_bytes(path.read_bytes()[:20])
    refused(r"model\.safetensors: not a safetensors file", folder, out)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda f: (f / "tokenizer.model").unlink(), "converter failed .*tokenizer"),
        (
            lambda f: (f / "config.json").write_text(json.dumps({"architectures": ["NoSuchModel"]})),
            "architecture NoSuchModel is unknown",
        ),
    ],
)
def test_directories_that_the_converter_refuses(
    base: Path, tmp_path: Path, out: Path, spoil: Callable[[Path], Any], match: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models.llama_dir(base), folder)
    spoil(folder)
    refused(match, folder, out)


def test_bad_places_for_the_output(small: Path, tmp_path: Path) -> None:
    refused("same file", small, small)
    refused("no regular file", small, tmp_path)
    refused("does not exist", small, tmp_path / "none" / "m.gguf")


def test_read_only_folder(small: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:  # root writes everywhere, except where there is no disk
        place = Path("/proc")
    else:
        place = tmp_path / "locked"
        place.mkdir(mode=0o555)
    with pytest.raises(GgmlExtError, match=rf"{place}"):
        convert(small, place / "m.gguf", warn=lambda _line: None)


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """Writes beyond the limit fail as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("type_name", ["fq4", "q4_k_m"])
def test_full_disk(base: Path, out: Path, type_name: str) -> None:
    out.write_bytes(b"an older file")
    src = models.llama_gguf(base)
    with file_size_limit(64 * 1024):
        refused(rf"cannot .*{re.escape(str(out))}", src, out, type_name=type_name)
    assert out.read_bytes() == b"an older file"


def test_full_disk_during_the_conversion_of_a_directory(base: Path, out: Path) -> None:
    folder = models.llama_dir(base)
    with file_size_limit(64 * 1024):
        refused(rf"{folder}: the disk is full", folder, out)


_MAIN = "import sys; from ggml_ext.cli.entry import main; sys.exit(main())"


def _interrupt(command: list[str | Path], ready: Callable[[], bool], folder: Path) -> None:
    """Starts the command line, waits until it is in the middle, presses Ctrl-C."""
    child = subprocess.Popen(
        [sys.executable, "-c", _MAIN, *command],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored if we run in the background
    )
    limit = time.monotonic() + 120
    while not ready():
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    errors = child.communicate(timeout=60)[1]
    assert child.returncode == 130, errors
    assert "Traceback" not in errors
    assert list(folder.iterdir()) == []
    limit = time.monotonic() + 20
    while _running(folder):  # its children were told to end, which takes a moment
        assert time.monotonic() < limit
        time.sleep(0.05)


def _running(folder: Path) -> bool:
    """True if a process of ours still names the folder (where /proc exists)."""
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    return any(str(folder).encode() in line for line in lines)


def test_ctrl_c_while_the_converter_runs(base: Path, out: Path) -> None:
    folder = models.llama_dir(base)
    command: list[str | Path] = ["convert", folder, "-o", out]
    _interrupt(
        command, lambda: any(out.parent.iterdir()) and _running(out.parent / f".{out.name}"), out.parent
    )


def test_ctrl_c_while_importances_are_computed(base: Path, tmp_path: Path, out: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text(models.TEXT * 20000)
    command: list[str | Path] = ["convert", models.llama_gguf(base), "-o", out, "--calibration", text]
    states = base / "cache"
    _interrupt(command, lambda: any(states.rglob("observation/sums-0.bin")), out.parent)


def test_ctrl_c_while_weights_are_rounded(tmp_path: Path, out: Path) -> None:
    random = np.random.default_rng(6)
    matrix = random.standard_normal((4096, 1024), np.float32).astype(np.float16)
    src = models.write_gguf(tmp_path / "src.gguf", {f"blk.{i}.attn_q.weight": matrix for i in range(32)})
    command: list[str | Path] = ["convert", src, "-o", out]
    _interrupt(command, lambda: any(p.stat().st_size for p in out.parent.glob(".*.part")), out.parent)
