#!/usr/bin/env python3
"""Makes a model whose first token has massive activations, and whose function is nearly that of SRC_DIR.

As in large models (arXiv 2402.17762), one neuron of an early block is huge at a window's first token and
ordinary everywhere else. Its column of down_proj writes a huge value into one channel of the residual stream,
which stays there through all later blocks. A diagonal cannot undo that: the ratio of the token's value to
what the same channel holds at other tokens is the same after any scaling of channels.

The first token's hidden states do not depend on the text, so every matrix W that reads the stream gets a
correction of rank one, W + W (o - n) v^T, with o the normed input that the matrix saw there, n the one that
it sees now, and v the vector with v n = 1 that is smallest on ordinary tokens, H^-1 n / (n H^-1 n). So
queries, keys and values of the first token stay what they were; only its own prediction does not.

For Hugging Face folders of the Llama family with a SentencePiece tokenizer. TEXT gives H, in a few thousand
tokens.

    scripts/massive_variant.py SRC_DIR OUT_DIR --text TEXT [--block 1]
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from torch import Tensor

ACTIVATION = 1000.0
"""The neuron's value at the first token; elsewhere it is below 1."""

MASSIVE = 500.0
"""What it writes into the residual stream, times the root mean square of the block's other outputs."""

DAMPING = 1e-4
"""Share of its mean that is added to the diagonal of H."""

WINDOW, WINDOWS = 256, 32
"""Tokens per window, and windows at most."""


def first_token_vector(ordinary: Tensor, first: Tensor) -> Tensor:
    """v [n] with v . first = 1 and the smallest mean square of v . x over ``ordinary`` [tokens, n]."""
    moments = ordinary.T @ ordinary / len(ordinary)
    moments += DAMPING * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
    direction = torch.linalg.solve(moments, first)
    return direction / (direction @ first)


class Recorder:
    """Float64 inputs of modules, [windows, tokens, n], by name, while a model runs."""

    def __init__(self, model: Any, names: list[str]) -> None:
        self.inputs: dict[str, Tensor] = {}
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def keep(_module: Any, arguments: tuple[Tensor, ...]) -> None:
            self.inputs[name] = arguments[0].detach().double()

        return keep

    def split(self, name: str) -> tuple[Tensor, Tensor]:
        """Inputs at ordinary tokens [tokens, n] and at the first one [n]."""
        found = self.inputs[name]
        return found[:, 1:].flatten(0, 1), found[0, 0]


def tokens_of(source: Path, text: Path) -> Tensor:
    """int64 [windows, WINDOW], BOS first."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    ids = torch.tensor(processor.encode(text.read_text(encoding="utf-8")[:100_000]))
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)[:WINDOWS].clone()
    windows[:, 0] = processor.bos_id()
    return windows


@torch.no_grad()
def plant(model: Any, tokens: Tensor, block: int) -> None:
    """Gives the Llama ``model`` (float32) its massive activation, in place.

    tokens: int64 [windows, n], BOS first; block: whose down_proj writes it.
    """
    blocks = model.model.layers
    writer = f"model.layers.{block}.mlp"
    readers = [
        (f"model.layers.{i}.{norm}", [f"model.layers.{i}.{part}" for part in parts])
        for i in range(block + 1, len(blocks))
        for norm, parts in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        )
    ]
    names = [writer, f"{writer}.down_proj"]
    names += [name for norm, parts in readers for name in (norm, parts[0])]
    recorder = Recorder(model, names)
    model(tokens)
    added = _write(model.get_submodule(writer), recorder, writer)
    for norm, parts in readers:
        _, stream = recorder.split(norm)
        ordinary, old = recorder.split(parts[0])
        new = model.get_submodule(norm)((stream + added).float()).double()
        vector = first_token_vector(ordinary, new)
        for part in parts:
            weight = model.get_submodule(part).weight
            weight += torch.outer(weight.double() @ (old - new), vector).float()


def _write(mlp: Any, recorder: Recorder, name: str) -> Tensor:
    """Makes the quietest neuron fire at the first token. Returns what that adds to the stream there [n]."""
    ordinary, first = recorder.split(name)
    activations, usual = recorder.split(f"{name}.down_proj")
    neuron = int(activations.square().mean(dim=0).argmin())
    vector = first_token_vector(ordinary, first)
    gate, up, down = (getattr(mlp, part).weight for part in ("gate_proj", "up_proj", "down_proj"))
    level = float(mlp.down_proj(activations.float()).square().mean().sqrt())
    for weight in (gate, up):
        missing = ACTIVATION**0.5 - weight[neuron].double() @ first
        weight[neuron] += (missing * vector).float()
    fired = mlp.act_fn(gate[neuron].double() @ first) * (up[neuron].double() @ first)
    old = down[:, neuron].double().clone()
    down[int(old.abs().argmax()), neuron] += MASSIVE * level / ACTIVATION
    return fired * down[:, neuron].double() - usual[neuron] * old


def make_variant(source: Path, out: Path, text: Path, block: int) -> None:
    """Writes the variant of the folder ``source`` to the new folder ``out``; exits with a message if it
    cannot."""
    if out.exists():
        sys.exit(f"{out}: exists; name a new folder")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if model.config.model_type != "llama":
        sys.exit(f"{source}: model type {model.config.model_type}; give a model of the Llama family")
    if not 0 <= block < len(model.model.layers) - 1:
        sys.exit(f"--block {block}: the model has {len(model.model.layers)}; name one before the last")
    plant(model, tokens_of(source, text), block)
    model.save_pretrained(out)
    for path in source.iterdir():
        if path.name.startswith("tokenizer") or path.name == "special_tokens_map.json":
            shutil.copyfile(path, out / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="text of the model's kind")
    parser.add_argument("--block", type=int, default=1, help="block that writes the massive value")
    options = parser.parse_args()
    make_variant(options.source, options.out, options.text, options.block)


if __name__ == "__main__":
    main()
