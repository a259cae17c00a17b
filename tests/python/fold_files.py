"""LoRA adapters, and GGUF files whose weights have the offline part of a transform folded in, made by numpy.

The mathematics of ggml_ext.fold, written out again for whole models: d divides a site's channels where they
are made and multiplies the columns that read them; H mixes the channels of each value head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

import transform_files as files
from ggml_ext.runtime.llama import Model

TARGETS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
EXPERT_TARGETS = (*TARGETS[:4], "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
PROMPT = np.arange(40, dtype=np.int32) * 7 % 320
Adapters = Sequence[tuple[Path, float]]


def _d(n: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Of both signs and far from 1: a diagonal left out, inverted or shifted shows."""
    sign = random.choice([-1.0, 1.0], n)
    return (sign * random.uniform(0.3, 3.0, n)).astype(np.float32).astype(np.float64)


def fold(model: files.Model, head_dim: int, *, seed: int = 0, record: bool = True) -> files.Model:
    """Folds a diagonal into every site and a matrix into the value heads of every block.

    record: with the keys that say so. The order of a later online transform is free: it comes behind.
    """
    random = np.random.default_rng(seed)
    t = {name: array.astype(np.float64) for name, array in model.tensors.items()}
    sizes: list[int] = []
    diagonals: list[NDArray[np.float64]] = []
    heads: list[NDArray[np.float64]] = []
    for block in range(model.blocks):
        name = f"blk.{block}.{{}}.weight".format
        exps = "_exps" if name("ffn_up_exps") in t else ""
        n, n_v, n_mid = model.n("attn_q"), len(t[name("attn_v")]), model.n(f"ffn_down{exps}")
        group = model.n("attn_output") // n_v
        d_attn, d_v, d_ffn, d_mid = (_d(size, random) for size in (n, n_v, n, n_mid))
        head = files.well_conditioned(head_dim, random)
        mixed = np.kron(np.eye(n_v // head_dim), head)
        d_out = np.repeat(d_v.reshape(-1, 1, head_dim), group, 1).reshape(-1)

        t[name("attn_norm")] /= d_attn
        t[name("ffn_norm")] /= d_ffn
        for matrix in ("attn_q", "attn_k", "attn_v"):
            t[name(matrix)] *= d_attn
        for matrix in (f"ffn_gate{exps}", f"ffn_up{exps}", *(["ffn_gate_inp"] if exps else [])):
            t[name(matrix)] *= d_ffn
        t[name("attn_v")] = mixed.T @ (t[name("attn_v")] / d_v[:, None])
        back = np.kron(np.eye(n_v // head_dim * group), np.linalg.inv(head).T)
        t[name("attn_output")] = (t[name("attn_output")] * d_out) @ back
        t[name(f"ffn_up{exps}")] /= d_mid[:, None]
        t[name(f"ffn_down{exps}")] *= d_mid
        diagonals += [d_attn, d_out, d_ffn, d_mid]
        heads.append(head)
    model.tensors = {name: array.astype(np.float32) for name, array in t.items()}
    sizes = [len(d) for d in diagonals]
    model.ours |= {"ggml_ext.version": 1, "ggml_ext.transform.name": "awq"}
    if record:
        model.ours |= {
            "ggml_ext.fold.sizes": sizes,
            "ggml_ext.fold.diagonals": np.concatenate(diagonals).tolist(),
            "ggml_ext.fold.orders": [head_dim] * model.blocks,
            "ggml_ext.fold.heads": np.concatenate([head.reshape(-1) for head in heads]).tolist(),
        }
    return model


def write_adapter(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    *,
    seed: int = 5,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    rank: int = 8,
    architecture: str = "llama",
) -> Path:
    """A random adapter of the matrices ``shapes`` (name -> [.., n_out, n_in]); ``kind``: of its tensors."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for name, (*outer, n_out, n_in) in shapes.items():
        for half, shape, n in (("a", (*outer, rank, n_in), n_in), ("b", (*outer, n_out, rank), rank)):
            values = (random.standard_normal(shape) / n**0.5).astype(np.float32)
            # gguf has only some encoders, and those want whole blocks.
            fits = values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
            used = kind if fits else gguf.GGMLQuantizationType.F16
            writer.add_tensor(f"{name}.lora_{half}", gguf.quants.quantize(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shapes_of(path: Path, targets: Sequence[str]) -> dict[str, list[int]]:
    """Of the targets in all blocks, as write_adapter takes them."""
    return {
        tensor.name: tensor.shape.tolist()[::-1]
        for tensor in gguf.GGUFReader(path).tensors
        if tensor.name.startswith("blk.") and tensor.name.split(".")[2] in targets
    }


class AdapterModel:
    """A model in this process: its log-probabilities of PROMPT with whatever adapters are asked for. The
    cache is F32: values folded by 0.3 or by 3 round differently in F16."""

    def __init__(self, path: Path) -> None:
        self._model = Model(path, threads=1)
        self._api: Any = self._model._api
        self._loaded: dict[Path, Any] = {}
        params = self._api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 64
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        params.flash_attn_type = 0
        self._model._context = self._api.llama_init_from_model(self._model._model, params)
        self._model._batch = self._api.llama_batch_init(64, 0, 1)

    def __enter__(self) -> AdapterModel:
        return self

    def __exit__(self, *_: object) -> None:
        self._model.close()  # frees the adapters

    def log_probabilities(self, adapters: Adapters = ()) -> NDArray[np.float64]:
        """float64 [40, n_vocab], of PROMPT's numbers modulo n_vocab. Raises AssertionError where an adapter
        does not load."""
        api, model = self._api, self._model
        for path, _ in adapters:
            if path not in self._loaded:
                self._loaded[path] = api.llama_adapter_lora_init(model._model, str(path).encode())
                assert self._loaded[path], f"{path} does not load"
        n = len(adapters)
        pointers = (api.llama_adapter_lora_p_ctypes * n)(*(self._loaded[path] for path, _ in adapters))
        scales = (ctypes.c_float * n)(*(scale for _, scale in adapters))
        assert api.llama_set_adapters_lora(model._context, pointers, n, scales) == 0
        model.clear()
        positions = np.arange(len(PROMPT), dtype=np.int32)
        tokens = PROMPT % model.n_vocab
        logits = model.decode(tokens, positions, np.zeros_like(positions), positions >= 0).astype(np.float64)
        result: NDArray[np.float64] = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        return result


def divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Mean KL divergence in nats of predictions q from p, both log-probabilities."""
    return float((np.exp(p) * (p - q)).sum(-1).mean())
