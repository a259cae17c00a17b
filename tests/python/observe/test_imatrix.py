"""Importance matrices: reading llama-imatrix's files, and computing them from a text."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import models
from ggml_ext import convert
from ggml_ext.core.errors import GgmlExtError, Warn
from ggml_ext.core.owned_folder import held
from ggml_ext.gguf import imatrix
from ggml_ext.gguf.source import Tensor, open_gguf
from ggml_ext.observe import importance, prepare, run
from ggml_ext.observe.observer import Observer
from ggml_ext.observe.prepare import Request
from ggml_ext.observe.sites import Table
from imatrix_files import write_imatrix

CTX = 64


def tensor(name: str, *dims: int) -> Tensor:
    return Tensor(name, dims, "f16", Path("model.gguf"), 0, 0)


def test_importances_are_sums_over_counts(tmp_path: Path) -> None:
    sums = np.arange(512, dtype=np.float32).reshape(2, 256)
    path = write_imatrix(
        tmp_path / "m.gguf", {"a.weight": (sums[:1], np.array([4])), "b.weight": (sums, np.array([2, 0]))}
    )
    matrix = imatrix.load(path)
    assert (matrix.dataset, matrix.chunks, matrix.chunk_length) == ("some.txt", 7, 512)
    dense = matrix.rows(tensor("a.weight", 256, 8))
    assert dense is not None
    np.testing.assert_array_equal(dense, sums[:1] / 4)
    experts = matrix.rows(tensor("b.weight", 256, 8, 2))
    assert experts is not None
    np.testing.assert_array_equal(experts[0], sums[0] / 2)
    np.testing.assert_array_equal(experts[1], np.ones(256))
    assert matrix.rows(tensor("c.weight", 256, 8)) is None


def test_one_count_can_serve_several_matrices(tmp_path: Path) -> None:
    sums = np.arange(512, dtype=np.float32).reshape(1, 512)
    matrix = imatrix.load(write_imatrix(tmp_path / "m.gguf", {"a.weight": (sums, np.array([2]))}))
    rows = matrix.rows(tensor("a.weight", 256, 8, 2))
    assert rows is not None
    np.testing.assert_array_equal(rows, sums.reshape(2, 256) / 2)


def test_the_older_layout_is_read(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.float32)
    name, dataset = b"blk.0.attn_q.weight", b"some.txt"
    entry = struct.pack("<i", len(name)) + name + struct.pack("<ii", 3, 256) + values.tobytes()
    path = tmp_path / "m.dat"
    path.write_bytes(struct.pack("<i", 1) + entry + struct.pack("<ii", 3, len(dataset)) + dataset)
    matrix = imatrix.load(path)
    assert (matrix.dataset, matrix.chunks) == ("some.txt", 3)
    np.testing.assert_array_equal(matrix.entries["blk.0.attn_q.weight"], values / np.float32(3))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(GgmlExtError, match=r"m\.dat: not an importance matrix"):
        imatrix.load(path)


def test_a_matrix_of_another_model_is_an_error(tmp_path: Path) -> None:
    path = write_imatrix(tmp_path / "m.gguf", {"a.weight": (np.ones((1, 256)), np.array([4]))})
    with pytest.raises(GgmlExtError, match=r"256 importances for a\.weight, which needs 512"):
        imatrix.load(path).rows(tensor("a.weight", 512, 8))


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_impossible_importances_are_an_error(tmp_path: Path, bad: float) -> None:
    sums = np.ones((1, 256))
    sums[0, 3] = bad
    path = write_imatrix(tmp_path / "m.gguf", {"a.weight": (sums, np.array([1]))})
    with pytest.raises(GgmlExtError, match=r"importances of a\.weight are negative, NaN or Inf"):
        imatrix.load(path)


def test_missing_truncated_and_other_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(GgmlExtError, match="No such file"):
        imatrix.load(tmp_path / "missing.gguf")
    path = write_imatrix(tmp_path / "m.gguf", {"a.weight": (np.ones((1, 256)), np.array([4]))})
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(GgmlExtError, match=r"m\.gguf: not an importance matrix"):
        imatrix.load(path)
    model = models.write_gguf(tmp_path / "model.gguf", {"a.weight": np.ones((2, 256), np.float32)})
    with pytest.raises(GgmlExtError, match="holds no importances"):
        imatrix.load(model)


@pytest.fixture
def llama(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return models.llama_gguf(tmp_path_factory.getbasetemp())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a text.txt"
    path.write_text(models.TEXT * 4)
    return path


def collect(*arguments: Any, **options: Any) -> tuple[imatrix.Imatrix, importance.Calibration]:
    return importance.collect(*arguments, warn=lambda _line: None, **options)


def work(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    return folder


def test_a_text_gives_importances_of_every_matrix(llama: Path, text: Path, tmp_path: Path) -> None:
    matrix, about = collect(llama, [llama], text, work(tmp_path, "w"), ctx=CTX, threads=1)
    matrices = [t for t in open_gguf(llama).tensors if t.name.startswith("blk.") and len(t.dims) == 2]
    assert len(matrices) == 7 * models.LAYERS
    assert all(matrix.rows(t) is not None for t in matrices)
    assert matrix.chunks == about.samples > 1
    assert (about.length, about.seed) == (CTX, 0)
    assert about.sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    assert matrix.dataset == f"a_text-{about.sha256[:12]}.txt"


def test_the_same_text_gives_the_same_file(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = collect(llama, [llama], text, work(tmp_path, "w1"), ctx=CTX, threads=1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    second, _ = collect(llama, [llama], text, work(tmp_path, "w2"), ctx=CTX, threads=1)
    assert first.path != second.path
    assert first.path.read_bytes() == second.path.read_bytes()


def test_a_finished_computation_is_not_repeated(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = collect(llama, [llama], text, work(tmp_path, "w1"), ctx=CTX, threads=1)

    def never(*_arguments: object, **_options: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(importance, "observe", never)
    again, _ = collect(llama, [llama], text, work(tmp_path, "w2"), ctx=CTX, threads=1)
    assert again.path == first.path
    with pytest.raises(AssertionError, match="computed again"):
        collect(llama, [llama], text, work(tmp_path, "w3"), ctx=CTX // 2, threads=1)


def test_a_text_shorter_than_a_context_is_an_error(llama: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(GgmlExtError, match=r"short\.txt: only \d+ tokens, and a window needs 512"):
        collect(llama, [llama], short, work(tmp_path, "w"), ctx=512)


def test_missing_and_empty_texts_are_errors(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(GgmlExtError, match=r"none\.txt: No such file"):
        collect(llama, [llama], tmp_path / "none.txt", tmp_path, ctx=CTX, threads=1)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(GgmlExtError, match=r"empty\.txt: empty"):
        collect(llama, [llama], tmp_path / "empty.txt", tmp_path, ctx=CTX, threads=1)


def test_a_text_that_can_be_read_once(llama: Path, text: Path, tmp_path: Path) -> None:
    """A pipe, as of <(...): the same importances as of the file."""
    expected, _ = collect(llama, [llama], text, work(tmp_path, "w1"), ctx=CTX, threads=1)
    pipe = tmp_path / "63"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(text.read_bytes()))
    writer.start()
    found, _ = collect(llama, [text], pipe, work(tmp_path, "w2"), ctx=CTX, threads=1)
    writer.join()
    for name, entry in expected.entries.items():
        np.testing.assert_array_equal(found.entries[name], entry)


def test_an_interrupted_computation_goes_on(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if windows are read again or left out: killed in between, the same file comes out."""
    monkeypatch.setattr(prepare, "BATCH_TOKENS", CTX)
    expected, _ = collect(llama, [llama], text, work(tmp_path, "w1"), ctx=CTX, threads=1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    monkeypatch.setattr(run, "COMMIT_SECONDS", 0.0)
    left, decode = [2], Observer.decode

    def interrupted(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(Observer, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(llama, [llama], text, work(tmp_path, "w2"), ctx=CTX, threads=1)
    left[0] = expected.chunks - 2
    found, _ = collect(llama, [llama], text, work(tmp_path, "w3"), ctx=CTX, threads=1)
    assert left[0] == 0
    assert found.path.read_bytes() == expected.path.read_bytes()
    assert list(found.path.parent.iterdir()) == [found.path]


def test_another_run_computes_the_same(llama: Path, text: Path, tmp_path: Path) -> None:
    """Its folder in the cache is left alone; this run's own does."""
    first, _ = collect(llama, [llama], text, work(tmp_path, "w1"), ctx=CTX, threads=1)
    first.path.unlink()
    with held(first.path.parent / "observation", run.KIND, temporary=True):
        again, _ = collect(llama, [llama], text, work(tmp_path, "w2"), ctx=CTX, threads=1)
    assert again.path.parent == tmp_path / "w2"


def test_a_cache_is_not_needed(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user without a home folder, as in a container with a random user id."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("GGML_EXT_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    folder = work(tmp_path, "w")
    matrix, _ = collect(llama, [llama], text, folder, ctx=CTX, threads=1)
    assert matrix.path.parent == folder


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Models whose importances are computed from now on; the computing itself is left out."""
    computed: list[Path] = []

    def compute(request: Request, _content: bytes, place: Path, _work: Path, name: str, _warn: Warn) -> Path:
        computed.append(request.source)
        place.mkdir(parents=True, exist_ok=True)
        importance._prune(place.parent)
        return write_imatrix(place / name, {"a.weight": (np.ones((1, 256)), np.array([1]))})

    monkeypatch.setattr(importance, "_compute", compute)
    return computed


def test_the_cache_is_where_the_environment_says(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = _counted(monkeypatch)
    monkeypatch.setenv("GGML_EXT_CACHE", str(tmp_path / "elsewhere"))
    for name in ("w1", "w2"):
        matrix, _ = collect(text, [text], text, work(tmp_path, name), ctx=CTX)
        assert matrix.path.is_relative_to(tmp_path / "elsewhere" / "imatrix")
    assert len(computed) == 1
    matrix.path.write_bytes(bytes(matrix.path.stat().st_size))  # as a power failure may leave it
    collect(text, [text], text, work(tmp_path, "w3"), ctx=CTX)
    assert len(computed) == 2


def test_only_our_own_old_files_leave_the_cache(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _counted(monkeypatch)
    monkeypatch.setenv("GGML_EXT_CACHE", str(tmp_path))
    root = tmp_path / "imatrix"
    for folder, file in (("0" * 24, "a.imatrix.gguf"), ("1" * 24, "mine"), ("my-matrices", "a.imatrix.gguf")):
        (root / folder).mkdir(parents=True)
        (root / folder / file).write_text("text")
        os.utime(root / folder, (1, 1))
    collect(text, [text], text, work(tmp_path, "w"), ctx=CTX)
    assert not (root / ("0" * 24)).exists()
    assert (root / ("1" * 24) / "mine").exists()
    assert (root / "my-matrices" / "a.imatrix.gguf").exists()


def test_outputs_in_the_models_folder_do_not_make_it_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    """The folder's GGUF files and our own temporary ones are none of its weights."""
    computed = _counted(monkeypatch)
    monkeypatch.setenv("GGML_EXT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    models.write_safetensors(folder / "model.safetensors", {"a": np.ones((2, 2), np.float32)})
    (folder / "tokenizer.json").write_text("{}")

    def converted(_folder: Path, out: Path, **_: object) -> None:
        models.write_gguf(out, {"a.weight": np.ones((2, 256), np.float32)})

    monkeypatch.setattr(convert.hf, "to_gguf", converted)
    monkeypatch.setattr(convert, "table_of", lambda *_: Table((), {}))
    for name in ("one.gguf", "two.gguf"):
        convert.convert(folder, folder / name, calibration=text, warn=lambda _line: None)
    assert len(computed) == 1
    (folder / "tokenizer.json").write_text("{ }")
    convert.convert(folder, folder / "three.gguf", calibration=text, warn=lambda _line: None)
    assert len(computed) == 2
    assert sorted(path.name for path in folder.glob(".*")) == []


def test_a_matrix_behind_a_link(llama: Path, text: Path, tmp_path: Path) -> None:
    """As in the Hugging Face cache, where the file itself has another name in another folder."""
    matrix, _ = collect(llama, [llama], text, work(tmp_path, "w"), ctx=CTX, threads=1)
    blobs, snapshot = work(tmp_path, "blobs"), work(tmp_path, "snapshot")
    (blobs / "89ab").write_bytes(matrix.path.read_bytes())
    (snapshot / "im.gguf").symlink_to(Path("..") / "blobs" / "89ab")
    convert.convert(
        llama, tmp_path / "o.gguf", type_name="q4_k_m", imatrix=snapshot / "im.gguf", warn=lambda _line: None
    )


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    where=st.floats(0, 1),
    patch=st.binary(min_size=1, max_size=12),
    cut=st.floats(0.5, 1),
    gguf_=st.booleans(),
)
def test_no_damage_is_a_traceback(
    where: float, patch: bytes, cut: float, gguf_: bool, tmp_path: Path
) -> None:
    path = tmp_path / "damaged"
    if gguf_:
        write_imatrix(path, {"a.weight": (np.ones((1, 64)), np.array([4]))})
    else:
        entry = struct.pack("<i", 8) + b"a.weight" + struct.pack("<ii", 3, 64) + bytes(256)
        path.write_bytes(struct.pack("<i", 1) + entry + struct.pack("<ii", 3, 4) + b"text")
    data = bytearray(path.read_bytes())
    start = int(where * min(len(data), 700))
    data[start : start + len(patch)] = patch
    path.write_bytes(data[: int(cut * len(data))])
    with contextlib.suppress(GgmlExtError):
        imatrix.load(path)
