"""scripts/massive_variant.py: a massive first token that no diagonal undoes; the model stays what it was."""

from __future__ import annotations

import json
import pydoc_data.topics
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "massive_variant.py"
BLOCKS = 3
WRITER = "layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The first blocks of the demo model, as they are and with a massive first token."""
    base = tmp_path_factory.mktemp("massive")
    plain = base / "plain"
    shutil.copytree(ROOT / "tests" / "models" / "pydoc-8m", plain)
    tensors = load_file(plain / "model.safetensors")
    (plain / "model.safetensors").unlink()
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if ".layers." not in name or int(name.split(".")[2]) < BLOCKS
    }
    save_file(kept, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "num_hidden_layers": BLOCKS}))
    (base / "text.txt").write_text("\n\n".join(pydoc_data.topics.topics.values())[:60_000])
    done = run(plain, base / "massive", "--text", base / "text.txt")
    assert done.returncode == 0, done.stderr
    return plain, base / "massive"


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True)


@torch.no_grad()
def observe(folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities [windows, tokens, vocabulary] on another text, and the inputs of some modules."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    text = "\n\n".join(pydoc_data.topics.topics.values())[100_000:120_000]
    tokens = torch.tensor(processor.encode(text))[: 4 * 256].view(4, 256)
    tokens[:, 0] = processor.bos_id()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, arguments: inputs.__setitem__(name, arguments[0].double())

    for name in (WRITER, "layers.2.input_layernorm", "layers.2.post_attention_layernorm"):
        model.model.get_submodule(name).register_forward_pre_hook(keep(name))
    return model(tokens).logits.log_softmax(dim=-1), inputs


def contrast(inputs: Tensor) -> float:
    """The first token's largest value over its channel's root mean square elsewhere [windows, tokens, n].

    No diagonal changes it: it multiplies both.
    """
    return float((inputs[0, 0].abs() / inputs[:, 1:].square().mean(dim=(0, 1)).sqrt()).max())


def test_the_function_stays_and_the_first_token_is_massive(folders: tuple[Path, Path]) -> None:
    (want, before), (got, after) = (observe(folder) for folder in folders)
    scored = slice(128, None)
    divergence = (want.exp() * (want - got)).sum(dim=-1)[:, scored].mean()
    print(f"KL divergence of the variant {divergence:.5f}")
    assert divergence < 0.02
    for name, inputs in after.items():
        print(f"{name}: contrast {contrast(before[name]):.1f} -> {contrast(inputs):.1f}")
        largest = inputs[0, 0].abs().max()
        if name == WRITER:
            assert largest == pytest.approx(1000, rel=0.01)
            assert contrast(inputs) > 1.4 * contrast(before[name])
        else:
            assert largest > 100 * inputs[:, 1:].square().mean().sqrt()
            assert contrast(inputs) > 5 * contrast(before[name])
        scaled = inputs * torch.rand(inputs.shape[-1], dtype=torch.float64).add(0.01)
        assert contrast(scaled) == pytest.approx(contrast(inputs))


def test_channel_outliers_are_no_contrast(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The variant that a diagonal undoes has the contrast of the model that it was made from."""
    channels = tmp_path / "channels"
    script = ROOT / "scripts" / "outlier_variant.py"
    subprocess.run([sys.executable, script, folders[0], channels], check=True)
    (_, before), (_, after) = observe(folders[0]), observe(channels)
    for name, inputs in after.items():
        assert contrast(inputs) == pytest.approx(contrast(before[name]), rel=0.01)


def test_what_it_cannot_do_is_said(folders: tuple[Path, Path], tmp_path: Path) -> None:
    plain, text = folders[0], folders[0].parent / "text.txt"
    assert "exists" in run(plain, plain, "--text", text).stderr
    assert "--block 2" in run(plain, tmp_path / "out", "--text", text, "--block", 2).stderr
