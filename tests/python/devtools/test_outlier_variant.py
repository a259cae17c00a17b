"""scripts/outlier_variant.py: outliers appear, the function stays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "outlier_variant.py"
TOKENS = torch.arange(40)[None]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    folder = tmp_path / "llama"
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True)


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(TOKENS).logits


def test_the_function_stays_and_outliers_appear(llama: Path, tmp_path: Path) -> None:
    """Otherwise a bad figure on the variant would not be the recipe's fault."""
    out = tmp_path / "variant"
    assert run(llama, out, "--share", 0.05).returncode == 0
    want, got = logits(llama), logits(out)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    for layer in model.model.layers:
        for gain in (layer.input_layernorm.weight, layer.post_attention_layernorm.weight):
            large = gain[gain > 10]
            assert len(large) == 3
            assert bool(((large >= 20) & (large <= 50)).all())
        rows = layer.mlp.up_proj.weight.norm(dim=1)
        assert int((rows > 10 * rows.median()).sum()) == 6


def test_the_seed_decides(llama: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in "abc"]
    for out, seed in zip(outs, (1, 1, 2), strict=True):
        assert run(llama, out, "--seed", seed).returncode == 0
    one, same, other = ((out / "model.safetensors").read_bytes() for out in outs)
    assert one == same != other


def test_what_it_cannot_do_is_said(llama: Path, tmp_path: Path) -> None:
    """Another family would silently become another function; an existing folder would be lost."""
    assert "exists" in run(llama, llama).stderr
    config = llama / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "PhimoeForCausalLM"))
    assert "PhimoeForCausalLM" in run(llama, tmp_path / "variant").stderr
