"""A Hugging Face model without weights: its modules on the meta device, and what it passes to its blocks.

What transformers passes to a decoder layer besides the hidden states (rotary embeddings and masks, for some
families by layer type) is recorded by running its model once with recorders in the layers' places, so that
each family's own code decides it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from ggml_ext.errors import GgmlExtError
from ggml_ext.experts import RoutedExperts
from ggml_ext.families import Family, Heads, check_block, family_of
from ggml_ext.hf_files import read_config, shown

Kwargs = dict[str, Any]

# Settings that transformers builds so many modules for.
_COUNT = re.compile("^(num|n)_.*(layer|expert)|^depth$")
_MOST = 4096


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
    content = read_config(folder)
    family = family_of(_architectures(content, path), path)
    _check_counts(content, path)
    try:
        return _build(family, folder)
    except GgmlExtError:
        raise
    except Exception as exc:  # transformers has many kinds, some from code that trusts the file
        reason = " ".join(str(exc).split())[:300] or type(exc).__name__
        raise GgmlExtError(f"{path}: transformers cannot build the model ({reason}); check the file") from exc


def _build(family: Family, folder: Path) -> Skeleton:
    whole = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config = whole.get_text_config()
    build: Any = transformers.AutoModel.from_config
    with torch.device("meta"):
        attention = "eager" if family.softcap else "sdpa"
        model = build(config, attn_implementation=attention, trust_remote_code=False)
    layers = tuple(model.eval().layers)
    for index, layer in enumerate(layers):
        if isinstance(getattr(layer.mlp, "experts", None), nn.Module):
            layer.mlp.experts = RoutedExperts(layer.mlp.experts, f"{folder}: block {index}")
    parameters = tuple(check_block(family, layer, index, folder) for index, layer in enumerate(layers))
    heads = Heads(config.num_attention_heads, config.num_key_value_heads, layers[0].self_attn.head_dim)
    return Skeleton(family, model.config, model, layers, parameters, heads)


def _architectures(content: Mapping[str, Any], path: Path) -> list[str]:
    """What config.json says the model is, if it is not quantised."""
    if content.get("quantization_config"):
        raise GgmlExtError(f"{path}: the model is quantised already; calibrate the float model it comes from")
    found = content.get("architectures") or []
    if not (isinstance(found, list) and all(isinstance(name, str) for name in found)):
        raise GgmlExtError(f"{path}: architectures is no list of names; check the file")
    return [shown(name) for name in found]


def _check_counts(content: Mapping[str, Any], path: Path) -> None:
    """Raises GgmlExtError for counts that would take hours to build a model of, at any depth."""
    for key, value in content.items():
        if isinstance(value, dict):
            _check_counts(value, path)
        elif isinstance(value, int | float) and _COUNT.search(key) and value > _MOST:
            raise GgmlExtError(f"{path}: {shown(key)} is {value}, more than {_MOST}; check the file")


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
