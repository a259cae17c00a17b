"""FQ4 in the gguf package, and the keys under ggml_ext.: written, read, refused.

What would break these: a gguf release that closes its enumeration, a key whose type the C loader sees
differently.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

import tiny_fq4
from ggml_ext import fq4
from ggml_ext.errors import GgmlExtError
from ggml_ext.gguf_ext import FQ4, KEYS, Calibration, ExtMetadata, add_ext_keys, read_ext, validate_keys
from ggml_ext.header import read_header


def test_fq4_is_a_type_of_the_gguf_package() -> None:
    types = gguf.GGMLQuantizationType
    assert types(200) is types["FQ4"] is FQ4
    assert FQ4.name == "FQ4"
    assert FQ4 in list(types)
    assert gguf.GGML_QUANT_SIZES[FQ4] == (256, 138)


def test_tensors_survive_writing_and_reading(tmp_path: Path) -> None:
    data = fq4.quantize(np.random.default_rng(0).standard_normal((6, 512), np.float32)).reshape(2, 3, -1)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("experts", data, raw_dtype=FQ4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = gguf.GGUFReader(tmp_path / "t.gguf").tensors
    assert tensor.tensor_type is FQ4
    assert tensor.shape.tolist() == [512, 3, 2]
    np.testing.assert_array_equal(tensor.data, data)


METADATA = {
    "all": tiny_fq4.METADATA,
    "least": ExtMetadata(),
    "part of a calibration": ExtMetadata("imatrix", calibration=Calibration(samples=7)),
    "none": None,
}


@pytest.mark.parametrize("reader", [gguf.GGUFReader, read_header])
@pytest.mark.parametrize("case", METADATA)
def test_keys_survive_writing_and_reading(
    case: str, reader: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tiny_fq4.write(tmp_path / "t.gguf", METADATA[case])
    assert read_ext(reader(path)) == METADATA[case]


def add_unknown(writer: gguf.GGUFWriter) -> None:
    add_ext_keys(writer, ExtMetadata())
    writer.add_uint32("ggml_ext.kv.bits", 4)


def add_wrong_type(writer: gguf.GGUFWriter) -> None:
    writer.add_string("ggml_ext.version", "1")


def add_array(writer: gguf.GGUFWriter) -> None:
    add_ext_keys(writer, ExtMetadata())
    writer.add_array("ggml_ext.rounding", ["rtn"])


def add_no_version(writer: gguf.GGUFWriter) -> None:
    writer.add_string("ggml_ext.rounding", "rtn")


def add_newer(writer: gguf.GGUFWriter) -> None:
    add_ext_keys(writer, ExtMetadata(version=2))


def add_version_zero(writer: gguf.GGUFWriter) -> None:
    add_ext_keys(writer, ExtMetadata(version=0))


def add_transform(writer: gguf.GGUFWriter) -> None:
    add_ext_keys(writer, ExtMetadata(transform="flatquant"))


REFUSED = {
    add_unknown: "key ggml_ext.kv.bits is not known to this version",
    add_wrong_type: "key ggml_ext.version must be of type UINT32, is STRING",
    add_array: "key ggml_ext.rounding must be of type STRING, is ARRAY",
    add_no_version: "key ggml_ext.version is missing",
    add_newer: "key ggml_ext.version is 2, this version reads 1 to 1",
    add_version_zero: "key ggml_ext.version is 0",
    add_transform: "key ggml_ext.transform.name is 'flatquant', this version knows only 'none'",
}


@pytest.mark.parametrize("reader", [gguf.GGUFReader, read_header])
@pytest.mark.parametrize("add", REFUSED, ids=lambda add: add.__name__)
def test_bad_keys_are_named(
    add: Callable[[gguf.GGUFWriter], None], reader: Callable[[Path], object], tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(GgmlExtError, match=re.escape(REFUSED[add])):
        validate_keys(reader(tmp_path / "t.gguf"))


def test_loader_and_python_know_the_same_keys(repo_root: Path) -> None:
    source = (repo_root / "ggml_ext" / "llama" / "metadata.cpp").read_text()
    known = dict(re.findall(r'\{ "(ggml_ext\.[\w.]+)",\s*GGUF_TYPE_(\w+) \}', source))
    assert known == {name: key.type.name for name, key in KEYS.items()}
