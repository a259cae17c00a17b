"""A Hugging Face model folder as a stream of decoder blocks: one block's weights in memory at a time.

The model is built by transformers without weights (skeleton.py). A block's module is filled from the
safetensors files when it is loaded and freed with the ``Block``. Activations pass through the caller's
hands: ``embed`` gives what block 0 gets, ``collect`` and ``run`` what the next block gets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from ggml_ext.capture import SitePoints, intercepted_attention
from ggml_ext.checkpoint import Checkpoint
from ggml_ext.errors import GgmlExtError
from ggml_ext.families import build_sites, checkpoint_name, expected_rows
from ggml_ext.moments import Moments
from ggml_ext.row_order import RowMatcher
from ggml_ext.sites import Site, SiteKind, SiteStats
from ggml_ext.skeleton import Kwargs, embed, open_skeleton, record_kwargs
from ggml_ext.source import Source


@dataclass(frozen=True)
class KvMoments:
    """Means over tokens and heads of k^T k, q^T q (both after QK-norm and RoPE) and v^T v: float32
    [head_dim, head_dim], channels in GGUF's order."""

    k: Tensor
    q: Tensor
    v: Tensor


class BlockModel:
    """``config``: transformers' configuration of the text decoder. ``family``, ``heads``: see families.py.
    ``n_blocks``, ``hidden_size``: decoder blocks and the width of the hidden states."""

    def __init__(
        self,
        folder: Path,
        *,
        gguf: Source | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """gguf: the float GGUF file made from the folder. With it, the ``gguf_rows`` of each matrix are read
        off the file's weights; without, they are the order that llama.cpp's converter is known to use.
        device, dtype: where and in what type blocks compute; statistics are float32 in any case.

        Raises GgmlExtError for a folder that is incomplete, a family that is unknown, and a block that holds
        a module or a tensor that the family should not have.
        """
        self.folder = folder
        self.device = torch.device(device)
        self.dtype = dtype
        self._skeleton = open_skeleton(folder)
        self.family = self._skeleton.family
        self.heads = self._skeleton.heads
        self.config = self._skeleton.config
        self.n_blocks = len(self._skeleton.layers)
        self.hidden_size: int = self.config.hidden_size
        self._checkpoint = Checkpoint(folder)
        self._check_checkpoint()
        self._matcher = RowMatcher(gguf, folder) if gguf else None
        self._recorded: tuple[int, list[Kwargs]] = (0, [])

    def tokenize(self, text: str) -> list[int]:
        """Token ids by the folder's own tokenizer, with the special tokens that it puts around a text."""
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, ImportError) as exc:
            raise GgmlExtError(f"{self.folder}: its tokenizer cannot be loaded ({exc}); check it") from exc
        return list(tokenizer.encode(text))

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """What block 0 gets for token ids int64 [batch, tokens]: [batch, tokens, hidden]. Reads only the rows
        of the embedding matrix that occur."""
        ids, places = cast(Any, torch.unique)(tokens.cpu(), return_inverse=True)
        rows = self._checkpoint.read_rows(f"{self.family.prefix}embed_tokens.weight", ids)
        return embed(self._skeleton, rows.to(self.device, self.dtype), places.to(self.device))

    def load(self, index: int) -> Block:
        """Reads the weights of block ``index``.

        Raises GgmlExtError if the matrices are not those of the GGUF file, or a file is cut off.
        """
        names = self._skeleton.parameters[index]
        weights = {name: self._read(name, index) for name in names}
        rows = {m: self._rows(m, index, weights) for site in self.family.sites.values() for m in site}
        weights = {name: weight.to(self.device) for name, weight in weights.items()}
        layer = copy.deepcopy(self._skeleton.layers[index])
        layer.load_state_dict({name: weight.to(self.dtype) for name, weight in weights.items()}, assign=True)
        layer.requires_grad_(False)
        return Block(self, index, layer, build_sites(self.family, index, weights, rows, self.heads))

    def parameter_of(self, tensor: str, index: int) -> str:
        """HF parameter within block ``index`` that a GGUF tensor holds."""
        return next(name for name, gguf in self._skeleton.parameters[index].items() if gguf == tensor)

    def forward_kwargs(self, index: int, n_tokens: int) -> Kwargs:
        """What transformers passes to decoder layer ``index`` for sequences of n_tokens from position 0."""
        if self._recorded[0] != n_tokens:
            recorded = record_kwargs(self._skeleton, n_tokens, self.device, self.dtype)
            self._recorded = (n_tokens, recorded)
        return self._recorded[1][index]

    def _read(self, parameter: str, index: int) -> Tensor:
        """A block's parameter, float32 in host memory; experts stacked."""
        names = self._tensor_names(parameter, index)
        if len(names) == 1:
            return self._checkpoint.read(names[0])
        weight = torch.empty(self._skeleton.layers[index].get_parameter(parameter).shape)
        for expert, name in enumerate(names):
            weight[expert] = self._checkpoint.read(name)
        return weight

    def _tensor_names(self, parameter: str, index: int) -> list[str]:
        name = checkpoint_name(self.family, parameter, index)
        if "{}" not in name:
            return [name]
        n_experts = self._skeleton.layers[index].get_parameter(parameter).shape[0]
        return [name.format(expert) for expert in range(n_experts)]

    def _rows(self, module: str, index: int, weights: Mapping[str, Tensor]) -> NDArray[np.int64]:
        weight = weights[f"{module}.weight"].numpy()
        order = expected_rows(self.family, module, weight.shape[-2], self.heads)
        if self._matcher is None:
            return order
        tensor = self._skeleton.parameters[index][f"{module}.weight"]
        return self._matcher.match(tensor, weight, order, f"{self.family.prefix}layers.{index}.{module}")

    def _check_checkpoint(self) -> None:
        """Raises GgmlExtError if the blocks' tensors in the checkpoint are not exactly those to be read."""
        wanted = {
            name
            for index, parameters in enumerate(self._skeleton.parameters)
            for parameter in parameters
            for name in self._tensor_names(parameter, index)
        }
        for name in self._checkpoint.names:
            ignored = name.endswith("rotary_emb.inv_freq")  # of old checkpoints; computed from the config
            if name.startswith(f"{self.family.prefix}layers.") and name not in wanted and not ignored:
                raise GgmlExtError(
                    f"{self.folder}: holds a tensor {name}, which calibration does not understand in a "
                    f"{self.family.architecture}; use transform none with rounding rtn or imatrix"
                )
        missing = sorted(wanted.difference(self._checkpoint.names))
        if missing:
            raise GgmlExtError(f"{self.folder}: no tensor {missing[0]}; download the model again")
        for index, parameters in enumerate(self._skeleton.parameters):
            expected = self._skeleton.layers[index].state_dict()
            for parameter in parameters:
                names = self._tensor_names(parameter, index)
                shape = tuple(expected[parameter].shape)[len(names) > 1 :]
                for name in names:
                    if self._checkpoint.shape(name) != shape:
                        raise GgmlExtError(
                            f"{self.folder}: {name} has the shape {list(self._checkpoint.shape(name))}, by "
                            f"config.json it has {list(shape)}; download the model again"
                        )


