"""Conversions of tiny models: types, bytes, metadata."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import models
from ggml_ext.convert import ConvertResult, convert
from ggml_ext.gguf import source
from ggml_ext.gguf.header import value
from ggml_ext.gguf.source import open_gguf
from ggml_ext.gguf.writer import OutTensor, string_key, write_header
from ggml_ext.hf import folder as hf
from ggml_ext.observe import samples
from ggml_ext.observe.samples import DEFAULT_TEXT
from ggml_ext.recipes import Options
from ggml_ext.runtime import native, tools
from ggml_ext.types import encode

CTX = 64


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(autouse=True)
def _own_cache(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(base / "cache"))


@pytest.fixture(scope="module")
def text(base: Path) -> Path:
    path = base / "calibration.txt"
    path.write_text(models.TEXT * 4)
    return path


def types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.type_name for tensor in open_gguf(path).tensors}


def content(path: Path) -> dict[str, bytes]:
    """Tensor name -> its bytes."""
    found = {}
    for tensor in open_gguf(path).tensors:
        with source.reading(tensor) as file:
            found[tensor.name] = source.read_bytes(file, tensor, 0, tensor.n_rows).tobytes()
    return found


def keys(path: Path) -> dict[str, int | str]:
    """The keys that hold an integer or a string."""
    found = {}
    for name, entry in open_gguf(path).keys.items():
        with contextlib.suppress(ValueError):
            found[name] = value(entry)
    return found


def weights(path: Path, name: str) -> NDArray[np.float32]:
    """float32 [rows, row length] of a float tensor."""
    tensor = next(t for t in open_gguf(path).tensors if t.name == name)
    with source.reading(tensor) as file:
        return source.read_floats(file, tensor, 0, tensor.n_rows)


def quiet(src: Path, out: Path, **options: Any) -> ConvertResult:
    return convert(src, out, warn=lambda _line: None, **options)


def test_a_hugging_face_model_becomes_fq4(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    lines: list[str] = []
    result = convert(models.llama_dir(base), out, warn=lines.append)
    found = types(out)
    assert found["output.weight"] == "q6_k"
    assert found["blk.0.attn_norm.weight"] == "f32"
    assert {t for name, t in found.items() if name.startswith("blk.") and "norm" not in name} == {"fq4"}
    assert found["token_embd.weight"] == "fq4"
    meta = keys(out)
    assert meta["general.architecture"] == "llama"
    assert meta["general.file_type"] == 200
    assert meta["general.quantization_version"] == 2
    extended = {name: value for name, value in meta.items() if name.startswith("ggml_ext.")}
    assert extended == {"ggml_ext.version": 1, "ggml_ext.rounding": "rtn", "ggml_ext.transform.name": "none"}
    assert lines == []
    assert result.n_bytes == out.stat().st_size
    assert 4.3125 < result.bits_per_weight < 5
    assert "fq4" in result.summary()
    assert list(tmp_path.iterdir()) == [out]
    quiet(models.llama_gguf(base), tmp_path / "from-gguf.gguf")
    assert (tmp_path / "from-gguf.gguf").read_bytes() == out.read_bytes()


def test_fq4_decodes_to_nearly_the_source(base: Path, tmp_path: Path) -> None:
    src, out = models.llama_gguf(base), tmp_path / "m.gguf"
    quiet(src, out)
    name = "blk.1.ffn_down.weight"
    original = weights(src, name)
    data = np.frombuffer(content(out)[name], np.uint8).reshape(original.shape[0], -1)
    error = native.dequantize("fq4", data, original.shape[1]) - original
    assert 0.003 < float((error**2).sum() / (original**2).sum()) < 0.006


@pytest.mark.parametrize("type_name", ["f16", "bf16", "f32"])
def test_float_types(base: Path, tmp_path: Path, type_name: str) -> None:
    src, out = models.llama_gguf(base), tmp_path / "m.gguf"
    quiet(src, out, type_name=type_name)
    name = "blk.0.ffn_up.weight"
    assert types(out)[name] == type_name
    expected = weights(src, name)
    if type_name == "f16":
        expected = expected.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(weights(out, name), expected)
    assert keys(out)["general.file_type"] == {"f32": 0, "f16": 1, "bf16": 32}[type_name]
    assert not any(key.startswith("ggml_ext.") for key in keys(out))


def test_the_converter_loses_nothing(base: Path) -> None:
    folder = models.llama_dir(base)
    stored = models.from_bf16(models._weights(0)["model.layers.1.mlp.down_proj.weight"])
    np.testing.assert_array_equal(weights(models.llama_gguf(base), "blk.1.ffn_down.weight"), stored)
    assert hf.exact_type(folder, hf.check(folder)) == "bf16"


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ({"a": np.float16}, "f16"),
        ({"a": np.float32}, "f32"),
        ({"a": np.float16, "b": np.uint16}, "f32"),
    ],
)
def test_the_exact_type_follows_the_matrices(tmp_path: Path, dtypes: dict[str, Any], expected: str) -> None:
    tensors = {name: np.zeros((2, 2), dtype) for name, dtype in dtypes.items()}
    tensors["norm"] = np.zeros(2, np.float32)
    models.write_safetensors(tmp_path / "model.safetensors", tensors)
    assert hf.exact_type(tmp_path, [tmp_path / "model.safetensors"]) == expected


def test_calibration_is_used_and_recorded(base: Path, text: Path, tmp_path: Path) -> None:
    src, out, plain = models.llama_gguf(base), tmp_path / "m.gguf", tmp_path / "plain.gguf"
    lines: list[str] = []
    result = convert(src, out, calibration=text, ctx=CTX, threads=1, warn=lines.append)
    quiet(src, plain)
    meta = keys(out)
    assert meta["ggml_ext.rounding"] == "imatrix"
    assert meta["ggml_ext.calibration.hash"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert meta["ggml_ext.calibration.length"] == CTX
    assert meta["ggml_ext.calibration.samples"] == meta["quantize.imatrix.chunks_count"] > 1
    assert meta["ggml_ext.calibration.seed"] == 0
    assert meta["quantize.imatrix.entries_count"] == 7 * models.LAYERS
    assert meta["quantize.imatrix.dataset"].startswith("calibration-")
    assert str(base) not in json.dumps(meta)
    assert types(out) == types(plain)
    assert content(out)["blk.0.attn_q.weight"] != content(plain)["blk.0.attn_q.weight"]
    assert sorted(result.without_importance) == ["output.weight", "token_embd.weight"]
    assert len(lines) == 1
    assert lines[0].startswith("importance matrices have nothing for 2 tensors")
    quiet(src, tmp_path / "again.gguf", calibration=text, ctx=CTX, threads=1)
    assert (tmp_path / "again.gguf").read_bytes() == out.read_bytes()


def test_the_packages_text_where_none_is_given(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named, and the file is what the same text gives when it is given."""
    monkeypatch.setattr(samples, "DEFAULT_TEXT", text)
    src, out, lines = models.llama_gguf(base), tmp_path / "m.gguf", list[str]()
    convert(src, out, options=Options(rounding="imatrix"), ctx=CTX, threads=1, warn=lines.append)
    assert lines[0].startswith("no --calibration: using the package's own text calibration.txt")
    assert keys(out)["ggml_ext.calibration.hash"] == hashlib.sha256(text.read_bytes()).hexdigest()
    quiet(src, tmp_path / "same.gguf", calibration=text, ctx=CTX, threads=1)
    assert (tmp_path / "same.gguf").read_bytes() == out.read_bytes()


