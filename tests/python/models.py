"""Tiny random models and hand-made GGUF files for the tests.

Each ``*_dir`` and ``*_gguf`` function makes its model once per folder and returns its path: tests pass
``tmp_path_factory.getbasetemp()`` and so share one copy per session.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from ggml_ext.hf import folder as hf

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS, EXPERTS = 256, 512, 4, 2, 2, 4
VOCAB = 320

TEXT = (
    "The quick brown fox jumps over the lazy dog while a patient reader counts the words of every line. "
    "Numbers such as 1, 22 and 333 stand beside names, and each sentence ends with a full stop. "
)


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Truncates float32 to bf16 bit patterns."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """uint16 arrays are written as BF16, float16 as F16, float32 as F32."""
    names = {"uint16": "BF16", "float16": "F16", "float32": "F32"}
    header: dict[str, Any] = {}
    offset = 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        header[name] = {"dtype": names[array.dtype.name], "shape": array.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(array.tobytes())


def make_tokenizer(folder: Path) -> None:
    """Writes a small sentencepiece tokenizer in Hugging Face layout."""
    import sentencepiece

    text = folder / "tokenizer-text.txt"
    text.write_text(TEXT)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))


def _config(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def _weights(experts: int) -> dict[str, NDArray[np.uint16]]:
    random = np.random.default_rng(1)

    def matrix(rows: int, columns: int) -> NDArray[np.uint16]:
        return to_bf16(random.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(columns)))

    kv = KV_HEADS * HIDDEN // HEADS
    tensors = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN), "lm_head.weight": matrix(VOCAB, HIDDEN)}
    tensors["model.norm.weight"] = to_bf16(np.ones(HIDDEN, np.float32))
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = to_bf16(np.ones(HIDDEN, np.float32))
        for name, rows in (("q", HIDDEN), ("k", kv), ("v", kv), ("o", HIDDEN)):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = matrix(rows, HIDDEN)
        if experts:
            moe = f"{prefix}block_sparse_moe."
            tensors[f"{moe}gate.weight"] = matrix(experts, HIDDEN)
            for expert in range(experts):
                for name, shape in (("w1", (FFN, HIDDEN)), ("w2", (HIDDEN, FFN)), ("w3", (FFN, HIDDEN))):
                    tensors[f"{moe}experts.{expert}.{name}.weight"] = matrix(*shape)
        else:
            for name, shape in (("gate", (FFN, HIDDEN)), ("up", (FFN, HIDDEN)), ("down", (HIDDEN, FFN))):
                tensors[f"{prefix}mlp.{name}_proj.weight"] = matrix(*shape)
    return tensors


def _model_dir(folder: Path, config: dict[str, Any], experts: int) -> Path:
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True)
        make_tokenizer(folder)
        write_safetensors(folder / "model.safetensors", _weights(experts))
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def llama_dir(base: Path) -> Path:
    """A Llama of 2 layers, width 256, untied head, bf16, in Hugging Face layout."""
    config = _config(architectures=["LlamaForCausalLM"], model_type="llama")
    return _model_dir(base / "models" / "tiny-llama", config, 0)


def mixtral_dir(base: Path) -> Path:
    """A Mixtral of 2 layers with 4 experts, two of them active."""
    config = _config(architectures=["MixtralForCausalLM"], model_type="mixtral")
    config.update(num_local_experts=EXPERTS, num_experts_per_tok=2)
    return _model_dir(base / "models" / "tiny-mixtral", config, EXPERTS)


def _as_gguf(folder: Path) -> Path:
    path = folder.with_name(f"{folder.name}-bf16.gguf")
    if not path.exists():
        hf.to_gguf(folder, path)
    return path


def llama_gguf(base: Path) -> Path:
    """The Llama as bf16 GGUF."""
    return _as_gguf(llama_dir(base))


def mixtral_gguf(base: Path) -> Path:
    """The Mixtral as bf16 GGUF."""
    return _as_gguf(mixtral_dir(base))


def write_gguf(path: Path, tensors: Mapping[str, NDArray[Any]], arch: str = "llama") -> Path:
    """A GGUF file of float32, float16 or (uint16: bf16) tensors; no model that could run."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_uint32("general.file_type", 0)
    for name, array in tensors.items():
        if array.dtype == np.uint16:
            writer.add_tensor(name, array.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
