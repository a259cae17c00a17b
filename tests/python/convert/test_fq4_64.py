"""Models whose rows are a multiple of 64 but not of 256: FQ4 becomes FQ4_64, FQ3 becomes FQ3_64, and
llama.cpp computes with them what their weights say.

What would break these: a fallback to more bits, a kernel or a loader that takes the type for another.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest

from eval_models import make_model, text_of
from ggml_ext.convert import convert
from ggml_ext.gguf import ext, fq3_64, fq4_64
from ggml_ext.gguf.added import write_with
from ggml_ext.gguf.header import read_header, value
from ggml_ext.gguf.source import open_gguf
from ggml_ext.methods.calibrate.proof import logits
from ggml_ext.recipes import Options


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "text").write_text(text_of(400))
    return make_model(folder / "m.gguf")


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
@pytest.mark.parametrize(
    ("name", "number", "type_", "module"),
    [("fq4", 201, ext.FQ4_64, fq4_64), ("fq3", 203, ext.FQ3_64, fq3_64)],
    ids=["fq4", "fq3"],
)
def test_the_file_and_what_it_computes(
    model: Path,
    tmp_path: Path,
    rounding: str,
    name: str,
    number: int,
    type_: gguf.GGMLQuantizationType,
    module: ModuleType,
) -> None:
    out = tmp_path / "o.gguf"
    remarks: list[str] = []
    text = None if rounding == "rtn" else model.with_name("text")
    options = Options(name, "none", rounding, samples=8 if rounding == "gptq" else None)
    convert(model, out, options=options, calibration=text, ctx=32, threads=1, warn=remarks.append)
    tensors = {tensor.name: tensor for tensor in open_gguf(out).tensors}
    matrices = [name for name in tensors if name.startswith("blk.") and len(tensors[name].dims) == 2]
    assert {tensors[name].type_name for name in matrices} == {f"{name}_64"}
    assert any(f"rows do not fit the blocks of {name}, used {name}_64" in line for line in remarks)
    assert value(read_header(out).keys["general.file_type"]) == number
    decoded = {
        tensor.name: module.dequantize(np.asarray(tensor.data))
        for tensor in gguf.GGUFReader(out).tensors
        if tensor.tensor_type == type_
    }
    plain = tmp_path / "decoded.gguf"
    write_with(model, decoded, plain)
    got, wanted = logits(out, threads=1), logits(plain, threads=1)
    assert np.abs(got - wanted).max() < 0.03 * np.abs(wanted).max()
