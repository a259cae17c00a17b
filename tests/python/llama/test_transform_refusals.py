"""Files and switches that the loader must refuse, by the name of the tensor, key or variable that is wrong.

What would break these: a check that passes a wrong file, one that refuses it without saying where.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import transform_files as files
from transform_files import run


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.llama_f32(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("value", ["a5", "", "a4/64", "A4"])
def test_unknown_switch_is_refused_by_name(
    value: str, llama: Path, patched_lib_dir: Path, tmp_path: Path
) -> None:
    result = run(patched_lib_dir, llama, tmp_path / "out.npy", GGML_EXT_ACT=value)
    assert result.returncode == 1
    assert (
        f"environment variable GGML_EXT_ACT is '{value}'; set it to a8, a4, a4/32 or a4/256" in result.stderr
    )


def make_plm(path: Path) -> Path:
    """A PLM of one block, whose attention multiplies its weights past build_lora_mm; q is in Q8_0."""
    writer = gguf.GGUFWriter(path, "plm")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_kv_lora_rank(32)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(320)
    writer.add_tokenizer_model("none")
    random = np.random.default_rng(3)
    for name, shape in {
        "token_embd": (320, 64),
        "output_norm": (64,),
        "blk.0.attn_norm": (64,),
        "blk.0.attn_q": (64, 64),
        "blk.0.attn_kv_a_mqa": (48, 64),
        "blk.0.attn_kv_a_norm": (32,),
        "blk.0.attn_kv_b": (2 * (16 + 32), 32),
        "blk.0.attn_output": (64, 64),
        "blk.0.ffn_norm": (64,),
        "blk.0.ffn_up": (64, 64),
        "blk.0.ffn_down": (64, 64),
    }.items():
        values = random.standard_normal(shape, np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if name == "blk.0.attn_q" else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_architecture_that_bypasses_the_hook_is_refused(patched_lib_dir: Path, tmp_path: Path) -> None:
    plm = make_plm(tmp_path / "plm.gguf")
    assert run(patched_lib_dir, plm, tmp_path / "out.npy").returncode == 0
    result = run(patched_lib_dir, plm, tmp_path / "out.npy", GGML_EXT_ACT="a4")
    assert result.returncode == 1
    assert "architecture 'plm' uses tensor 'blk.0.attn_q.weight' in a way that" in result.stderr


Change = Callable[[files.Model], object]


def drop(name: str) -> Change:
    return lambda model: model.tensors.pop(name)


def put(name: str, value: NDArray[Any]) -> Change:
    return lambda model: model.tensors.update({name: value})


def scale(name: str, factor: float) -> Change:
    return lambda model: model.tensors.update({name: model.tensors[name] * np.float32(factor)})


def key(name: str, value: Any) -> Change:
    return lambda model: model.ours.update({f"ggml_ext.{name}": value})


def no_key(name: str) -> Change:
    return lambda model: model.ours.pop(f"ggml_ext.{name}")


def fewer_errors(model: files.Model) -> None:
    values = {"tensors": ["a", "b"], "values": [0.5], "kind": "output"}
    model.ours |= {f"ggml_ext.error.{name}": value for name, value in values.items()}


def record(**values: Any) -> Change:
    """A record of folds, sound but for ``values``: d at attn_q of both blocks, the heads of block 0."""
    fold = {"sizes": [256, 0, 0, 0] * 2, "diagonals": [2.0] * 512, "orders": [64, 0]}
    fold |= {"heads": np.eye(64).flatten().tolist(), **values}

    def change(model: files.Model) -> None:
        model.ours |= {f"ggml_ext.fold.{name}": value for name, value in fold.items() if value is not None}

    return change


def both(*changes: Change) -> Change:
    return lambda model: [change(model) for change in changes]


EYE = np.eye(16, dtype=np.float32)
NAN = np.where(np.arange(256).reshape(16, 16) == 7, np.float32(np.nan), EYE)
HEAD = np.full((64, 64), np.nan, np.float32)
ORDERS, CLIPS = [0] * 8, [1.0] * 8

# What is done to a sound file with factors at every site and for every head, and how the loader says it.
MALFORMED: dict[str, tuple[Change, str]] = {
    "type": (put("blk.0.attn_q.fq_l", EYE.astype(np.int32)), "tensor 'blk.0.attn_q.fq_l' is of type i32"),
    "not square": (put("blk.0.ffn_gate.fq_r", EYE[:8]), "tensor 'blk.0.ffn_gate.fq_r' has shape"),
    "three dimensions": (
        put("blk.0.ffn_gate.fq_r", np.stack([EYE, EYE])),
        "tensor 'blk.0.ffn_gate.fq_r' has shape",
    ),
    "product": (
        put("blk.1.ffn_down.fq_l", EYE[:8, :8]),
        "tensor 'blk.1.ffn_down.fq_l' makes a transform of orders 8 x 32",
    ),
    "does not divide": (
        put("blk.0.attn_output.fq_l", EYE[:3, :3]),
        "tensor 'blk.0.attn_output.fq_l' makes a transform of order 3",
    ),
    "nan": (put("blk.1.attn_q.fq_r", NAN), "tensor 'blk.1.attn_q.fq_r' holds a value that is not finite"),
    "nan in f16": (
        put("blk.1.attn_q.fq_r", NAN.astype(np.float16)),
        "tensor 'blk.1.attn_q.fq_r' holds a value that is not finite",
    ),
    "nan in a head": (
        put("blk.1.attn_q.fq_h", HEAD),
        "tensor 'blk.1.attn_q.fq_h' holds a value that is not finite",
    ),
    "no name": (no_key("transform.name"), "tensor 'blk.0.attn_k.fq_h' belongs to a transform"),
    "name none": (key("transform.name", "none"), "but key 'ggml_ext.transform.name' is 'none'"),
    "folded name": (key("transform.name", "awq"), "but key 'ggml_ext.transform.name' is 'awq'"),
    "unknown name": (key("transform.name", "spin"), "key 'ggml_ext.transform.name' is 'spin'"),
    "no version": (no_key("version"), "key 'ggml_ext.version' is missing"),
    "short hadamard": (
        key("transform.hadamard", ORDERS[:4]),
        "key 'ggml_ext.transform.hadamard' has 4 elements",
    ),
    "long clip": (key("transform.clip", [*CLIPS, 1.0]), "key 'ggml_ext.transform.clip' has 9 elements"),
    "odd hadamard": (
        key("transform.hadamard", [0, 24, *ORDERS[2:]]),
        "key 'ggml_ext.transform.hadamard' element 1 is 24",
    ),
    "hadamard beside right": (
        key("transform.hadamard", [*ORDERS[:4], 16, 0, 0, 0]),
        "tensor 'blk.1.attn_q.fq_r' stands beside element 4",
    ),
    "hadamard beside left": (
        key("transform.hadamard", [0, 128, *ORDERS[2:]]),
        "tensor 'blk.0.attn_output.fq_l' makes a transform of orders 4 x 128",
    ),
    "clip of zero": (key("transform.clip", [*CLIPS[:7], 0]), "key 'ggml_ext.transform.clip' element 7 is 0"),
    "clip of two": (key("transform.clip", [2.0, *CLIPS[1:]]), "key 'ggml_ext.transform.clip' element 0 is 2"),
    "bits": (key("activation.bits", 6), "key 'ggml_ext.activation.bits' is 6"),
    "group": (key("activation.group", 128), "key 'ggml_ext.activation.group' is 128"),
    "fewer errors": (fewer_errors, "key 'ggml_ext.error.values' has 1 elements"),
    "errors of nothing": (key("error.values", [0.5]), "key 'ggml_ext.error.tensors' is missing"),
    "losses of nothing": (key("loss.values", [0.5]), "key 'ggml_ext.loss.tensors' is missing"),
    "half a K pair": (drop("blk.0.attn_q.fq_h"), "tensor 'blk.0.attn_k.fq_h' needs 'blk.0.attn_q.fq_h'"),
    "half a V pair": (drop("blk.1.attn_v.fq_h"), "tensor 'blk.1.attn_output.fq_h' needs 'blk.1.attn_v.fq_h'"),
    "no inverse of K": (scale("blk.0.attn_q.fq_h", 1.01), "tensor 'blk.0.attn_q.fq_h' does not undo"),
    "no inverse of V": (scale("blk.0.attn_v.fq_h", 0.99), "tensor 'blk.0.attn_output.fq_h' does not undo"),
    "head order": (put("blk.0.attn_v.fq_h", EYE), "tensor 'blk.0.attn_v.fq_h' has order 16"),
    "not an anchor": (put("blk.0.attn_v.fq_l", EYE), "tensor 'blk.0.attn_v.fq_l' is a transform of no site"),
    "absent matrix": (
        put("blk.0.ffn_gate_exps.fq_l", EYE),
        "tensor 'blk.0.ffn_gate_exps.fq_l' is a transform of no site",
    ),
    "no such block": (put("blk.2.attn_q.fq_l", EYE), "tensor 'blk.2.attn_q.fq_l' is a transform of no site"),
    "no such side": (put("blk.0.attn_q.fq_x", EYE), "tensor 'blk.0.attn_q.fq_x' is a transform of no site"),
    "no rows": (
        put("blk.0.attn_q.fq_l", np.zeros((0, 0), np.float32)),
        "tensor 'blk.0.attn_q.fq_l' has shape",
    ),
    "hadamard of 2^31": (
        both(
            drop("blk.0.attn_q.fq_r"),
            drop("blk.0.attn_q.fq_l"),
            key("transform.hadamard", [2**31, *ORDERS[1:]]),
        ),
        "key 'ggml_ext.transform.hadamard' has in element 0 order 2147483648, which does not fit",
    ),
    "hadamard of 2^31 and a clip": (
        both(
            drop("blk.0.attn_q.fq_r"),
            drop("blk.0.attn_q.fq_l"),
            key("transform.hadamard", [2**31, *ORDERS[1:]]),
            key("transform.clip", [0.5, *CLIPS[1:]]),
        ),
        "key 'ggml_ext.transform.hadamard' has in element 0 order 2147483648",
    ),
    "folds without sizes": (record(sizes=None), "key 'ggml_ext.fold.sizes' is missing beside"),
    "folds of nothing": (
        both(record(), key("transform.name", "none")),
        "key 'ggml_ext.fold.sizes' says what a transform folded",
    ),
    "fewer sizes": (
        record(sizes=[256, 0, 0, 256]),
        "key 'ggml_ext.fold.sizes' has 4 elements, not four for each of the 2 blocks",
    ),
    "fewer orders": (record(orders=[64]), "key 'ggml_ext.fold.orders' has 1 elements, not one for each"),
    "fewer diagonals": (
        record(diagonals=[2.0] * 500),
        "key 'ggml_ext.fold.diagonals' has 500 elements, 'ggml_ext.fold.sizes' announces 512",
    ),
    "no heads": (
        record(heads=None),
        "key 'ggml_ext.fold.heads' has 0 elements, 'ggml_ext.fold.orders' announces 4096",
    ),
    "zero in a diagonal": (
        record(diagonals=[*[2.0] * 511, 0.0]),
        "key 'ggml_ext.fold.diagonals' element 511 is 0",
    ),
    "nan in a diagonal": (
        record(diagonals=[float("nan"), *[2.0] * 511]),
        "key 'ggml_ext.fold.diagonals' element 0 is nan",
    ),
    "infinity in a head": (
        record(heads=[float("inf")] * 4096),
        "key 'ggml_ext.fold.heads' element 0 is inf",
    ),
    "diagonal of another length": (
        record(sizes=[128, 128, 0, 0] * 2),
        "key 'ggml_ext.fold.sizes' speaks of block 0: a diagonal of 128 channels for a site of 256",
    ),
    "head of another order": (
        record(orders=[16, 0], heads=[0.5] * 256),
        "key 'ggml_ext.fold.orders' speaks of block 0: a matrix of order 16 for heads of 64",
    ),
    "diagonal of query heads": (
        record(sizes=[0, 256, 0, 0] * 2, diagonals=[2.0] * 64 + [3.0] * 448),
        "key 'ggml_ext.fold.diagonals' speaks of block 0: a diagonal that differs between query heads",
    ),
    "outside of blocks": (put("output.fq_l", EYE), "tensor 'output.fq_l' is a transform of no site"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused_by_name(
    case: str, llama: Path, patched_lib_dir: Path, tmp_path: Path
) -> None:
    change, message = MALFORMED[case]
    model = files.transform_heads(files.transform(files.read(llama)), 64)
    change(model)
    result = run(patched_lib_dir, model.write(tmp_path / "t.gguf"), tmp_path / "out.npy")
    assert result.returncode == 1
    assert "error loading model: ggml-ext: " in result.stderr
    assert message in result.stderr


def test_hadamard_that_does_not_divide_is_refused(llama: Path, patched_lib_dir: Path, tmp_path: Path) -> None:
    model = files.read(llama)
    model.ours = {"ggml_ext.version": 1, "ggml_ext.transform.name": "hadamard"}
    model.ours["ggml_ext.transform.hadamard"] = [0, 0, 0, 1024, 0, 0, 0, 0]
    result = run(patched_lib_dir, model.write(tmp_path / "t.gguf"), tmp_path / "out.npy")
    assert result.returncode == 1
    assert "key 'ggml_ext.transform.hadamard' has in element 3 order 1024" in result.stderr


def test_file_that_stock_llama_would_run_wrongly_is_refused(
    llama: Path, patched_lib_dir: Path, stock_build: Path, tmp_path: Path
) -> None:
    """Hadamard matrices alone leave no trace that stock llama.cpp would stumble over."""
    model = files.read(llama)
    model.ours = {"ggml_ext.version": 1, "ggml_ext.transform.name": "hadamard"}
    model.ours["ggml_ext.transform.hadamard"] = [0, 0, 0, 512, 0, 0, 0, 0]
    result = run(patched_lib_dir, model.write(tmp_path / "alone.gguf"), tmp_path / "out.npy")
    assert result.returncode == 1
    assert "key 'ggml_ext.transform.hadamard' is in a file without factors or FQ4 weights" in result.stderr
    model.tensors["blk.0.ffn_down.fq_l"] = np.ones((1, 1), np.float32)
    path = model.write(tmp_path / "marked.gguf")
    assert run(patched_lib_dir, path, tmp_path / "out.npy").returncode == 0
    assert run(stock_build, path, tmp_path / "out.npy").returncode == 1


SAVE = """
import sys, llama_cpp.llama_cpp as api
model = api.llama_model_load_from_file(sys.argv[1].encode(), api.llama_model_default_params())
api.llama_model_save_to_file(model, sys.argv[2].encode())
"""


def test_saving_from_memory_is_refused(llama: Path, patched_lib_dir: Path, tmp_path: Path) -> None:
    """llama.cpp would write the transformed weights without their factors."""
    path = files.transform(files.read(llama)).write(tmp_path / "t.gguf")
    environment = {"LLAMA_CPP_LIB_PATH": str(patched_lib_dir), "GGML_NO_BACKTRACE": "1"}
    command = [sys.executable, "-c", SAVE, str(path), str(tmp_path / "saved.gguf")]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert result.returncode != 0
    assert "a model with transforms cannot be saved from memory" in result.stderr
    assert not (tmp_path / "saved.gguf").exists()
