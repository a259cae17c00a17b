"""What `ggml-ext inspect` says about extended, stock and damaged files."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import gguf
import numpy as np
import pytest
from rich.console import Console

import models
import tiny_fq4
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf import bits
from ggml_ext.gguf.ext import FQ4, TensorLosses
from ggml_ext.gguf.inspect import Factor, InspectResult, inspect, print_result


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_fq4.write(tmp_path / "tiny.gguf")


def printed(result: InspectResult, *, tensors: bool = False) -> str:
    text = StringIO()
    print_result(result, tensors=tensors, console=Console(file=text, width=120))
    return text.getvalue()


def test_extended_file(tiny: Path) -> None:
    result = inspect(tiny)
    matrices = 2 * 32 * 256 + 7 * 256 * 256
    assert result.architecture == "llama"
    assert result.name == "tiny"
    assert result.bytes == tiny.stat().st_size
    assert result.parameters == matrices + 3 * 256
    assert result.bits_per_weight == pytest.approx((4.3125 * matrices + 32 * 768) / result.parameters)
    assert [(s.type, s.tensors, s.weights, s.bits_per_weight) for s in result.types] == [
        ("FQ4", 9, matrices, 4.3125),
        ("F32", 3, 768, 32.0),
    ]
    assert result.ext == tiny_fq4.METADATA
    text = printed(result)
    for part in ("FQ4", "4.3125", "imatrix", "0123456789abcdef" * 4, "samples 64", "length 512", "seed 42"):
        assert part in text
    assert "blk.0.ffn_down.weight" not in text
    assert "blk.0.ffn_down.weight" in printed(result, tensors=True)


def test_json_is_plain_and_complete(tiny: Path) -> None:
    plain = json.loads(json.dumps(inspect(tiny).as_json()))
    assert plain["path"] == str(tiny)
    assert plain["types"][0] == {
        "type": "FQ4",
        "tensors": 9,
        "weights": 475136,
        "bytes": 256128,
        "bits_per_weight": 4.3125,
    }
    assert plain["tensors"][3]["dims"] == [256, 32]
    assert plain["ext"]["calibration"]["seed"] == 42


def test_how_the_file_was_made_is_shown(tiny: Path) -> None:
    text = printed(inspect(tiny))
    for part in (
        "order 16 at 1 sites, order 4 at 1 sites, order 256 at 1 sites",
        "0.500 to 0.750 at 2 sites",
        "4 bits, one scale per 32",
        "mean 0.375, largest 0.5 (blk.0.attn_k.weight)",
    ):
        assert part in text
    (row,) = (line for line in printed(inspect(tiny), tensors=True).splitlines() if "attn_q.weight" in line)
    assert row.split()[-1] == "0.25"


def test_factors_are_no_weights(tmp_path: Path) -> None:
    """Bits per weight count a transform's bytes, and the model's weights only."""
    factors = {f"blk.{i}.attn_q.fq_l": np.eye(4, dtype=np.float16) for i in range(3)}
    tensors = {"blk.0.attn_q.weight": np.zeros((3, 64), np.float16), **factors}
    result = inspect(models.write_gguf(tmp_path / "f.gguf", tensors))
    assert result.parameters == 3 * 64
    assert result.bits_per_weight == 16 + 8 * 3 * 32 / (3 * 64)
    assert result.quantized_bits_per_weight is None
    (factor,) = result.factors
    assert factor == Factor("attn_q", "fq_l", 4, "F16", 3)


def test_stock_file(tmp_path: Path) -> None:
    path = models.write_gguf(tmp_path / "stock.gguf", {"a.weight": np.zeros((3, 64), np.float16)})
    result = inspect(path)
    assert result.ext is None
    assert [(tensor.name, tensor.type, tensor.dims) for tensor in result.tensors] == [
        ("a.weight", "F16", (64, 3))
    ]
    assert "none" in printed(result)


def test_markup_in_names_is_printed_as_it_is(tmp_path: Path) -> None:
    path = models.write_gguf(tmp_path / "[red]m.gguf", {"[bold]w": np.zeros((1, 4), np.float32)})
    text = printed(inspect(path), tensors=True)
    assert "[red]m.gguf" in text
    assert "[bold]w" in text


def change(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    return path


def dims(name: bytes, *dims: int) -> bytes:
    return name + np.array([len(dims)], "<u4").tobytes() + np.array(dims, "<u8").tobytes()


def refuse(path: Path, message: str) -> None:
    with pytest.raises(GgmlExtError, match=re.escape(message)) as caught:
        inspect(path)
    assert str(path) in str(caught.value)
    assert ";" in str(caught.value), "no remedy"


def test_missing_unreadable_and_foreign_files(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere.gguf", "No such file or directory")
    refuse(tmp_path, "Is a directory")
    (tmp_path / "text.gguf").write_text("no model")
    refuse(tmp_path / "text.gguf", "not a GGUF file")
    (tmp_path / "empty.gguf").write_bytes(b"")
    refuse(tmp_path / "empty.gguf", "not a GGUF file")
    if os.geteuid() != 0:
        (tmp_path / "text.gguf").chmod(0)
        refuse(tmp_path / "text.gguf", "Permission denied")


@pytest.mark.parametrize("kept", [4, 20, 200, 1500, -1])
def test_truncated_file(kept: int, tiny: Path) -> None:
    tiny.write_bytes(tiny.read_bytes()[:kept])
    refuse(tiny, "truncated" if kept < 0 else "damaged GGUF file")


def test_wrong_row_length(tiny: Path) -> None:
    name = b"blk.0.ffn_up.weight"
    change(tiny, dims(name, 256, 256), dims(name, 128, 512))
    refuse(tiny, "tensor blk.0.ffn_up.weight has rows of 128 weights, FQ4 wants multiples of 256")


def test_unknown_type(tiny: Path) -> None:
    start = dims(b"blk.0.ffn_up.weight", 256, 256)
    change(tiny, start + np.array([FQ4], "<u4").tobytes(), start + np.array([199], "<u4").tobytes())
    refuse(tiny, "tensor blk.0.ffn_up.weight has unknown type 199")


def test_keys_are_checked(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_uint32("ggml_ext.version", 9)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refuse(tmp_path / "t.gguf", "key ggml_ext.version is 9")


def test_where_the_bits_went(tmp_path: Path) -> None:
    """By kind of matrix and block, with the losses of the types that the file has; a picture beside it."""
    path = tmp_path / "m.gguf"
    losses = TensorLosses(
        ("blk.0.ffn_down.weight", "token_embd.weight"), ("fq4", "q8_0"), (0.03, 0.001, 0.01, 0.002)
    )
    tiny_fq4.write(path, replace(tiny_fq4.METADATA, losses=losses))
    result = inspect(path)
    assert result.ext is not None
    assert result.ext.losses is not None
    assert result.ext.losses.values == pytest.approx(losses.values)
    found = {(place.kind, place.block): place for place in bits.places(result)}
    down = found["ffn_down", 0]
    assert (down.bits, down.weights, down.loss) == (4.3125, 256 * 256, pytest.approx(0.03))
    assert found["token_embd", None].loss == pytest.approx(0.01)
    assert found["attn_q", 0].loss is None
    text = StringIO()
    Console(file=text, width=120).print(bits.bits_table(result))
    lines = {line.split()[0]: line.split()[1:] for line in text.getvalue().splitlines()}
    assert lines["ffn_down"] == ["4.312", "4.312", "4.312", lines["ffn_down"][3], "%", "75.0", "%"]
    shares = [float(cells[3]) for name, cells in lines.items() if name != "matrix"]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    bits.write_plot(tmp_path / "m.png", result)
    assert (tmp_path / "m.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
