"""What is read of a Hugging Face folder before the converter is: types, index, headers, settings."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from ggml_ext.convert import convert
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.source import open_gguf, read_floats, reading
from ggml_ext.hf import folder as hf
from ggml_ext.hf.files import safetensors_header

DTYPES = {"BOOL": 1, "U8": 1, "I64": 8, "F64": 8, "F16": 2, "BF16": 2, "F32": 4, "F8_E4M3": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(models.llama_dir(base), tmp_path / "model")


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def write_types(folder: Path, tensors: dict[str, str], shape: tuple[int, ...] = (2, 4)) -> list[Path]:
    """A folder of tensors of one shape: name -> type. Returns its weight files."""
    header: dict[str, Any] = {}
    offset = 0
    for name, dtype in tensors.items():
        end = offset + int(np.prod(shape)) * DTYPES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    write_raw(folder / "model.safetensors", header, bytes(offset))
    return [folder / "model.safetensors"]


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"a.weight": "F16", "a.attention.bias": "BOOL"}, "f16"),
        ({"a.weight": "F16", "a.mask": "U8", "a.index": "I64", "a.freqs": "F64"}, "f16"),
        ({"a.weight": "F32", "a.mask": "BOOL"}, "f32"),
        ({"a.weight": "BF16", "a.attention.masked_bias": "F32"}, "bf16"),
        ({"a.weight": "BF16", "a.mask": "BOOL"}, "bf16"),
        ({"a.weight": "BF16", "b.weight": "F32"}, "f32"),
        ({"a.weight": "F16", "b.weight": "F64"}, "f32"),
        ({"a.weight": "F8_E4M3", "b.weight": "F32"}, "bf16"),
    ],
)
def test_only_floats_decide_the_exact_type(tmp_path: Path, tensors: dict[str, str], expected: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert hf.exact_type(tmp_path, write_types(tmp_path, tensors)) == expected


def test_a_quantised_checkpoint_is_left_to_the_converter(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert hf.exact_type(tmp_path, write_types(tmp_path, {"a.scales": "F16", "a.qweight": "U8"})) == "bf16"


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, "f32"), (torch.float16, "f16")])
def test_pickled_weights_are_asked_for_their_type(tmp_path: Path, dtype: torch.dtype, expected: str) -> None:
    """config.json may say anything."""
    (tmp_path / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    torch.save({"a.weight": torch.zeros(4, 4, dtype=dtype)}, tmp_path / "pytorch_model.bin")
    assert hf.exact_type(tmp_path, hf.check(tmp_path)) == expected


def test_a_float_checkpoint_with_buffers_of_other_types_stays_equal(folder: Path, tmp_path: Path) -> None:
    """F16 weights that bf16 does not hold, and buffers as GPT-NeoX's and GPT-J's."""
    weights = {
        name: models.from_bf16(bits).astype(np.float16) * np.float16(1.001)
        for name, bits in models._weights(0).items()
    }
    names = {np.dtype("float16"): "F16", np.dtype("bool"): "BOOL"}
    names |= {np.dtype("uint8"): "U8", np.dtype("int64"): "I64", np.dtype("float64"): "F64"}
    arrays: dict[str, Any] = dict(weights)
    arrays["model.layers.0.attention.bias"] = np.ones((1, 1, 16, 16), np.bool_)
    for i, dtype in enumerate((np.uint8, np.int64, np.float64)):
        arrays[f"model.layers.{i % 2}.{i}.attention.masked_bias"] = np.ones((4, 4), dtype)
    header, data = {}, b""
    for name, array in arrays.items():
        start = len(data)
        data += array.tobytes()
        entry = {"dtype": names[array.dtype], "shape": array.shape, "data_offsets": [start, len(data)]}
        header[name] = entry
    write_raw(folder / "model.safetensors", header, data)
    out = tmp_path / "out.gguf"
    convert(folder, out, type_name="f16")
    tensors = {tensor.name: tensor for tensor in open_gguf(out).tensors}
    for name, original in (
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
    ):
        with reading(tensors[name]) as file:
            stored = read_floats(file, tensors[name], 0, tensors[name].n_rows)
        np.testing.assert_array_equal(stored, weights[original].astype(np.float32))


def test_the_float_models_size_follows_its_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = write_types(tmp_path, {"a.weight": "BF16", "b.weight": "F32"})
    assert hf.n_float_bytes(tmp_path, weights) == 2 * 8 * 4
    weights = write_types(tmp_path, {"a.weight": "BF16", "a.attention.masked_bias": "F32"})
    assert hf.n_float_bytes(tmp_path, weights) == 8 * 2


def test_what_the_file_leaves_out_is_said(folder: Path) -> None:
    assert hf.remarks(folder) == []
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vision_config": {}}))
    (line,) = hf.remarks(folder)
    assert "the text model only, nothing of vision_config" in line


# Which files


def refused(folder: Path, match: str) -> None:
    with pytest.raises(GgmlExtError, match=match) as caught:
        hf.check(folder)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value), "no remedy"


def test_a_path_that_does_not_exist_is_said_first(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("text")
    with pytest.raises(GgmlExtError, match=r"no/such/model: no such file or directory; .*Hub"):
        convert(Path("no/such/model"), tmp_path / "o.gguf", recipe="flat4", calibration=text)


def test_the_index_of_other_weights_does_not_count(folder: Path) -> None:
    """Whole safetensors files beside what was left of pickled ones, as the converter takes them."""
    index = {"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert hf.check(folder) == [folder / "model.safetensors"]


def test_an_index_that_was_left_behind_is_named(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    refused(folder, r"index\.json: names model-00001.*, which is missing, but model\.safetensors is here")


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    shutil.copyfile(folder / "model.safetensors", folder / "model.fp16.safetensors")
    refused(folder, r"holds \S+, and so does model\.\S*; move")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b'{"weight_map": {"a": 5}}', "names 5, which is no file of the folder"),
        (b'{"weight_map": {"a": "../model.safetensors"}}', "which is no file of the folder"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "which is no file of the folder"),
        (b'{"weight_map": {"a": "config.json"}}', r"names config\.json, no \.safetensors file"),
        (b'{"weight_map": {"a": "model.safetensors", "a": "model.safetensors"}}', "key a occurs twice"),
        (b'{"weight_map": ["a"]}', "has no weight_map"),
        (b'{"weight_map": {"nothing": "model.safetensors"}}', "names nothing, unlike the shards"),
        (b"[]", "not a JSON object"),
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_damaged_indexes(folder: Path, content: bytes, match: str) -> None:
    (folder / "model.safetensors.index.json").write_bytes(content)
    refused(folder, match)


@pytest.mark.parametrize("content", [b"[]", b"5", b"null", b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5000])
def test_damaged_configs(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder, r"config\.json: not (a JSON object|valid JSON)")


# Headers


def entry(**more: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **more}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"a": {"dtype": "F32", "shape": [2, 2]}}, "a has no data_offsets"),
        ({"a": entry(data_offsets=[0])}, "a has no data_offsets"),
        ({"a": entry(data_offsets=[-16, 0])}, "a has no data_offsets"),
        ({"a": entry(data_offsets=[0, 1e3])}, "a has no data_offsets"),
        ({"a": entry(data_offsets=[0, 2**80])}, "a has no data_offsets"),
        ({"a": entry(data_offsets=[16, 0])}, "takes 16 bytes, not -16"),
        ({"a": entry(data_offsets=[0, 8])}, "takes 16 bytes, not 8"),
        ({"a": entry(shape=[2, float("nan")])}, "a has no shape"),
        ({"a": entry(shape=[True, 4])}, "a has no shape"),
        ({"a": entry(shape=[-2, -2])}, "a has no shape"),
        ({"a": entry(shape="22")}, "a has no shape"),
        ({"a": entry(dtype="F31")}, "a has the unknown type F31"),
        ({"a": entry(dtype=None)}, "a has the unknown type"),
        ({"a": 5}, "a is no object"),
        ({"a": entry(), "b": entry()}, "a and b lie over each other"),
        ({"a": entry(), "b": entry(data_offsets=[12, 28])}, "a and b lie over each other"),
        ({"a": entry(data_offsets=[1000, 1016])}, "cut off"),
        ({"\ud800": entry()}, r"the name '\\ud800' is no text"),
        (b'{"a": {"dtype": "F32"}, "a": {}}', "key a occurs twice"),
        (b"[" * 100_000, "not a safetensors file"),
        (b"[1]", "not a safetensors file"),
        (b"\xff\xff", "not a safetensors file"),
    ],
)
def test_damaged_headers(folder: Path, header: object, match: str) -> None:
    write_raw(folder / "model.safetensors", header, bytes(32))
    refused(folder, match)


@pytest.mark.parametrize("length", [2, 2**31, 2**63, 2**64 - 1])
def test_header_lengths(folder: Path, length: int) -> None:
    write_raw(folder / "model.safetensors", {"a": entry()}, bytes(16), length)
    refused(folder, "not a safetensors file, or cut off")


def test_files_without_bytes(folder: Path) -> None:
    for size in (0, 7, 8):
        (folder / "model.safetensors").write_bytes(bytes(size))
        refused(folder, "not a safetensors file, or cut off")


def test_a_sound_header(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = {"__metadata__": {"format": "pt"}, "a": entry(), "none": entry(shape=[0], data_offsets=[0, 0])}
    write_raw(path, header, bytes(16))
    found = safetensors_header(path)
    assert found.keys() == {"a", "none"}
    assert (found["a"].shape, found["a"].end - found["a"].start) == ((2, 2), 16)
