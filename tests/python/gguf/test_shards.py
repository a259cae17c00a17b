"""A split model is one model, whatever asks for it; parts under other names are refused."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny_bpe
from ggml_ext.convert import convert
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.inspect import inspect
from ggml_ext.gguf.shards import named_parts
from ggml_ext.gguf.source import open_gguf
from ggml_ext.measure.compare import file_facts
from ggml_ext.measure.evaluate import Evaluation
from ggml_ext.observe.importance import collect

N_WEIGHTS = sum(array.size for array in tiny_bpe.tensors().values())
TEXT = "The quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return tiny_bpe.write(tmp_path / "whole.gguf")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(params=[False, True], ids=["with tensors", "first part without"])
def parts(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    return tiny_bpe.write_split(tmp_path / "split", first_empty=request.param)


def test_inspect_counts_all_parts(parts: list[Path], whole: Path) -> None:
    result, one = inspect(parts[0]), inspect(whole)
    assert result.parameters == one.parameters == N_WEIGHTS
    assert result.bytes == sum(path.stat().st_size for path in parts)
    assert result.files == tuple(path.name for path in parts)
    assert (result.types, result.bits_per_weight) == (one.types, one.bits_per_weight)
    assert {tensor.name for tensor in result.tensors} == set(tiny_bpe.tensors())
    facts = file_facts(parts[0])
    assert (facts.types, facts.bytes) == ({"F32": N_WEIGHTS}, result.bytes)
    assert facts.bits_per_weight == 32


def test_conversion_reads_all_parts(parts: list[Path], whole: Path, tmp_path: Path) -> None:
    for type_name in ("fq4", "q4_k_m"):
        a, b = tmp_path / f"a-{type_name}.gguf", tmp_path / f"b-{type_name}.gguf"
        convert(parts[0], a, type_name=type_name, threads=1)
        convert(whole, b, type_name=type_name, threads=1)
        blobs = [
            {t.name: path.read_bytes()[t.offset : t.offset + t.n_bytes] for t in open_gguf(path).tensors}
            for path in (a, b)
        ]
        assert blobs[0] == blobs[1]


def hub_cache(parts: list[Path], folder: Path) -> Path:
    """The parts as the Hugging Face cache holds them: snapshot names that link to blobs named by digests."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(parts):
        shutil.copy(path, blobs / f"89090{i}")
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / f"89090{i}")
    return snapshot / parts[0].name


