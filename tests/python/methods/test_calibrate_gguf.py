"""Calibration of GGUF files: any architecture, split files, and what is refused."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

import models
import tiny_bpe
from arch_models import ArchModel
from eval_models import make_model, text_of
from ggml_ext.convert import convert
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.header import read_header, value
from ggml_ext.gguf.source import open_gguf
from ggml_ext.methods.calibrate import blocks
from ggml_ext.methods.calibrate import run as calibrate
from ggml_ext.methods.calibrate.proof import logits
from ggml_ext.recipes import Options
from ggml_ext.types import rules

GPTQ = Options("q4_0", "none", "gptq", samples=4)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(models.TEXT * 6)
    return path


def convert_quietly(source: Path, out: Path, text: Path, **more: Any) -> list[str]:
    """Returns the remarks."""
    lines: list[str] = []
    convert(source, out, calibration=text, ctx=32, threads=1, warn=lines.append, **more)
    return lines


def test_a_folder_and_its_gguf_give_the_same_file(
    text: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte: no key of the result says which of the two it was made of."""
    base = tmp_path_factory.getbasetemp()
    folder, gguf = models.llama_dir(base), models.llama_gguf(base)
    monkeypatch.setattr(calibrate.hf, "to_gguf", lambda _folder, out, **_: shutil.copyfile(gguf, out))
    monkeypatch.setattr(blocks, "TransformRequest", partial(blocks.TransformRequest, steps=4))
    for name, source in (("folder", folder), ("gguf", gguf)):
        convert_quietly(source, tmp_path / name, text, recipe="flat4", options=Options(samples=4))
    assert (tmp_path / "folder").read_bytes() == (tmp_path / "gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "gguf"]


def test_a_split_file_is_one_model(text: Path, tmp_path: Path) -> None:
    """With transforms, whose fold is in another part than its matrices."""
    options = Options("fq4", "smoothquant", "gptq", samples=4)
    whole = tiny_bpe.write(tmp_path / "whole.gguf")
    parts = tiny_bpe.write_split(tmp_path / "parts")
    convert_quietly(whole, tmp_path / "a.gguf", text, options=options)
    convert_quietly(parts[0], tmp_path / "b.gguf", text, options=options)
    made = [open_gguf(tmp_path / name) for name in ("a.gguf", "b.gguf")]
    assert [t.name for t in made[0].tensors] == [t.name for t in made[1].tensors]
    for one, other in zip(made[0].tensors, made[1].tensors, strict=True):
        data = [np.fromfile(t.path, np.uint8, t.n_bytes, offset=t.offset) for t in (one, other)]
        np.testing.assert_array_equal(*data, err_msg=one.name)
    kinds = {tensor.name: tensor.type_name for tensor in made[1].tensors}
    assert kinds["blk.0.ffn_down.weight"] == "fq4"


@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_a_state_space_model(architectures: dict[str, ArchModel], tmp_path: Path, transform: str) -> None:
    """Its matrices are rounded by what was observed, and have places for transforms of their own."""
    source, out = architectures["mamba-dense"].path, tmp_path / "m.gguf"
    text = tmp_path / "text"
    text.write_text("".join(chr(97 + i * i % 26) for i in range(5 * 32 * 6)))
    lines = convert_quietly(source, out, text, options=Options("q4_0", transform, "gptq", samples=4))
    keys = read_header(out).keys
    errors = dict(
        zip(value(keys["ggml_ext.error.tensors"]), value(keys["ggml_ext.error.values"]), strict=True)
    )
    rounded = {t.name for t in open_gguf(out).tensors if t.name[:4] == "blk." and t.type_name == "q4_0"}
    assert rounded
    assert {*rounded, "output.weight"} == {name for name in errors if errors[name] > 0}
    assert not [line for line in lines if "no place for a transform" in line]
    readers = value(keys["ggml_ext.site.readers"]) if transform != "none" else []
    assert set(readers) == (set() if transform == "none" else rounded)
    assert value(keys["ggml_ext.version"]) == (1 if transform == "none" else 2)
    assert np.isfinite(logits(out, threads=1)).all()


@pytest.mark.parametrize(
    ("type_name", "rounding"), [("q4_0", "gptq"), ("q4_0", "imatrix"), ("q4_k_m", "imatrix")]
)
def test_what_no_product_reads_stays_as_it_is(
    architectures: dict[str, ArchModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    type_name: str,
    rounding: str,
) -> None:
    """The graph says so: no name is needed where the model is observed. llama.cpp would abort otherwise."""
    monkeypatch.setattr(rules, "_NO_MATRICES", ())
    monkeypatch.setenv("GGML_EXT_CACHE", str(tmp_path / "cache"))
    source, out = architectures["qwen4exp-moe"].path, tmp_path / "m.gguf"
    (tmp_path / "text").write_text("".join(chr(97 + i * i % 26) for i in range(5 * 32 * 6)))
    options = Options(type_name, "none", rounding, samples=4 if rounding == "gptq" else None)
    lines = convert_quietly(source, out, tmp_path / "text", options=options)
    before, after = ({t.name: t.type_name for t in open_gguf(path).tensors} for path in (source, out))
    gains = [name for name in before if ".ple_conv1d" in name or ".ple_norm_" in name]
    assert gains
    assert all(after[name] == before[name] for name in gains)
    assert not [line for line in lines if "ple_" in line]
    assert np.isfinite(logits(out, threads=1)).all()


def test_a_quantised_source_is_refused_in_a_line(tmp_path: Path) -> None:
    source = make_model(tmp_path / "m.gguf", kind=Type.Q4_0)
    (tmp_path / "text").write_text(text_of(400))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(GgmlExtError, match="q4_0") as caught:
        convert_quietly(source, tmp_path / "o.gguf", tmp_path / "text", options=GPTQ)
    assert ";" in str(caught.value), "no remedy"
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before
