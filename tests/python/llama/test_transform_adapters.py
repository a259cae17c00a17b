"""LoRA adapters of the original model on transformed files: exact, or refused by name.

What would break these: A or B left in the original's basis, one of them mapped by the inverse or the
transpose, rows of another head or the gate's half taken for v's or up's, an adapter type that is rounded
again, a file without a record that takes an adapter in silence.
"""

from __future__ import annotations

import re
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import fold_files as folds
import models
import transform_files as files
from ggml_ext.convert import convert
from ggml_ext.core.registry import TRANSFORMS
from ggml_ext.gguf.inspect import inspect, print_result
from ggml_ext.methods.calibrate import blocks
from ggml_ext.methods.calibrate import run as calibrate
from ggml_ext.recipes import Options

HEAD_DIM = 64
Q8_0, F16 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def llama(base: Path) -> Path:
    return files.llama_f32(base)


@pytest.fixture(scope="module")
def folded(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything at once: folds and online transforms at every site."""
    model = files.transform(folds.fold(files.read(llama), HEAD_DIM))
    return model.write(tmp_path_factory.mktemp("folded") / "folded.gguf")


def assert_same(original: Path, other: Path, adapters: folds.Adapters, at_most: float = 1e-6) -> None:
    with folds.AdapterModel(original) as a, folds.AdapterModel(other) as b:
        expected = a.log_probabilities(adapters)
        assert folds.divergence(expected, b.log_probabilities(adapters)) <= at_most
        assert folds.divergence(expected, a.log_probabilities()) > 1e-3, "the adapter hardly acts"


@pytest.mark.parametrize("target", folds.TARGETS)
def test_every_target_on_a_dense_model(target: str, llama: Path, folded: Path, tmp_path: Path) -> None:
    adapter = folds.write_adapter(tmp_path / "a.gguf", folds.shapes_of(llama, [target]))
    assert_same(llama, folded, [(adapter, 1.0)])


@pytest.mark.parametrize("target", folds.EXPERT_TARGETS)
def test_every_target_on_a_mixture(target: str, base: Path, tmp_path: Path) -> None:
    original = files.mixtral_f32(base)
    path = base / "mixtral-folded.gguf"
    if not path.exists():
        files.transform(folds.fold(files.read(original), HEAD_DIM)).write(path)
    adapter = folds.write_adapter(tmp_path / "a.gguf", folds.shapes_of(original, [target]))
    assert_same(original, path, [(adapter, 1.0)])


@pytest.mark.parametrize("kind", [F16, Q8_0])
def test_types_of_adapters(
    kind: gguf.GGMLQuantizationType, llama: Path, folded: Path, tmp_path: Path
) -> None:
    """What is mapped becomes F32, so that it is rounded no further; what llama.cpp multiplies with
    Q8_0 has its other factor rounded to 8 bits."""
    shapes = folds.shapes_of(llama, folds.TARGETS)
    adapter = folds.write_adapter(tmp_path / "a.gguf", shapes, kind=kind, rank=32)
    assert_same(llama, folded, [(adapter, 0.5)], 1e-6 if kind == F16 else 1e-3)


def test_two_adapters_and_other_scales_later(llama: Path, folded: Path, tmp_path: Path) -> None:
    shapes = folds.shapes_of(llama, folds.TARGETS)
    first, second = (folds.write_adapter(tmp_path / f"{i}.gguf", shapes, seed=i) for i in (1, 2))
    with folds.AdapterModel(llama) as a, folds.AdapterModel(folded) as b:
        for scales in ((0.5, -1.0), (1.0, 0.25), (0.0, 1.0)):
            adapters = list(zip((first, second), scales, strict=True))
            expected = a.log_probabilities(adapters)
            assert folds.divergence(expected, b.log_probabilities(adapters)) <= 1e-6, scales


def test_fused_matrices(llama: Path, tmp_path: Path) -> None:
    """q, k and v in one matrix, gate and up in one: only the last rows are of v and of up."""
    fused = files.read(llama)
    fused_folded = folds.fold(files.read(llama), HEAD_DIM)
    paths = []
    for name, model in (("plain", fused), ("folded", fused_folded)):
        for block in range(model.blocks):
            of = f"blk.{block}.{{}}.weight".format
            qkv = [model.tensors.pop(of(f"attn_{part}")) for part in "qkv"]
            model.tensors[of("attn_qkv")] = np.concatenate(qkv)
            both = [model.tensors.pop(of(f"ffn_{part}")) for part in ("gate", "up")]
            model.tensors[of("ffn_up")] = np.concatenate(both)
        paths.append(as_phi3(model, llama, tmp_path / f"{name}.gguf"))
    shapes = folds.shapes_of(paths[0], ("attn_qkv", "ffn_up"))
    adapter = folds.write_adapter(tmp_path / "a.gguf", shapes, architecture="phi3")
    assert_same(*paths, [(adapter, 1.0)])


def as_phi3(model: files.Model, llama: Path, path: Path) -> Path:
    """The same model under an architecture that reads fused matrices."""
    reader = gguf.GGUFReader(llama)
    writer = gguf.GGUFWriter(path, "phi3")
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        inner = entry.types[1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name.replace("llama.", "phi3."), entry.contents(), entry.types[0], inner)
    writer.add_sliding_window(0)
    for name, value in model.ours.items():
        key = files.KEYS[name]
        writer.add_key_value(name, value, key.type, key.element)
    for name, array in model.tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(lib_dir: Path, model: Path, adapter: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return files.run(lib_dir, model, out, "--lora", str(adapter))


def test_a_file_without_record_refuses_by_name(llama: Path, patched_lib_dir: Path, tmp_path: Path) -> None:
    model = folds.fold(files.read(llama), HEAD_DIM, record=False).write(tmp_path / "m.gguf")
    adapter = folds.write_adapter(tmp_path / "a.gguf", folds.shapes_of(llama, ["attn_v"]))
    result = load(patched_lib_dir, model, adapter, tmp_path / "out.npy")
    assert result.returncode == 1
    assert "ggml-ext: LoRA tensor 'blk." in result.stderr
    assert "does not record what its transform 'awq' folded into the weights" in result.stderr
    head = folds.write_adapter(tmp_path / "head.gguf", {"output.weight": (models.VOCAB, models.HIDDEN)})
    result = load(patched_lib_dir, model, head, tmp_path / "out.npy")
    assert result.returncode == 0, "nothing is folded into the head"


def test_a_matrix_outside_the_record_is_refused_by_name(
    llama: Path, folded: Path, patched_lib_dir: Path, tmp_path: Path
) -> None:
    """Whether it reads folded channels is not known."""
    adapter = folds.write_adapter(tmp_path / "a.gguf", {"blk.0.attn_norm.weight": (1, models.HIDDEN)})
    assert load(patched_lib_dir, llama, adapter, tmp_path / "out.npy").returncode == 0
    result = load(patched_lib_dir, folded, adapter, tmp_path / "out.npy")
    assert result.returncode == 1
    assert "LoRA tensor 'blk.0.attn_norm.weight' is of a matrix that the model's record" in result.stderr


def test_a_singular_record_is_refused_by_name(llama: Path, patched_lib_dir: Path, tmp_path: Path) -> None:
    model = folds.fold(files.read(llama), HEAD_DIM)
    model.ours["ggml_ext.fold.heads"] = [0.0] * len(model.ours["ggml_ext.fold.heads"])
    adapter = folds.write_adapter(tmp_path / "a.gguf", folds.shapes_of(llama, ["attn_output"]))
    result = load(patched_lib_dir, model.write(tmp_path / "m.gguf"), adapter, tmp_path / "out.npy")
    assert result.returncode == 1
    # The adapter's tensors come in no order.
    assert re.search(
        r"key 'ggml_ext\.fold\.heads' has no inverse for 'blk\.[01]\.attn_output\.weight'", result.stderr
    )


def test_with_transforms_of_the_cache(llama: Path, patched_lib_dir: Path, tmp_path: Path) -> None:
    """Adapters of k and v act in front of the cache's own transforms."""
    model = files.transform_heads(folds.fold(files.read(llama), HEAD_DIM), HEAD_DIM)
    path = model.write(tmp_path / "m.gguf")
    adapter = folds.write_adapter(tmp_path / "a.gguf", folds.shapes_of(llama, ("attn_k", "attn_v")))
    found = []
    for name in (llama, path):
        out = tmp_path / "out.npy"
        options = ("--flash", "--cache", "8", "8", "--lora", str(adapter))
        result = files.run(patched_lib_dir, name, out, *options)
        assert result.returncode == 0, result.stderr[-2000:]
        logits = np.load(out).astype(np.float64)
        found.append(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    assert folds.divergence(*found) <= 2e-3, "more than what q8_0 rounds"


@pytest.fixture(scope="module")
def converted(base: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the converter makes of the tiny Llama, in floats, by transform."""
    folder = tmp_path_factory.mktemp("converted")
    text = folder / "text.txt"
    text.write_text(models.TEXT * 6)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate.hf, "to_gguf", lambda _folder, out, **_: out.write_bytes(llama.read_bytes()))
        patch.setattr(blocks, "TransformRequest", partial(blocks.TransformRequest, steps=4))
        for transform in TRANSFORMS:
            plain = transform == "none"
            convert(
                llama if plain else models.llama_dir(base),
                folder / f"{transform}.gguf",
                options=Options("q8_0", transform, "rtn", samples=None if plain else 6),
                calibration=None if plain else text,
                keep=["weight"],
                ctx=32,
                threads=1,
                warn=lambda _line: None,
            )
    torch.set_num_threads(threads)
    return {path.stem: path for path in folder.glob("*.gguf")}


def test_converted_files_take_adapters_as_the_plain_one_does(
    llama: Path, converted: dict[str, Path], tmp_path: Path
) -> None:
    """Every target and two adapters at once. A record that misses a part of what was folded would show."""
    cases: dict[str, folds.Adapters] = {
        target: [(folds.write_adapter(tmp_path / target, folds.shapes_of(llama, [target])), 1.0)]
        for target in folds.TARGETS
    }
    shapes = folds.shapes_of(llama, folds.TARGETS)
    two = [folds.write_adapter(tmp_path / f"{seed}", shapes, seed=seed) for seed in (1, 2)]
    cases["two"] = [(two[0], 0.5), (two[1], -1.0)]
    found: dict[str, dict[str, Any]] = {}
    for name, path in (("original", llama), *sorted(converted.items())):
        with folds.AdapterModel(path) as model:
            found[name] = {case: model.log_probabilities(adapters) for case, adapters in cases.items()}
    original = found.pop("original")
    for case, expected in original.items():
        for transform, its in found.items():
            assert folds.divergence(expected, its[case]) <= 1e-9, (case, transform)


def test_inspect_shows_the_record(
    llama: Path, converted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, words in (
        ("awq", "diagonals at 8 sites, heads of v at 0"),
        ("folded", "diagonals at 8 sites, heads of v at 2"),
        ("hadamard", "diagonals at 0 sites, heads of v at 2"),
        ("flatquant", "diagonals at 8 sites, heads of v at 2"),
    ):
        print_result(inspect(converted[name]))
        assert words in capsys.readouterr().out
    old = folds.fold(files.read(llama), HEAD_DIM, record=False).write(tmp_path / "m.gguf")
    print_result(inspect(old))
    assert "not recorded; LoRA adapters are refused" in capsys.readouterr().out


def test_converting_a_folded_file_keeps_the_record(llama: Path, tmp_path: Path) -> None:
    """The folds stay in the weights, so what says so must not go."""
    source, out = tmp_path / "f32.gguf", tmp_path / "out.gguf"
    folds.fold(files.read(llama), HEAD_DIM).write(source)
    convert(source, out, type_name="q8_0")
    adapter = folds.write_adapter(tmp_path / "a.gguf", folds.shapes_of(llama, ["attn_v", "ffn_down"]))
    with folds.AdapterModel(llama) as a, folds.AdapterModel(out) as b:
        adapters = [(adapter, 1.0)]
        assert folds.divergence(a.log_probabilities(adapters), b.log_probabilities(adapters)) < 1e-2
