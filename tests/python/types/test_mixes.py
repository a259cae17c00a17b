"""The mix Q4_K_M in Python against llama-quantize itself, tensor by tensor."""

from __future__ import annotations

import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest

from ggml_ext.gguf.source import open_gguf
from ggml_ext.runtime import native, tools
from ggml_ext.types.rules import choose, compile_rules

ROW = 256


def model(
    path: Path, arch: str, layers: int, *, experts: int = 0, fused: bool = False, shared: bool = True
) -> Path:
    """A GGUF file with the names and hyperparameters of a model and next to no weights."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(ROW)
    writer.add_feed_forward_length(ROW)
    writer.add_head_count(4)
    writer.add_head_count_kv(2 if shared else 4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(64)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    random = np.random.default_rng(1)
    attention = ["attn_qkv"] if fused else ["attn_q", "attn_k", "attn_v"]
    feed = ["ffn_up", "ffn_gate", "ffn_down"]
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", random.standard_normal((4, ROW), np.float32))
    for layer in range(layers):
        for name in [*attention, "attn_output", *([] if experts else feed)]:
            rows = 2 if name in ("attn_k", "attn_v") and shared else 4
            writer.add_tensor(f"blk.{layer}.{name}.weight", random.standard_normal((rows, ROW), np.float32))
        for name in feed if experts else []:
            values = random.standard_normal((experts, 2, ROW), np.float32)
            writer.add_tensor(f"blk.{layer}.{name}_exps.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stock_types(src: Path, out: Path, *options: str) -> dict[str, str]:
    command = [tools.find("llama-quantize"), *options, src, out, "Q4_K_M"]
    subprocess.run(command, check=True, capture_output=True, env=tools.environment())
    return {tensor.name: tensor.type_name for tensor in open_gguf(out).tensors}


def our_types(src: Path, base: str, type_for: list[tuple[str, str]] | None = None) -> dict[str, str]:
    source = open_gguf(src)
    rules = compile_rules(base, type_for or [], [])
    choices = choose([tensor.shape for tensor in source.tensors], source.arch, rules, native.block_size)
    return {choice.name: choice.target for choice in choices}


CASES = {
    "8 layers": ("llama", 8, {}),
    "17 layers": ("llama", 17, {}),
    "no grouped queries": ("llama", 8, {"shared": False}),
    "fused q, k and v": ("phi3", 9, {"fused": True}),
    "falcon": ("falcon", 19, {"fused": True}),
    "4 experts": ("llama", 9, {"experts": 4}),
    "8 experts": ("llama", 9, {"experts": 8}),
    "qwen2 of 72B": ("qwen2", 80, {}),
    "llama of 70B": ("llama", 80, {}),
    "llama of 65B": ("llama", 80, {"shared": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_types_are_llama_quantizes(case: str, tmp_path: Path) -> None:
    """Would break on any wrong rule, or a rule upstream changes."""
    arch, layers, options = CASES[case]
    src = model(tmp_path / "m.gguf", arch, layers, **options)
    stock = stock_types(src, tmp_path / "stock.gguf")
    assert our_types(src, "q4_k_m") == stock
    assert {"q4_k", "q6_k"} <= set(stock.values())


def test_prescribed_types_move_the_layer_dependence_as_upstream(tmp_path: Path) -> None:
    """Upstream counts only the attn_v and ffn_down whose type it chooses itself."""
    src = model(tmp_path / "m.gguf", "llama", 12)
    pattern = r"blk\.(1|4)\.(attn_v|ffn_down)"
    stock = stock_types(src, tmp_path / "stock.gguf", "--tensor-type", f"{pattern}=q8_0")
    assert our_types(src, "q4_k_m", [(pattern, "q8_0")]) == stock


def test_fq4_m_has_fq4_where_the_mix_has_q4_k(tmp_path: Path) -> None:
    src = model(tmp_path / "m.gguf", "llama", 12)
    stock, ours = our_types(src, "q4_k_m"), our_types(src, "fq4_m")
    assert {(stock[name], ours[name]) for name in stock} == {("q4_k", "fq4"), ("q6_k", "q6_k")}
