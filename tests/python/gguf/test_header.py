"""The header of a GGUF file: read quickly, and never with an exception that is not ours."""

from __future__ import annotations

import contextlib
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import models
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.header import read_header, value
from ggml_ext.gguf.inspect import inspect
from ggml_ext.gguf.source import open_gguf
from ggml_ext.gguf.writer import OutTensor, string_key, write_header

TENSORS = {"a.weight": np.ones((4, 256), np.float32), "b.weight": np.ones((2, 3, 64), np.float16)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_gguf(tmp_path_factory.mktemp("header") / "small.gguf", TENSORS)


def test_agrees_with_the_gguf_package(small: Path) -> None:
    header, reader = read_header(small), gguf.GGUFReader(small)
    assert list(header.keys) == [name for name in reader.fields if not name.startswith("GGUF.")]
    assert value(header.keys["general.architecture"]) == "llama"
    assert value(header.keys["general.file_type"]) == 0
    assert header.data == reader.data_offset
    for ours, theirs in zip(header.tensors, reader.tensors, strict=True):
        assert (ours.name, ours.dims) == (theirs.name, tuple(theirs.shape.tolist()))
        assert ours.type_id == theirs.tensor_type
        assert header.data + ours.offset == theirs.data_offset


def test_large_vocabularies_are_quick(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", [f"token{i}" for i in range(150_000)])
    writer.add_array("tokenizer.ggml.token_type", [1] * 150_000)
    writer.add_tensor("a.weight", TENSORS["a.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    start = time.monotonic()
    assert open_gguf(tmp_path / "v.gguf").tensors[0].name == "a.weight"
    assert time.monotonic() - start < 5


def damaged(small: Path, tmp_path: Path, position: int, patch: bytes) -> Path:
    data = bytearray(small.read_bytes())
    data[position : position + len(patch)] = patch
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("position", "patch", "match"),
    [
        (4, struct.pack(">I", 3), "big-endian layout"),
        (4, struct.pack("<I", 9), "version 9 layout"),
        (8, struct.pack("<Q", 2**60), "ends within the header|unknown type|dimensions"),
        (16, struct.pack("<Q", 2**60), "damaged"),
        (24, struct.pack("<Q", 2**63), "ends within the header"),
    ],
)
def test_impossible_fields_are_named(
    small: Path, tmp_path: Path, position: int, patch: bytes, match: str
) -> None:
    with pytest.raises(GgmlExtError, match=match):
        open_gguf(damaged(small, tmp_path, position, patch))


def test_an_unknown_type_and_a_row_that_does_not_fit(small: Path, tmp_path: Path) -> None:
    at = small.read_bytes().index(b"a.weight") + 8
    with pytest.raises(GgmlExtError, match=r"tensor a\.weight has type 150"):
        open_gguf(damaged(small, tmp_path, at + 20, struct.pack("<I", 150)))
    with pytest.raises(GgmlExtError, match=r"tensor a\.weight has type 200 and rows of 255"):
        open_gguf(damaged(small, tmp_path, at + 4, struct.pack("<QQI", 255, 4, 200)))


def test_an_alignment_that_is_none(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    data = small.read_bytes().replace(b"general.file_type", b"general.alignment")
    path.write_bytes(data)
    with pytest.raises(GgmlExtError, match="alignment 0 is no power of two"):
        open_gguf(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(4, 280), patch=st.binary(min_size=1, max_size=12), cut=st.integers(4, 6000))
def test_no_damage_is_a_traceback(small: Path, tmp_path: Path, position: int, patch: bytes, cut: int) -> None:
    path = damaged(small, tmp_path, position, patch)
    path.write_bytes(path.read_bytes()[:cut])
    with contextlib.suppress(GgmlExtError):
        open_gguf(path)


@pytest.mark.parametrize("dims", [(0, 255, 2**32 - 1), (32, 0), (32, 2, 0)])
def test_an_empty_tensor_is_refused(tmp_path: Path, dims: tuple[int, ...]) -> None:
    """Rows of no weights take no bytes, so that a small file can have more of them than can be counted."""
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        write_header(
            file,
            {"general.architecture": string_key("general.architecture", "llama")},
            [OutTensor("token_embd.weight", dims, 0, 0)],
            32,
        )
    with pytest.raises(GgmlExtError, match=r"m.gguf: tensor token_embd.weight is empty \(.*; damaged"):
        open_gguf(path)
    assert inspect(path).parameters == 0