def test_the_packages_text() -> None:
    """Large enough for its purpose, and said to be in the public domain, work by work."""
    content = DEFAULT_TEXT.read_text(encoding="utf-8")
    assert 200_000 < len(content) < 260_000
    rows = DEFAULT_TEXT.with_name("README.md").read_text(encoding="utf-8").count("\n| ")
    assert rows - 1 == len(content.split("\n\n\n"))


def llama_quantize(src: Path, out: Path, type_name: str, *options: str | Path) -> None:
    command = [tools.find("llama-quantize"), *options, src, out, type_name]
    subprocess.run(command, check=True, capture_output=True, env=tools.environment())


@pytest.fixture(scope="module")
def imatrix_file(base: Path, text: Path) -> Path:
    path = base / "some.imatrix.gguf"
    command = [
        tools.find("llama-imatrix"),
        "-m",
        models.llama_gguf(base),
        "-f",
        text,
        "-o",
        path,
        "-c",
        str(CTX),
    ]
    subprocess.run(command, check=True, capture_output=True, env=tools.environment())
    return path


def test_a_plain_type_gives_llama_quantizes_bytes(base: Path, imatrix_file: Path, tmp_path: Path) -> None:
    """q4_k as a plain type quantises the same tensors to the same bytes as --pure, the head excepted."""
    src = models.llama_gguf(base)
    llama_quantize(src, tmp_path / "stock.gguf", "Q4_K_M", "--pure", "--imatrix", imatrix_file)
    quiet(src, tmp_path / "ours.gguf", type_name="q4_k", imatrix=imatrix_file)
    stock, ours = content(tmp_path / "stock.gguf"), content(tmp_path / "ours.gguf")
    assert types(tmp_path / "ours.gguf")["output.weight"] == "q6_k"
    assert stock.keys() == ours.keys()
    assert [name for name in stock if stock[name] != ours[name]] == ["output.weight"]
    assert keys(tmp_path / "ours.gguf")["quantize.imatrix.file"] == "some.imatrix.gguf"


