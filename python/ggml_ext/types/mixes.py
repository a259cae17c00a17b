"""The layer-dependent mix Q4_K_M: which tensors llama-quantize gives more than the mix's 4 bits.

The rules are those of llama.cpp, src/llama-quant.cpp (llama_tensor_get_type_impl). What they need to know of
the model's hyperparameters follows from the tensors' names and shapes, so no keys are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

BODY = {"q4_k_m": "q4_k", "fq4_m": "fq4"}
"""Mix -> the type that takes q4_k's place in it. Tensors of more bits are the same in both."""

_LAYER = re.compile(r"^blk\.(\d+)\.")
_ATTN_V = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")  # category_is_attn_v
_SEVENTY_B = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}  # layers of LLM_TYPE_70B
_EIGHT_EXPERTS = {"attn_v": "q8_0", "attn_k": "q8_0", "attn_output": "q5_k"}


class Tensor(Protocol):
    """``dims``: GGUF order, dims[0] is the row length."""

    @property
    def name(self) -> str: ...

    @property
    def dims(self) -> tuple[int, ...]: ...


def q4_k_m(model: Sequence[Tensor], free: Sequence[Tensor], arch: str) -> dict[str, str]:
    """Tensor -> type for the tensors of a model that Q4_K_M does not give its body type.

    model: all tensors. free: those that are quantised and whose type nobody prescribes; as upstream's
    counters do, the layer dependence counts only them. The head and the embeddings are not looked at here.
    """
    layers = 1 + max((_layer(tensor.name) for tensor in model), default=-1)
    experts = max((t.dims[2] for t in model if "_exps." in t.name and len(t.dims) > 2), default=1)
    values = sum(_kind(tensor.name) == "attn_v" for tensor in model)
    seventy_b = _is_70b(model, arch, layers)
    i_value = i_down = 0
    types = {}
    for tensor in sorted(free, key=lambda tensor: (_layer(tensor.name), tensor.name)):
        kind, type_name = _kind(tensor.name), ""
        if kind == "attn_v":
            type_name = "q6_k" if _more_bits(i_value, values) else "q5_k" if seventy_b else ""
            i_value += 1
        elif kind == "ffn_down":
            # Experts of a layer come as several tensors: their names, not a counter, tell the layer.
            i_layer = _layer(tensor.name) if experts > 1 else i_down
            type_name = _down(arch, i_layer, layers)
            i_down += 1
        if experts == 8 and not (arch == "falcon" and kind == "attn_output"):
            type_name = _EIGHT_EXPERTS.get(kind, type_name)
        if type_name:
            types[tensor.name] = type_name
    return types


def _down(arch: str, i_layer: int, layers: int) -> str:
    if arch == "falcon":
        if i_layer < layers // 16:
            return "q6_k"
        return "q5_k" if _more_bits(i_layer, layers) else ""
    return "q6_k" if _more_bits(i_layer, layers) else ""


def _more_bits(i: int, n: int) -> bool:
    """use_more_bits: the first and last eighth, and every third layer between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _layer(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _kind(name: str) -> str:
    """tensor_get_category, as far as the mix asks for it."""
    if any(part in name for part in _ATTN_V):
        return "attn_v"
    for kind in ("attn_k", "attn_q", "attn_output"):
        if f"{kind}.weight" in name:
            return kind
    return next((kind for kind in ("ffn_up", "ffn_gate", "ffn_down") if kind in name), "")


def _is_70b(model: Sequence[Tensor], arch: str, layers: int) -> bool:
    if layers != _SEVENTY_B.get(arch):
        return False
    rows = {tensor.name: tensor.dims[1] for tensor in model if len(tensor.dims) > 1}
    # Llama's 65B has the same number of layers and no grouped queries.
    return arch != "llama" or rows.get("blk.0.attn_q.weight") != rows.get("blk.0.attn_k.weight")
