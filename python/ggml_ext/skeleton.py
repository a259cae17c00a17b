"""A Hugging Face model without weights: its modules on the meta device, and what it passes to its blocks.

What transformers passes to a decoder layer besides the hidden states (rotary embeddings and masks, for some
families by layer type) is recorded by running its model once with recorders in the layers' places, so that
each family's own code decides it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from ggml_ext.errors import GgmlExtError
from ggml_ext.experts import RoutedExperts
from ggml_ext.families import Family, Heads, check_block, family_of

Kwargs = dict[str, Any]


@dataclass(frozen=True)
class Skeleton:
    """``config``: transformers' configuration of the text decoder. ``model``: the decoder, all parameters on
    the meta device. ``layers``: the decoder layers, the experts of a mixture as RoutedExperts.
    ``parameters``: per layer, HF parameter -> GGUF tensor. ``heads``: of every layer."""

    family: Family
    config: Any
    model: Any
    layers: tuple[Any, ...]
    parameters: tuple[dict[str, str], ...]
    heads: Heads


def open_skeleton(folder: Path) -> Skeleton:
    """Builds the model that config.json describes, of one with vision the text decoder. Code that lies in the
    folder is not run: transformers' own classes are used.

    Raises GgmlExtError for an unknown architecture, a configuration that transformers refuses, a model that
    is quantised already and a block that holds what its family should not have.
    """
    path = folder / "config.json"
    family = family_of(_architectures(path), path)
    try:
        whole = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        config = whole.get_text_config()
        build: Any = transformers.AutoModel.from_config
        with torch.device("meta"):
            attention = "eager" if family.softcap else "sdpa"
            model = build(config, attn_implementation=attention, trust_remote_code=False)
    except Exception as exc:  # transformers has many kinds, some from code that trusts the file
        raise GgmlExtError(f"{path}: transformers cannot build the model ({exc}); check the file") from exc
    layers = tuple(model.eval().layers)
    for index, layer in enumerate(layers):
        if isinstance(getattr(layer.mlp, "experts", None), nn.Module):
            layer.mlp.experts = RoutedExperts(layer.mlp.experts, f"{folder}: block {index}")
    parameters = tuple(check_block(family, layer, index, folder) for index, layer in enumerate(layers))
    heads = Heads(config.num_attention_heads, config.num_key_value_heads, layers[0].self_attn.head_dim)
    return Skeleton(family, model.config, model, layers, parameters, heads)


def _architectures(path: Path) -> list[str]:
    """What config.json says the model is, if it is not quantised."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise GgmlExtError(f"{path}: cannot be read ({exc}); download the file again") from exc
    if content.get("quantization_config"):
        raise GgmlExtError(f"{path}: the model is quantised already; calibrate the float model it comes from")
    return list(content.get("architectures") or [])


def embed(skeleton: Skeleton, rows: Tensor, places: Tensor) -> Tensor:
    """Hidden states [..., hidden] from rows [m, hidden] of the embedding matrix, by index in ``rows``. Some
    families scale them."""
    embedding = skeleton.model.embed_tokens
    embedding.weight = nn.Parameter(rows, requires_grad=False)
    embedding.padding_idx = None  # is an index of the whole matrix, and concerns gradients only
    if hasattr(embedding, "scalar_embed_scale"):
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=rows.device)
    return cast(Tensor, embedding(places))


@torch.no_grad()
def record_kwargs(
    skeleton: Skeleton, n_tokens: int, device: torch.device, dtype: torch.dtype
) -> list[Kwargs]:
    """Per layer, what transformers passes to it for sequences of n_tokens from position 0. Valid for any
    number of sequences: the tensors' batch dimension is 1."""
    model = skeleton.model
    recorders = [_Recorder() for _ in skeleton.layers]
    model.layers = nn.ModuleList(recorders)
    model.norm = nn.Identity()
    model.rotary_emb = type(model.rotary_emb)(skeleton.config).to(device)
    hidden = torch.zeros(1, n_tokens, skeleton.config.hidden_size, device=device, dtype=dtype)
    model(inputs_embeds=hidden, use_cache=False)
    return [recorder.kwargs for recorder in recorders]


class _Recorder(nn.Module):
    """Takes the place of a decoder layer and keeps what it is called with."""

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        self.kwargs = kwargs
        return hidden
