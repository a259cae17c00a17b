"""Random-weight GGUF models with the shapes of small Llamas, one file per shape, depth and type.

Speed depends on shapes and types, not on what the weights say: one Gaussian tile per row length is quantised
and repeated with its rows rotated, so that a file takes seconds. All matrices have the model's type,
embedding and head included; there is no vocabulary, only its size.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.atomic import atomic_path
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.files import digest
from ggml_ext.gguf.ext import FQ4
from ggml_ext.runtime import native

TYPES = {
    "FQ4": FQ4,
    "Q4_0": gguf.GGMLQuantizationType.Q4_0,
    "Q4_K": gguf.GGMLQuantizationType.Q4_K,
    "IQ4_XS": gguf.GGMLQuantizationType.IQ4_XS,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
    "F16": gguf.GGMLQuantizationType.F16,
}
"""Types of models, by name."""

VOCABULARY = 32000
HEAD_SIZE = 64
CONTEXT = 131072
_TILE_ROWS = 256
_RECIPE = 1  # counts changes of what the same shape, depth and type are written as


@dataclass(frozen=True)
class Shape:
    """``layers``: of the model that the shape is taken from; files usually have fewer."""

    name: str
    hidden: int
    ff: int
    layers: int
    heads: int
    heads_kv: int
    vocabulary: int = VOCABULARY

    def block(self) -> dict[str, tuple[int, int]]:
        """Matrix -> (rows, row length) of one decoder layer."""
        kv = self.heads_kv * HEAD_SIZE
        return {
            "attn_q": (self.heads * HEAD_SIZE, self.hidden),
            "attn_k": (kv, self.hidden),
            "attn_v": (kv, self.hidden),
            "attn_output": (self.hidden, self.heads * HEAD_SIZE),
            "ffn_gate": (self.ff, self.hidden),
            "ffn_up": (self.ff, self.hidden),
            "ffn_down": (self.hidden, self.ff),
        }


SHAPES = {
    "1B": Shape("1B", hidden=2048, ff=8192, layers=16, heads=32, heads_kv=8),
    # Qwen2-0.5B has 14 heads and 896 channels, no multiple of a block of 256: rows would not be FQ4.
    "0.5B": Shape("0.5B", hidden=1024, ff=4864, layers=24, heads=16, heads_kv=2),
}


@dataclass(frozen=True)
class Model:
    """One file: ``layers`` decoder layers of ``shape`` in the type ``type_name`` (a key of TYPES)."""

    shape: Shape
    layers: int
    type_name: str

    @property
    def row_bytes(self) -> Callable[[int], int]:
        """Row length -> bytes."""
        block, size = gguf.GGML_QUANT_SIZES[TYPES[self.type_name]]
        return lambda k: k // block * size

    @property
    def prefill_macs(self) -> int:
        """Multiply-adds with weights per prompt token. Only the last token's logits are wanted, so llama.cpp
        drops the others before the last layer's feed-forward part (inp_out_ids in src/models/llama.cpp)."""
        sizes = {name: rows * k for name, (rows, k) in self.shape.block().items()}
        dropped = sum(size for name, size in sizes.items() if name.startswith("ffn_"))
        return self.layers * sum(sizes.values()) - dropped

    @property
    def decode_bytes(self) -> int:
        """Bytes of the matrices that one generated token reads: all layers and the head."""
        layer = sum(rows * self.row_bytes(k) for rows, k in self.shape.block().values())
        return self.layers * layer + self.shape.vocabulary * self.row_bytes(self.shape.hidden)

    def recipe(self) -> dict[str, Any]:
        """Everything that the file's bytes depend on, but for the quantisers."""
        return {"recipe": _RECIPE, **asdict(self)}

    def file_name(self) -> str:
        """Name of the file; changes with the recipe."""
        return f"{self.shape.name}-{self.layers}L-{self.type_name}-{digest(self.recipe())[:8]}.gguf"


@functools.lru_cache
def _tile(type_name: str, k: int) -> NDArray[Any]:
    """Gaussian rows of power 1 / k, [_TILE_ROWS, bytes of a row] (F16: [_TILE_ROWS, k])."""
    rows = np.random.default_rng(k).standard_normal((_TILE_ROWS, k), np.float32) / np.float32(np.sqrt(k))
    return rows.astype(np.float16) if type_name == "F16" else native.quantize(type_name, rows)


def _matrix(type_name: str, rows: int, k: int, turn: int) -> NDArray[Any]:
    """[rows, bytes of a row]: the tile over and over, its rows rotated further each time."""
    tile = _tile(type_name, k)
    starts = range(0, rows, _TILE_ROWS)
    parts = [np.roll(tile, 37 * (turn + number), axis=0) for number in range(len(starts))]
    return np.concatenate(parts)[:rows]


def _write(model: Model, path: Path) -> None:
    shape = model.shape
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random {shape.name} shape, {model.layers} layers, {model.type_name}")
    writer.add_block_count(model.layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads_kv)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")

    matrices = {"token_embd": (shape.vocabulary, shape.hidden), "output": (shape.vocabulary, shape.hidden)}
    norms = ["output_norm"]
    for layer in range(model.layers):
        matrices |= {f"blk.{layer}.{name}": size for name, size in shape.block().items()}
        norms += [f"blk.{layer}.attn_norm", f"blk.{layer}.ffn_norm"]
    dtype = np.float16 if model.type_name == "F16" else np.uint8
    for name in norms:
        writer.add_tensor_info(f"{name}.weight", (shape.hidden,), np.dtype(np.float32), 4 * shape.hidden)
    for name, (rows, k) in matrices.items():
        size = (rows, model.row_bytes(k) // np.dtype(dtype).itemsize)
        raw = None if model.type_name == "F16" else TYPES[model.type_name]
        writer.add_tensor_info(
            f"{name}.weight", size, np.dtype(dtype), rows * model.row_bytes(k), raw_dtype=raw
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _ in norms:
            writer.write_tensor_data(np.ones(shape.hidden, np.float32))
        for turn, (rows, k) in enumerate(matrices.values()):
            writer.write_tensor_data(_matrix(model.type_name, rows, k, turn))
    finally:
        writer.close()


def build(model: Model, folder: Path) -> Path:
    """Path of the model's file in ``folder``, written if it is not there yet. Raises GgmlExtError."""
    path = folder / model.file_name()
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GgmlExtError(f"cannot make {folder}: {error.strerror}; choose another --dir") from error
    with atomic_path(path) as temporary:
        _write(model, temporary)
    return path


def describe(model: Model) -> str:
    """One line of JSON for messages and files."""
    return json.dumps(model.recipe(), sort_keys=True)