def test_parts_in_the_hugging_face_cache(
    parts: list[Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = hub_cache(parts, tmp_path / "hub")
    assert inspect(model).parameters == N_WEIGHTS
    convert(model, tmp_path / "q.gguf", type_name="q4_k_m", threads=1)
    assert inspect(tmp_path / "q.gguf").parameters == N_WEIGHTS
    convert(model, tmp_path / "f.gguf", calibration=text, type_name="fq4", ctx=64, threads=1)
    ext = inspect(tmp_path / "f.gguf").ext
    assert ext is not None
    assert ext.rounding == "imatrix"


def test_an_importance_matrix_through_a_link(whole: Path, tmp_path: Path) -> None:
    tiny_bpe.write_imatrix(tmp_path / "blob")
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot" / "im.gguf"
    link.symlink_to(Path("..") / "blob")
    convert(whole, tmp_path / "q.gguf", type_name="q4_k_m", imatrix=link, threads=1)
    assert b"im.gguf" in (tmp_path / "q.gguf").read_bytes()


def test_any_part_changes_the_identity_of_scores(parts: list[Path], text: Path, tmp_path: Path) -> None:
    with Evaluation(parts[0], [], text, ctx=64, threads=1) as evaluation:
        before = evaluation.base.facts()
        os.utime(parts[2], ns=(1, 1))
        assert evaluation.base.facts() != before


def test_any_part_changes_the_identity_of_importances(
    parts: list[Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert open_gguf(parts[0]).files == tuple(parts)
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files = open_gguf(parts[0]).files
        matrix, _ = collect(parts[0], files, text, tmp_path / name, ctx=64, threads=1, warn=print)
        made.append(matrix.path.parent)
        os.utime(parts[0], ns=(1, 1))
    assert made[0] != made[1]


NAMES = (
    "first.gguf", "m-00001-of-00003.GGUF", "m-00001-of-00003(1).gguf", "m-00001-of-00003 (1).gguf",
    "m-1-of-3.gguf", "m-00001-of-00002.gguf", "m-00002-of-00003.gguf",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_first_part_under_another_name(name: str, parts: list[Path], tmp_path: Path) -> None:
    """llama.cpp finds the other parts by this name only, so a conversion would be of the first alone."""
    renamed = tmp_path / name
    shutil.copy(parts[0], renamed)
    for read in (inspect, open_gguf, file_facts):
        with pytest.raises(GgmlExtError, match=r"part 1 of 3 .* under another name; .*-00001-of-00003\.gguf"):
            read(renamed)
    with pytest.raises(GgmlExtError, match="under another name"):
        convert(renamed, tmp_path / "o.gguf", type_name="fq4")
    assert not (tmp_path / "o.gguf").exists()


def test_another_part_than_the_first(parts: list[Path]) -> None:
    for read in (inspect, open_gguf):
        with pytest.raises(GgmlExtError, match=r"not the first part .*-00001-of-"):
            read(parts[1])


def test_parts_that_do_not_belong_together(parts: list[Path]) -> None:
    shutil.copy(parts[2], parts[1])
    with pytest.raises(GgmlExtError, match=r"m-00002-of-00003\.gguf: not part 2 of 3"):
        inspect(parts[0])
    parts[1].unlink()
    with pytest.raises(GgmlExtError, match=r"m-00002-of-00003\.gguf: No such file"):
        inspect(parts[0])


def test_parts_with_too_few_tensors(tmp_path: Path) -> None:
    parts = tiny_bpe.write_split(tmp_path / "split")
    key = b"split.tensors.count" + struct.pack("<I", 5)
    data = parts[0].read_bytes()
    assert data.count(key) == 1
    parts[0].write_bytes(data.replace(key + struct.pack("<i", 12), key + struct.pack("<i", 13)))
    with pytest.raises(GgmlExtError, match=r"hold 12 tensors .* in place of 13"):
        open_gguf(parts[0])


def test_names_that_look_like_parts(whole: Path, text: Path, tmp_path: Path) -> None:
    """A whole model may be called so; only its keys say that there are more."""
    named = tmp_path / "m-00001-of-00002.gguf"
    shutil.copy(whole, named)
    assert inspect(named).parameters == N_WEIGHTS
    with Evaluation(named, [], text, ctx=64, threads=1) as evaluation:
        assert len(evaluation.base.facts()[0]) == 1
    assert named_parts(Path("x-00001-of-00002.gguf")) == [
        Path("x-00001-of-00002.gguf"),
        Path("x-00002-of-00002.gguf"),
    ]
    for name in ("x.gguf", "x-00002-of-00002.gguf", "x-00001-of-00002.GGUF"):
        assert named_parts(Path(name)) == [Path(name)]


def test_compare_describes_the_whole_model(
    parts: list[Path], whole: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "rows.json"
    command = [
        sys.executable,
        "-m",
        "ggml_ext.cli.entry",
        "compare",
        str(parts[0]),
        str(whole),
        "-f",
        str(text),
    ]
    command += ["--ctx", "64", "--rounds", "0", "--layers", "0", "-t", "1", "--json", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads(out.read_text())
    assert [row["types"] for row in rows] == [{"F32": N_WEIGHTS}] * 2
    assert rows[0]["bytes"] == sum(path.stat().st_size for path in parts)
    assert np.isclose(rows[0]["ppl"], rows[1]["ppl"])