@pytest.mark.parametrize("type_name", ["q4_k_m", "IQ4_XS", "q8_0"])
def test_a_stock_mix_is_llama_quantizes_file(
    base: Path, imatrix_file: Path, tmp_path: Path, type_name: str
) -> None:
    src = models.llama_gguf(base)
    llama_quantize(src, tmp_path / "stock.gguf", type_name)
    quiet(src, tmp_path / "ours.gguf", type_name=type_name)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "stock.gguf").read_bytes()
    llama_quantize(src, tmp_path / "stock.gguf", type_name, "--imatrix", imatrix_file)
    quiet(src, tmp_path / "ours.gguf", type_name=type_name, imatrix=imatrix_file)
    assert content(tmp_path / "ours.gguf") == content(tmp_path / "stock.gguf")


def test_a_stock_mix_with_exceptions(base: Path, tmp_path: Path) -> None:
    src, out = models.llama_gguf(base), tmp_path / "m.gguf"
    result = quiet(src, out, type_name="q4_k_s", type_for=[("blk.0.*ffn", "q8_0")], keep=["output.weight$"])
    found = types(out)
    assert found["blk.0.ffn_up.weight"] == "q8_0"
    assert found["output.weight"] == "bf16"
    assert found["blk.1.ffn_up.weight"] == "q4_k"
    assert result.without_effect == ["blk.0.ffn_norm.weight"]
    assert "blk.0.ffn_norm.weight" in result.remarks()[0]


def test_exceptions_alone_make_a_pure_file(base: Path, tmp_path: Path) -> None:
    """Embeddings and head as they are, all other matrices of one type: for comparisons of types."""
    out = tmp_path / "m.gguf"
    quiet(models.llama_gguf(base), out, keep=["^token_embd", r"^output\.weight"])
    found = types(out)
    assert found["token_embd.weight"] == found["output.weight"] == "bf16"
    assert list(found.values()).count("fq4") == 7 * models.LAYERS
    assert keys(out)["general.file_type"] == 200


