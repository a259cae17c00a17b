"""GGUF files with transforms, made from plain ones: weights change by numpy, factors are added.

The mathematics is that of methods/sites.py, written out again: with a row of a weight read as W [n1, n2],
W' = L^-1 W R^-T answers x' = L^T X R, so that the products are the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType as Value
from numpy.typing import NDArray

import models
from ggml_ext.gguf.ext import KEYS

LOGITS = Path(__file__).with_name("logits.py")
Matrix = NDArray[np.float64]
HEAD_DIM = 64
READERS = {
    "attn_q": ("attn_q", "attn_k", "attn_v"),
    "attn_qkv": ("attn_qkv",),
    "attn_output": ("attn_output",),
    "ffn_gate": ("ffn_gate", "ffn_up"),
    "ffn_up": ("ffn_up",),
    "ffn_gate_exps": ("ffn_gate_exps", "ffn_up_exps"),
    "ffn_down": ("ffn_down",),
    "ffn_down_exps": ("ffn_down_exps",),
}


@dataclass
class Model:
    """A GGUF file in memory. ``ours``: keys under ggml_ext., written with the types of gguf_ext.KEYS."""

    source: Path
    tensors: dict[str, NDArray[Any]]
    ours: dict[str, Any] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return 1 + max(int(name.split(".")[1]) for name in self.tensors if name.startswith("blk."))

    def anchors(self) -> list[str]:
        """The sites of the first block: attn_in, attn_out, ffn_in, ffn_mid."""
        found = [anchor for anchor in READERS if f"blk.0.{anchor}.weight" in self.tensors]
        return [anchor for anchor in found if not (anchor == "ffn_up" and "ffn_gate" in found)]

    def n(self, anchor: str) -> int:
        return int(self.tensors[f"blk.0.{anchor}.weight"].shape[-1])

    def write(self, path: Path, types: Mapping[str, gguf.GGMLQuantizationType] | None = None) -> Path:
        """``types``: names of tensors that are quantised, by gguf's own encoder."""
        reader = gguf.GGUFReader(self.source)
        writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
        for name, entry in reader.fields.items():
            if name.startswith("GGUF.") or name == "general.architecture" or name.startswith("ggml_ext."):
                continue
            if entry.types == [Value.ARRAY]:
                continue  # empty, which GGUFWriter does not write
            inner = entry.types[1] if entry.types[0] == Value.ARRAY else None
            writer.add_key_value(name, entry.contents(), entry.types[0], inner)
        for name, value in self.ours.items():
            key = KEYS[name]
            writer.add_key_value(name, value, key.type, key.element)
        for name, array in self.tensors.items():
            kind = (types or {}).get(name)
            if kind is None:
                writer.add_tensor(name, np.ascontiguousarray(array))
            else:
                writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def read(path: Path) -> Model:
    """The file with all its tensors in float32."""
    reader = gguf.GGUFReader(path)
    tensors = {
        tensor.name: np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(
            tensor.shape.tolist()[::-1]
        )
        for tensor in reader.tensors
    }
    return Model(path, tensors)


def hadamard(order: int) -> Matrix:
    """Element (i, j) is (-1)^popcount(i & j) / sqrt(order)."""
    index = np.arange(order)
    ones = np.bitwise_count(index[:, None] & index[None, :])
    matrix: Matrix = np.where(ones % 2, -1.0, 1.0) / np.sqrt(order)
    return matrix


def well_conditioned(order: int, random: np.random.Generator) -> Matrix:
    """U diag(s) V^T with s in [0.5, 2], rounded to float32."""
    u, _ = np.linalg.qr(random.standard_normal((order, order)))
    v, _ = np.linalg.qr(random.standard_normal((order, order)))
    matrix: Matrix = ((u * random.uniform(0.5, 2.0, order)) @ v.T).astype(np.float32).astype(np.float64)
    return matrix


def dual_rows(weight: NDArray[Any], left: Matrix, right: Matrix) -> NDArray[np.float32]:
    """L^-1 W R^-T for every row of weight [..., n]."""
    shape = (*weight.shape[:-1], left.shape[0], right.shape[0])
    rows = np.linalg.inv(left) @ weight.astype(np.float64).reshape(shape) @ np.linalg.inv(right).T
    return rows.reshape(weight.shape).astype(np.float32)


def split(n: int) -> tuple[int, int]:
    """The most even n1 <= n2 with n1 n2 = n."""
    n1 = max(i for i in range(1, int(n**0.5) + 1) if n % i == 0)
    return n1, n // n1


