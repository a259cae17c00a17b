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
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf import fq4
from ggml_ext.gguf.ext import (
    FQ4,
    KEYS,
    Calibration,
    ExtMetadata,
    TensorErrors,
    TensorLosses,
    add_ext_keys,
    read_ext,
    validate_keys,
)
from ggml_ext.gguf.header import read_header


def test_fq4_is_a_type_of_the_gguf_package() -> None:
    types = gguf.GGMLQuantizationType
    assert types(200) is types["FQ4"] is FQ4
    assert FQ4.name == "FQ4"
    assert FQ4 in list(types)
    assert gguf.GGML_QUANT_SIZES[FQ4] == (256, 138)
    assert [types(number).name for number in range(200, 204)] == ["FQ4", "FQ4_64", "FQ3", "FQ3_64"]


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
    add_ext_keys(writer, ExtMetadata(version=3))


def add_version_zero(writer: gguf.GGUFWriter) -> None:
    add_ext_keys(writer, ExtMetadata(version=0))


def add_transform(writer: gguf.GGUFWriter) -> None:
    add_ext_keys(writer, ExtMetadata(transform="spin"))


def add_hadamard_of_a_folded_transform(writer: gguf.GGUFWriter) -> None:
    add_ext_keys(writer, ExtMetadata(transform="awq", hadamard=(0, 0, 2, 0)))


def add_odd_order(writer: gguf.GGUFWriter) -> None:
    add_ext_keys(writer, ExtMetadata(transform="hadamard", hadamard=(1, 0, 0, 12)))


def add_short_hadamard(writer: gguf.GGUFWriter) -> None:
    writer.add_block_count(2)
    add_ext_keys(writer, ExtMetadata(transform="hadamard", hadamard=(2, 2, 2, 2)))


def add_clip_above_one(writer: gguf.GGUFWriter) -> None:
    add_ext_keys(writer, ExtMetadata(clip=(1.0, 1.5)))


def add_clip_nan(writer: gguf.GGUFWriter) -> None:
    add_ext_keys(writer, ExtMetadata(clip=(float("nan"),)))


def add_array_of_wrong_elements(writer: gguf.GGUFWriter) -> None:
    add_ext_keys(writer, ExtMetadata())
    writer.add_key_value("ggml_ext.transform.clip", [1], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)


def add_five_bits(writer: gguf.GGUFWriter) -> None:
    add_ext_keys(writer, ExtMetadata(activation_bits=5))


def add_group_of_64(writer: gguf.GGUFWriter) -> None:
    add_ext_keys(writer, ExtMetadata(activation_bits=4, activation_group=64))


def add_fewer_errors(writer: gguf.GGUFWriter) -> None:
    add_ext_keys(writer, ExtMetadata(errors=TensorErrors("weight", ("a", "b"), (0.5,))))


def add_no_error_values(writer: gguf.GGUFWriter) -> None:
    add_ext_keys(writer, ExtMetadata())
    writer.add_array("ggml_ext.error.tensors", ["a"])


def add_fewer_losses(writer: gguf.GGUFWriter) -> None:
    add_ext_keys(writer, ExtMetadata(losses=TensorLosses(("a", "b"), ("fq4", "q8_0"), (0.5, 0.1, 0.2))))


def add_no_losses(writer: gguf.GGUFWriter) -> None:
    add_ext_keys(writer, ExtMetadata())
    writer.add_array("ggml_ext.loss.tensors", ["a"])


def add_errors_of_unknown_kind(writer: gguf.GGUFWriter) -> None:
    add_ext_keys(writer, ExtMetadata(errors=TensorErrors("guess", ("a",), (0.5,))))


REFUSED = {
    add_unknown: "key ggml_ext.kv.bits is not known to this version",
    add_wrong_type: "key ggml_ext.version must be of type UINT32, is STRING",
    add_array: "key ggml_ext.rounding must be of type STRING, is ARRAY",
    add_no_version: "key ggml_ext.version is missing",
    add_newer: "key ggml_ext.version is 3, this version reads 1 to 2",
    add_version_zero: "key ggml_ext.version is 0",
    add_transform: "key ggml_ext.transform.name is 'spin', this version knows only none, smoothquant, awq",
    add_hadamard_of_a_folded_transform: "hadamard element 2 is 2, but the transform 'awq' has no online part",
    add_odd_order: "key ggml_ext.transform.hadamard element 3 is 12, not 0 or a power of two",
    add_short_hadamard: "key ggml_ext.transform.hadamard has 4 elements, not four for each of the 2 blocks",
    add_clip_above_one: "key ggml_ext.transform.clip element 1 is 1.5, not in (0, 1]",
    add_clip_nan: "key ggml_ext.transform.clip element 0 is nan",
    add_array_of_wrong_elements: "clip must be of type ARRAY of FLOAT32, is ARRAY of UINT32",
    add_five_bits: "key ggml_ext.activation.bits is 5, not one of 8, 4",
    add_group_of_64: "key ggml_ext.activation.group is 64, not one of 0, 32, 256",
    add_fewer_errors: "key ggml_ext.error.values has 1 elements, ggml_ext.error.tensors has 2",
    add_no_error_values: "key ggml_ext.error.values is missing beside ggml_ext.error.tensors",
    add_fewer_losses: "key ggml_ext.loss.values has 3 elements, not one for each of 2 tensors and 2 types",
    add_no_losses: "key ggml_ext.loss.types is missing beside ggml_ext.loss.tensors",
    add_errors_of_unknown_kind: "key ggml_ext.error.kind is guess, not one of output, weight",
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
    source = (repo_root / "ggml_ext" / "transform" / "metadata.cpp").read_text()
    rows = re.findall(r'\{ "(ggml_ext\.[\w.]+)",\s*GGUF_TYPE_(\w+)(?:,\s*GGUF_TYPE_(\w+))?\s*\}', source)
    known = {name: " of ".join(filter(None, types)) for name, *types in rows}
    assert known == {name: key.type_name for name, key in KEYS.items()}