class Block:
    """One decoder block with its weights, from BlockModel.load. ``sites``: what its matrices read;
    Linear.weight is float32 on the model's device and must not be changed in place."""

    def __init__(self, model: BlockModel, index: int, layer: Any, sites: dict[SiteKind, Site]) -> None:
        self.index = index
        self.sites = sites
        self._model = model
        self._layer = layer
        self._points = SitePoints(layer, model.family)
        self._matrices = {
            linear.tensor: model.parameter_of(linear.tensor, index)
            for site in sites.values()
            for linear in site.linears
        }

    def run(
        self,
        hidden: Tensor,
        *,
        weights: Mapping[str, Tensor] | None = None,
        inputs: Mapping[SiteKind, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """The block's output [batch, tokens, hidden] for hidden states of that shape, in the model's dtype.

        weights: matrices to use instead of the block's, GGUF tensor name -> tensor in the row order of
        Linear.weight. inputs: maps what a site's matrices read, [..., n] -> the same shape. The matrices of
        a site share one call; the router of a mixture reads the unmapped input; the experts' intermediates
        come expert by expert, [tokens, n]. Differentiable with respect to hidden, weights and whatever
        ``inputs`` use. Raises ValueError for a tensor that is not a matrix of this block.
        """
        unknown = set(weights or {}).difference(self._matrices)
        if unknown:
            raise ValueError(f"not matrices of block {self.index}: {', '.join(sorted(unknown))}")
        replaced = {self._matrices[name]: w.to(self._model.dtype) for name, w in (weights or {}).items()}
        with self._points.mapped(inputs or {}):
            return self._forward(hidden, replaced)

    @torch.no_grad()
    def collect(
        self,
        batches: Iterable[Tensor],
        on_output: Callable[[Tensor], None] | None = None,
        *,
        sample_tokens: int = 4096,
    ) -> dict[SiteKind, SiteStats]:
        """One pass over batches of hidden states [batch, tokens, hidden]: the statistics of each site.

        on_output: gets the block's output for each batch, in order. sample_tokens: the sample holds between
        half of it and all of it, evenly spread, or every token if there are fewer. In a mixture of experts
        the statistics of ffn_mid are over all routed pairs of token and expert, those of ffn_in over all
        tokens, and both have second moments per expert unless those take more than 2 GiB. The tensors lie
        on the model's device. The same batches give the same bits on the same machine with one thread.
        """
        moments = {}
        for kind, site in self.sites.items():
            weight = site.linears[0].weight
            experts = weight.shape[0] if weight.dim() == 3 else 0
            moments[kind] = Moments(site.n, sample_tokens, self._model.device, experts)
        with self._points.observed(moments):
            for hidden in batches:
                output = self._forward(hidden, {})
                if on_output is not None:
                    on_output(output)
        return {kind: moment.finish() for kind, moment in moments.items()}

    @torch.no_grad()
    def kv_moments(self, batches: Iterable[Tensor]) -> KvMoments:
        """Second moments of what a KV cache holds, and of the queries, over batches of hidden states. Runs
        the projections only, not the attention.

        Raises GgmlExtError if the GGUF file's order of k's rows is not the same in each head.
        """
        head_dim = self._model.heads.head_dim
        sums = torch.zeros(3, head_dim, head_dim, device=self._model.device)
        counts = [0, 0, 0]

        def take(*states: Tensor) -> None:
            for i, state in enumerate(states):
                rows = state.reshape(-1, head_dim).float()
                sums[i].addmm_(rows.T, rows)
                counts[i] += len(rows)

        with intercepted_attention(self._layer.self_attn, take):
            for hidden in batches:
                normed = self._layer.input_layernorm(self._to_model(hidden))
                self._layer.self_attn(hidden_states=normed, **self._kwargs(hidden))
        q, k, v = sums / torch.tensor(counts, device=sums.device).clamp(min=1)[:, None, None]
        order = torch.from_numpy(self.head_order()).to(sums.device)
        return KvMoments(k=k[order][:, order], q=q[order][:, order], v=v)

    def _forward(self, hidden: Tensor, replaced: dict[str, Tensor]) -> Tensor:
        args = (self._to_model(hidden),)
        return cast(Tensor, torch.func.functional_call(self._layer, replaced, args, self._kwargs(hidden)))

    def _to_model(self, hidden: Tensor) -> Tensor:
        return hidden.to(self._model.device, self._model.dtype)

    def _kwargs(self, hidden: Tensor) -> Kwargs:
        return self._model.forward_kwargs(self.index, hidden.shape[1])

    def head_order(self) -> NDArray[np.int64]:
        """Channel j of a head in GGUF is channel result[j] of the head in Hugging Face's q and k.

        Raises GgmlExtError if that is not the same in each head."""
        linears = self.sites["attn_in"].linears
        key = linears[1] if len(linears) > 1 else linears[0]
        heads = key.gguf_rows.reshape(-1, self._model.heads.head_dim)
        heads = heads - heads.min(axis=1, keepdims=True)
        if (heads != heads[0]).any():
            raise GgmlExtError(
                f"{self._model.folder}: the GGUF file has the rows of {key.tensor} reordered across heads; "
                "convert the folder again and use the result"
            )
        order: NDArray[np.int64] = heads[0]
        return order
