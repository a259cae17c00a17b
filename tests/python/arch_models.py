"""Tiny random models of every architecture that upstream's test-llama-archs can save, and of Gemma 4.

The tokenizer is upstream's "test": every BYTES_PER_TOKEN bytes of a text are one token.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np

from ggml_ext.gguf.header import read_header
from ggml_ext.gguf.source import open_gguf
from ggml_ext.gguf.writer import OutTensor, padding, write_header

SEED, STDEV = 1, 0.1
BYTES_PER_TOKEN = 5

_SAVED = """
afmoe-moe arcee-dense arctic-moe baichuan-dense bailingmoe-moe bailingmoe2-moe bailingmoe3-moe bloom-dense
chatglm-dense codeshell-dense cogvlm-dense cohere2-dense cohere2moe-moe command-r-dense dbrx-moe deci-dense
deepseek-moe deepseek2-moe deepseek32-moe deepseek4-moe dots1-moe dots3note-moe dream-dense ernie4_5-moe
ernie4_5-moe-moe exaone-dense exaone-moe-moe exaone4-dense falcon-dense falcon-h1-dense gemma-dense
gemma2-dense gemma3-dense glm-dsa-moe glm4-dense glm4moe-moe glm5-next-moe gpt-oss-moe gpt2-dense
gptneox-dense granite-dense granite-moe granite_swa-dense granitehybrid-dense granitemoe-dense
granitemoe-moe grok-moe grovemoe-moe hrm_text-dense hunyuan-dense-dense hunyuan-moe-moe hunyuan_vl-dense
hy_v3-moe hy_v4-moe internlm2-dense jais-dense jais2-dense jamba-dense kimi-k3-moe kimi-linear-moe
laguna-moe lfm2-dense lfm2moe-moe llada-dense llada-moe-moe llama-dense llama-moe llama4-moe maincoder-dense
mamba-dense mamba2-dense maple-moe mellum-moe mimo2-moe minicpm-dense minicpm-moe minicpm3-dense
minimax-01-moe minimax-m2-moe minimax-m3-moe mistral3-dense mistral3-moe mistral4-moe mpt-dense
muse-glimmer-dense nanbeige-dense nemotron-dense nemotron_h-dense nemotron_h_moe-dense olmo-dense
olmo2-dense olmoe-moe openelm-dense orion-dense paddleocr-moe pangu-embedded-dense phi2-dense phi3-dense
phimoe-moe plamo-dense plamo2-dense plamo3-dense pockettts-dense qwen-dense qwen2-dense qwen2moe-moe
qwen2vl-dense qwen3-dense qwen35-dense qwen35moe-moe qwen3moe-moe qwen3next-moe qwen3tts-dense qwen3vl-dense
qwen3vlmoe-moe qwen4exp-moe refact-dense refact-moe rnd1-moe seed_oss-dense smallthinker-moe smollm3-dense
spark2_5-dense stablelm-dense starcoder-dense starcoder2-dense talkie-dense xverse-dense
"""

SAVED = _SAVED.split()
"""Files that upstream's program saves: <architecture>-dense, or <architecture>-moe with experts."""

WRITTEN = ["gemma4-dense", "gemma4-shared", "gemma4-moe"]
"""Files that are written here: upstream's program leaves Gemma 4 out, and its saver some tensors of it."""

NAMES = [*SAVED, *WRITTEN]


class ArchModel(NamedTuple):
    """A model file, ``name``.gguf, of the architecture ``arch`` as llama.cpp calls it."""

    name: str
    arch: str
    path: Path


def save(folder: Path, program: Path) -> dict[str, ArchModel]:
    """Makes all models, 900 MB, in ``folder``. ``program``: upstream's test-llama-archs."""
    command = [program, "-s", str(SEED), "-d", str(STDEV), "-o", folder]
    subprocess.run(command, check=True, capture_output=True)
    for path in folder.glob("*.gguf"):
        _drop_scales(path)
    gemma4(folder / "gemma4-dense.gguf")
    gemma4(folder / "gemma4-shared.gguf", shared_kv=2)
    gemma4(folder / "gemma4-moe.gguf", experts=4)
    paths = folder.glob("*.gguf")
    return {path.stem: ArchModel(path.stem, path.stem.rpartition("-")[0], path) for path in paths}


def _drop_scales(path: Path) -> None:
    """Takes out the factors of products that files with NVFP4 have. Being as small as the weights, they would
    leave so little of a block in the logits that errors do not show."""
    header, kept = read_header(path), []
    for described, tensor in zip(header.tensors, open_gguf(path).tensors, strict=True):
        if not re.search(r"\.(input_)?scale$", tensor.name):
            kept.append(
                (OutTensor(tensor.name, tensor.dims, described.type_id, tensor.n_bytes), tensor.offset)
            )
    data, out = path.read_bytes(), path.with_suffix(".partial")
    with out.open("wb") as file:
        write_header(file, header.keys, [tensor for tensor, _ in kept], header.alignment)
        for tensor, offset in kept:
            file.write(data[offset : offset + tensor.n_bytes] + padding(tensor.n_bytes, header.alignment))
    out.replace(path)


