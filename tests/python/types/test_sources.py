"""What else than a float model can be converted: a GGUF file in q8_0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ggml_ext.convert import convert
from ggml_ext.gguf.source import open_gguf, read_bytes, read_floats, reading
from ggml_ext.recipes import Options
from ggml_ext.runtime import native
from models import TEXT, llama_gguf


@pytest.fixture(scope="module")
def q8_0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sources") / "q8_0.gguf"
    convert(llama_gguf(tmp_path_factory.getbasetemp()), out, type_name="q8_0", threads=1)
    return out


def data(path: Path) -> dict[str, tuple[str, bytes]]:
    found = {}
    for tensor in open_gguf(path).tensors:
        with reading(tensor) as file:
            found[tensor.name] = (tensor.type_name, read_bytes(file, tensor, 0, tensor.n_rows).tobytes())
    return found


@pytest.mark.parametrize("type_name", ["q4_0", "fq4"])  # by llama-quantize, by ourselves
def test_q8_0_is_rounded_as_what_it_decodes_to(q8_0: Path, type_name: str, tmp_path: Path) -> None:
    convert(q8_0, tmp_path / "f32.gguf", type_name="f32", threads=1)
    for tensor in open_gguf(q8_0).tensors:
        if tensor.type_name == "q8_0":
            with reading(tensor) as file:
                floats = read_floats(file, tensor, 0, tensor.n_rows)
                stored = read_bytes(file, tensor, 0, tensor.n_rows)
            assert np.array_equal(floats, native.dequantize("q8_0", stored, tensor.row_length))
    for source in ("q8_0", "f32"):
        path = q8_0 if source == "q8_0" else tmp_path / "f32.gguf"
        convert(path, tmp_path / f"from-{source}.gguf", type_name=type_name, threads=1)
    from_q8_0, from_f32 = data(tmp_path / "from-q8_0.gguf"), data(tmp_path / "from-f32.gguf")
    assert from_q8_0 == from_f32
    assert {found for found, _ in from_q8_0.values()} >= {type_name, "f32"}


def test_q8_0_is_transformed(q8_0: Path, tmp_path: Path) -> None:
    """The proof compares as f32; a transform of q8_0 itself would not be exact."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    out = tmp_path / "hadamard.gguf"
    options = Options(type_name="fq4", transform="hadamard", rounding="gptq", samples=4)
    convert(q8_0, out, options=options, calibration=text, ctx=64, threads=1)
    types = {name: type_name for name, (type_name, _) in data(out).items()}
    assert types["blk.0.attn_q.weight"] == "fq4"
    assert types["blk.0.ffn_norm.weight"] == "f32"