def test_a_file_without_extended_types_has_no_extended_keys(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    quiet(models.llama_gguf(base), out, type_for=[("weight", "q5_k")])
    assert "fq4" not in types(out).values()
    assert keys(out)["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q5_K_S
    assert not any(key.startswith("ggml_ext.") for key in keys(out))


def test_experts_are_rounded_by_their_own_importances(base: Path, text: Path, tmp_path: Path) -> None:
    src, out = models.mixtral_gguf(base), tmp_path / "m.gguf"
    quiet(src, out, calibration=text, ctx=CTX, threads=1)
    name = "blk.0.ffn_up_exps.weight"
    assert types(out)[name] == "fq4"
    assert types(out)["blk.0.ffn_gate_inp.weight"] == "f32"
    original = weights(src, name).reshape(models.EXPERTS, models.FFN, models.HIDDEN)
    stored = np.frombuffer(content(out)[name], np.uint8).reshape(models.EXPERTS, models.FFN, -1)
    (cached,) = (path for path in (base / "cache").rglob("*.imatrix.gguf") if _has(path, name))
    sums, counts = _imatrix_entry(cached, name)
    assert len({row.tobytes() for row in sums}) == models.EXPERTS
    for expert in range(models.EXPERTS):
        expected = native.quantize("fq4", original[expert], sums[expert] / counts[expert])
        np.testing.assert_array_equal(stored[expert], expected)


def _has(path: Path, name: str) -> bool:
    return any(tensor.name == f"{name}.in_sum2" for tensor in gguf.GGUFReader(path).tensors)


def _imatrix_entry(path: Path, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    return tensors[f"{name}.in_sum2"].reshape(models.EXPERTS, -1), tensors[f"{name}.counts"].reshape(-1, 1)


def test_slabs_and_threads_do_not_show(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = models.mixtral_gguf(base)
    quiet(src, tmp_path / "whole.gguf")
    monkeypatch.setattr(encode, "_SLAB_WEIGHTS", 3 * models.HIDDEN)
    quiet(src, tmp_path / "slabs.gguf", threads=1)
    assert (tmp_path / "slabs.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_rows_that_do_not_fit_are_reported(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    names = ["blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"]
    tensors = {
        name: random.standard_normal((4, row), np.float32)
        for name, row in zip(names, (512, 288, 40), strict=True)
    }
    src = models.write_gguf(tmp_path / "src.gguf", tensors)
    lines: list[str] = []
    result = convert(src, tmp_path / "m.gguf", warn=lines.append)
    assert list(types(tmp_path / "m.gguf").values()) == ["fq4", "q5_0", "f16"]
    assert result.fallbacks == {names[1]: ("fq4", "q5_0"), names[2]: ("fq4", "f16")}
    assert lines == [
        f"rows do not fit the blocks of fq4, used f16 for 1 tensor: {names[2]}",
        f"rows do not fit the blocks of fq4, used q5_0 for 1 tensor: {names[1]}",
    ]


def test_every_key_passes_through_byte_for_byte(tmp_path: Path) -> None:
    """Values that a round trip through Python would lose: an empty array, a string that is not UTF-8."""
    odd = {
        "general.architecture": string_key("general.architecture", "llama"),
        "empty": _key("empty", 9, struct.pack("<IQ", 4, 0)),
        "raw": _key("raw", 8, struct.pack("<Q", 2) + b"\xff\xfe"),
        "list": _key("list", 9, struct.pack("<IQ3i", 5, 3, 1, 2, 3)),
        "split.count": _key("split.count", 2, struct.pack("<H", 1)),
        "last": _key("last", 7, b"\x01"),
    }
    with (tmp_path / "src.gguf").open("wb") as file:
        write_header(file, odd, [OutTensor("a.weight", (256, 2), 0, 2048)], 32)
        file.write(np.ones(512, np.float32).tobytes())
    quiet(tmp_path / "src.gguf", tmp_path / "m.gguf")
    after = open_gguf(tmp_path / "m.gguf")
    assert {name: entry for name, entry in after.keys.items() if name in odd} == {
        name: entry for name, entry in odd.items() if name != "split.count"
    }
    assert after.tensors[0].offset % 32 == 0


def _key(name: str, type_id: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", type_id) + value


def test_a_split_model_is_read_whole(base: Path, tmp_path: Path) -> None:
    src = models.llama_gguf(base)
    shapes = open_gguf(src).tensors
    for number, part in enumerate((shapes[:5], shapes[5:])):
        writer = gguf.GGUFWriter(tmp_path / f"m-{number + 1:05}-of-00002.gguf", "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        for tensor in part:
            with source.reading(tensor) as file:
                rows = source.read_floats(file, tensor, 0, tensor.n_rows)
            writer.add_tensor(tensor.name, rows.reshape(tensor.dims[::-1]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    quiet(tmp_path / "m-00001-of-00002.gguf", tmp_path / "ours.gguf")
    quiet(src, tmp_path / "whole.gguf")
    assert content(tmp_path / "ours.gguf") == content(tmp_path / "whole.gguf")
    assert "split.count" not in keys(tmp_path / "ours.gguf")
