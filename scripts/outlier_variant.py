#!/usr/bin/env python3
"""Makes a model whose activations have outlier channels and whose function is that of SRC_DIR in float32.

It tests that diagonals are folded right, no more: the variant is a diagonal applied to the weights, which any
transform with a diagonal undoes. scripts/massive_variant.py makes outliers that none can. 2 % of the channels
that the attention and the feed-forward part read are 20 to 50 times larger: the gains of both norms are
multiplied, the columns of the matrices that read them divided. So are the rows of the up-projection and the
columns of the down-projection. For Hugging Face folders of the Llama family without biases (Llama, Mistral,
Qwen3; experts are refused), whose norms multiply by their gain.

    scripts/outlier_variant.py SRC_DIR OUT_DIR [--share 0.02] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LARGEST, SMALLEST = 50.0, 20.0
_LAYER = "model.layers.{}."
# What makes a site's channels -> the matrices that read them.
_SITES = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}
_FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM")


def gains(n: int, share: float, generator: torch.Generator) -> Tensor:
    """float64 [n]: 1 but for max(1, round(share n)) channels, which get 20 to 50."""
    gain = torch.ones(n, dtype=torch.float64)
    chosen = torch.randperm(n, generator=generator)[: max(1, round(share * n))]
    draws = torch.rand(len(chosen), generator=generator, dtype=torch.float64)
    gain[chosen] = SMALLEST + (LARGEST - SMALLEST) * draws
    return gain


def spread(weights: dict[str, Tensor], layer: str, share: float, generator: torch.Generator) -> None:
    """Gives one decoder layer its outliers, in place. weights: float32, by name."""
    for maker, readers in _SITES.items():
        made = weights[f"{layer}{maker}.weight"]
        gain = gains(made.shape[0], share, generator)
        grown = made.double() * (gain if made.dim() == 1 else gain[:, None])
        weights[f"{layer}{maker}.weight"] = grown.float()
        for reader in readers:
            name = f"{layer}{reader}.weight"
            weights[name] = (weights[name].double() / gain).float()


def make_variant(source: Path, out: Path, *, share: float = 0.02, seed: int = 0) -> None:
    """Writes the variant of the folder ``source`` to the new folder ``out``. Exits with a message for a model
    of another family and for an existing ``out``."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if not set(config.get("architectures", [])) & set(_FAMILIES):
        sys.exit(f"{source}: architecture {config.get('architectures')}; give one of {', '.join(_FAMILIES)}")
    if out.exists():
        sys.exit(f"{out}: exists; name a new folder")
    weights = {
        name: tensor.float()
        for path in sorted(source.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    layers = sorted(
        {int(found[1]) for name in weights if (found := re.match(r"model\.layers\.(\d+)\.", name))}
    )
    generator = torch.Generator().manual_seed(seed)
    for index in layers:
        spread(weights, _LAYER.format(index), share, generator)
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and ".safetensors" not in path.name:
            shutil.copyfile(path, out / path.name)
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--share", type=float, default=0.02, help="share of the channels that become outliers"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_variant(options.source, options.out, share=options.share, seed=options.seed)


if __name__ == "__main__":
    main()