class _Gemma4:
    """Keys and sizes as in upstream's fixture (get_gguf_ctx); but which layers have a window is an array, as
    llama.cpp wants it."""

    width, heads, head, ffn, layers, vocabulary, per_layer, experts_ffn = 128, 2, 64, 192, 5, 128, 64, 96

    def keys(self, writer: gguf.GGUFWriter, shared_kv: int, experts: int) -> None:
        writer.add_context_length(256)
        writer.add_embedding_length(self.width)
        writer.add_block_count(self.layers)
        writer.add_feed_forward_length(self.ffn)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.heads)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_key_length(self.head)
        writer.add_value_length(self.head)
        writer.add_sliding_window(32)
        integers = {
            "embedding_length_per_layer_input": 0 if experts else self.per_layer,
            "attention.shared_kv_layers": shared_kv,
            "attention.key_length_swa": self.head,
            "attention.value_length_swa": self.head,
        }
        if experts:
            integers.update(expert_count=experts, expert_used_count=2)
            integers["expert_feed_forward_length"] = self.experts_ffn
        for key, value in integers.items():
            writer.add_uint32(f"gemma4.{key}", value)
        writer.add_float32("gemma4.rope.freq_base_swa", 10000.0)
        windowed = [True, True, not shared_kv, True, False]  # the last cache of each kind is the one to share
        writer.add_array("gemma4.attention.sliding_window_pattern", windowed)
        writer.add_tokenizer_model("test")
        writer.add_token_list([f"tok_{i}" for i in range(self.vocabulary)])
        writer.add_token_scores([0.0] * self.vocabulary)

    def shapes(self, shared_kv: int, experts: int) -> dict[str, tuple[int, ...]]:
        """Tensor -> shape, rows first. Layers that share another's cache have no K and V; with experts the
        layer without a window takes K for V."""
        width, attention = self.width, self.heads * self.head
        found: dict[str, tuple[int, ...]] = {"token_embd": (self.vocabulary, width), "output_norm": (width,)}
        found["rope_freqs"] = (self.head // 2,)
        if not experts:
            found["per_layer_token_embd"] = (self.vocabulary, self.per_layer * self.layers)
            found["per_layer_model_proj"] = (self.per_layer * self.layers, width)
            found["per_layer_proj_norm"] = (self.per_layer,)
        for layer in range(self.layers):
            block: dict[str, tuple[int, ...]] = {"attn_norm": (width,), "attn_q": (attention, width)}
            if layer < self.layers - shared_kv:
                block.update(attn_k=(attention, width), attn_k_norm=(self.head,))
                if not experts or layer < self.layers - 1:
                    block["attn_v"] = (attention, width)
            block.update(attn_q_norm=(self.head,), attn_output=(width, attention))
            block.update(post_attention_norm=(width,), ffn_norm=(width,))
            block.update(ffn_gate=(self.ffn, width), ffn_up=(self.ffn, width))
            block.update(ffn_down=(width, self.ffn), post_ffw_norm=(width,))
            if experts:
                block.update(ffn_gate_inp=(experts, width), pre_ffw_norm_2=(width,))
                block.update(post_ffw_norm_1=(width,), post_ffw_norm_2=(width,))
                block["ffn_gate_up_exps"] = (experts, 2 * self.experts_ffn, width)
                block["ffn_down_exps"] = (experts, width, self.experts_ffn)
            else:
                block.update(inp_gate=(self.per_layer, width), proj=(width, self.per_layer))
                block["post_norm"] = (width,)
            found.update({f"blk.{layer}.{name}": shape for name, shape in block.items()})
        shapes = {f"{name}.weight": shape for name, shape in found.items()}
        if experts:
            shapes.update({f"blk.{layer}.ffn_gate_inp.scale": (width,) for layer in range(self.layers)})
        return shapes


def gemma4(path: Path, *, shared_kv: int = 0, experts: int = 0) -> Path:
    """A Gemma 4 of five layers: without experts with an embedding per layer, as E2B, where the last
    ``shared_kv`` layers have no K and V of their own; with experts as 26B."""
    model, random = _Gemma4(), np.random.default_rng(SEED)
    writer = gguf.GGUFWriter(path, "gemma4")
    model.keys(writer, shared_kv, experts)
    for name, shape in model.shapes(shared_kv, experts).items():
        writer.add_tensor(name, random.normal(0, STDEV, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