def transform(
    model: Model,
    *,
    seed: int = 0,
    dtype: type[np.floating[Any]] = np.float32,
    identity: bool = False,
    use_hadamard: bool = False,
) -> Model:
    """Gives every site of every block a transform. attn_out: over the heads alone."""
    random = np.random.default_rng(seed)
    orders = []
    for block in range(model.blocks):
        for anchor in model.anchors():
            n1, n2 = (4, model.n(anchor) // 4) if anchor == "attn_output" else split(model.n(anchor))
            left = np.eye(n1) if identity else well_conditioned(n1, random).astype(dtype).astype(np.float64)
            right = np.eye(n2) if identity else well_conditioned(n2, random).astype(dtype).astype(np.float64)
            order = 0
            if anchor == "attn_output":
                right = np.eye(n2)
            elif use_hadamard:
                order, right = n2, hadamard(n2)
            orders.append(order)
            name = f"blk.{block}.{anchor}"
            model.tensors[f"{name}.fq_l"] = left.astype(dtype)
            if anchor != "attn_output" and not order:
                model.tensors[f"{name}.fq_r"] = right.astype(dtype)
            if not identity:
                for reader in READERS[anchor]:
                    key = f"blk.{block}.{reader}.weight"
                    model.tensors[key] = dual_rows(model.tensors[key], left, right)
    model.ours["ggml_ext.version"] = 1
    model.ours["ggml_ext.transform.name"] = "flatquant"
    if use_hadamard:
        model.ours["ggml_ext.transform.hadamard"] = orders
    return model


def transform_heads(model: Model, head_dim: int, *, seed: int = 0) -> Model:
    """Gives every block transforms of K and of V; weights stay as they are."""
    random = np.random.default_rng(seed)
    for block in range(model.blocks):
        k, v = (well_conditioned(head_dim, random) for _ in range(2))
        for name, factor in (
            ("attn_k", k),
            ("attn_q", np.linalg.inv(k).T),
            ("attn_v", v),
            ("attn_output", np.linalg.inv(v)),
        ):
            model.tensors[f"blk.{block}.{name}.fq_h"] = factor.astype(np.float32)
    model.ours["ggml_ext.version"] = 1
    model.ours["ggml_ext.transform.name"] = "flatquant"
    return model


def upgrade(model: Model) -> Model:
    """The file in version 2 of the format, which says itself what version 1 says by the names of matrices."""
    old = model.ours
    sites: list[dict[str, Any]] = []
    for block in range(model.blocks):
        for anchor in model.anchors():
            name = f"blk.{block}.{{}}.weight".format
            exps = "_exps" if anchor.endswith("_exps") else ""
            maker = {"attn_output": "attn_v", f"ffn_down{exps}": f"ffn_up{exps}"}.get(anchor)
            values = anchor == "attn_output"
            router = [name("ffn_gate_inp")] if anchor == "ffn_gate_exps" else []
            sites.append(
                {
                    "readers": [*map(name, READERS[anchor]), *router],
                    "online": len(READERS[anchor]),
                    "folded": len(router),
                    "makers": name(maker) if maker else "",
                    "first": 0,
                    "rows": model.tensors[name(maker)].shape[-2] if maker else 0,
                    "head": HEAD_DIM if values else 0,
                }
            )
    new = {name: [site[name] for site in sites] for name in sites[0]}
    new["readers"] = [reader for readers in new["readers"] for reader in readers]
    model.ours = {**old, "ggml_ext.version": 2, **{f"ggml_ext.site.{name}": new[name] for name in new}}
    if "ggml_ext.fold.orders" in old:
        orders = [[0, order, 0, 0] for order in old["ggml_ext.fold.orders"]]
        model.ours["ggml_ext.fold.orders"] = [order for block in orders for order in block]
    return model


def _in_f32(source: Path) -> Path:
    path = source.with_name(f"{source.stem}-f32.gguf")
    return path if path.exists() else read(source).write(path)


def llama_f32(base: Path) -> Path:
    """The tiny Llama in float32, made once per folder."""
    return _in_f32(models.llama_gguf(base))


def mixtral_f32(base: Path) -> Path:
    """The tiny Mixtral likewise."""
    return _in_f32(models.mixtral_gguf(base))


def run(lib_dir: Path, model: Path, out: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs logits.py under the llama.cpp of a folder, with more environment variables."""
    return subprocess.run(
        [sys.executable, str(LOGITS), str(lib_dir), str(model), str(out), *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **env},
    )
