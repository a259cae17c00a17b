"""Models with a byte-level BPE tokenizer, as most are today: tokenizer.json, merges, a pre-tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers

import models
from ggml_ext.convert import convert
from ggml_ext.gguf.header import read_header, value
from ggml_ext.runtime import llama

SUBSET = Path(__file__).parents[2] / "models" / "gpt2-subset.json"
HIDDEN, FFN = 64, 128
ENDLESS = "{% for i in range(10**9) %}{% for j in range(10**9) %}{{ i * j }}{% endfor %}{% endfor %}"


def make_tokenizer(folder: Path) -> int:
    """GPT-2's tokenizer, of whose vocabulary (MIT) only the bytes and some words are there, under their
    numbers. The converter knows pre-tokenizers by the tokens of one text, of which none is missing. Returns
    the size of the vocabulary, gaps included."""
    subset = json.loads(SUBSET.read_text(encoding="utf-8"))
    model = tokenizers.models.BPE(vocab=subset["vocab"], merges=[tuple(pair) for pair in subset["merges"]])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": ENDLESS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return 1 + max(subset["vocab"].values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with such a tokenizer, and a chat template that never ends."""
    folder = tmp_path_factory.mktemp("bpe")
    n_vocab = make_tokenizer(folder)
    config = models._config(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=HIDDEN // 2,
        vocab_size=n_vocab,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(2)

    def matrix(rows: int, columns: int) -> Any:
        values = random.standard_normal((rows, columns), np.float32)
        return models.to_bf16(values / np.float32(np.sqrt(columns)))

    layer = "model.layers.0."
    tensors = {f"{layer}self_attn.{name}_proj.weight": matrix(HIDDEN, HIDDEN) for name in "qkvo"}
    tensors |= {f"{layer}mlp.{name}_proj.weight": matrix(FFN, HIDDEN) for name in ("gate", "up")}
    tensors[f"{layer}mlp.down_proj.weight"] = matrix(HIDDEN, FFN)
    norms = ("model.norm", f"{layer}input_layernorm", f"{layer}post_attention_layernorm")
    tensors |= {f"{name}.weight": models.to_bf16(np.ones(HIDDEN, np.float32)) for name in norms}
    tensors["model.embed_tokens.weight"] = matrix(n_vocab, HIDDEN)
    models.write_safetensors(folder / "model.safetensors", tensors)
    return folder


@pytest.fixture(scope="module")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bpe-gguf") / "m.gguf"
    convert(folder, out, type_name="bf16", warn=lambda _line: None)
    return out


def test_the_tokenizer_comes_through(folder: Path, converted: Path) -> None:
    """llama.cpp's tokens are transformers' in a text of many kinds of characters."""
    keys = read_header(converted).keys
    assert value(keys["tokenizer.ggml.model"]) == "gpt2"
    assert value(keys["tokenizer.ggml.pre"]) == "gpt-2"
    text = "I've told he's there,\n\n  \t3333 tokens of Български, 天 and 🚀: 'RE you sure? isn't  it\n"
    wanted = transformers.AutoTokenizer.from_pretrained(folder).encode(text)
    with llama.Model(converted, weights=False) as model:
        assert list(model.tokenize(text.encode())) == wanted
    assert len(wanted) < len(text.encode())


def test_a_chat_template_that_never_ends(converted: Path, tmp_path: Path) -> None:
    """Is carried into the file and rendered by no command that reads it. Would take years."""
    from ggml_ext.gguf.inspect import inspect
    from ggml_ext.measure.evaluate import perplexity

    assert value(read_header(converted).keys["tokenizer.chat_template"]) == ENDLESS
    assert len(inspect(converted).tensors) == 11
    text = tmp_path / "text.txt"
    text.write_text(models.TEXT * 4)
    assert perplexity(converted, text, ctx=32, threads=1).count > 0
    again = tmp_path / "again.gguf"
    convert(converted, again, calibration=text, ctx=32, threads=1, warn=lambda _line: None)
    assert value(read_header(again).keys["tokenizer.chat_template"]) == ENDLESS
