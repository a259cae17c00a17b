"""A Hugging Face model folder as a stream of decoder blocks: one block's weights in memory at a time.

The model is built by transformers on the meta device, without weights. A block's module is filled from the
safetensors files when it is loaded. What transformers passes to a block besides the hidden states (rotary
embeddings, masks, per layer type) is recorded by running its model once with recorders in the places of
the decoder layers, so that every family's own code decides it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from ggml_ext.checkpoint import Checkpoint
from ggml_ext.errors import GgmlExtError
from ggml_ext.experts import RoutedExperts
from ggml_ext.families import Family, Heads, build_sites, check_block, checkpoint_name, expected_rows, family_of
from ggml_ext.moments import Moments
from ggml_ext.row_order import RowMatcher
from ggml_ext.sites import Site, SiteKind, SiteStats
from ggml_ext.source import Source

Kwargs = dict[str, Any]


@dataclass(frozen=True)
class KvMoments:
    """Means over tokens and heads of k^T k, q^T q (both after RoPE and QK-norm) and v^T v: float32
    [head_dim, head_dim], channels in GGUF's order."""

    k: Tensor
    q: Tensor
    v: Tensor


class BlockModel:
    """``folder``: the model. ``config``: transformers' configuration. ``family``, ``heads``: see families.py.
    ``n_blocks``, ``hidden_size``: decoder blocks and the width of the hidden states."""

    def __init__(
        self,
        folder: Path,
        *,
        gguf: Source | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """gguf: the float GGUF file made from the folder. With it, each matrix's ``gguf_rows`` is read off the
        file's weights; without, it is the order that llama.cpp's converter is known to use. device, dtype:
        where and in what type blocks compute; statistics are float32 in any case.

        Raises GgmlExtError for a folder that is incomplete, a family that is unknown, and a block that holds
        a module that the family should not have.
        """
        self.folder = folder
        self.device = torch.device(device)
        self.dtype = dtype
        self._checkpoint = Checkpoint(folder)
        self._matcher = RowMatcher(gguf, folder) if gguf else None
        self.family, self.config, model = skeleton(folder)
        self.n_blocks: int = self.config.num_hidden_layers
        self.hidden_size: int = self.config.hidden_size
        self._layers = list(model.layers)
        self._parameters = [
            check_block(self.family, layer, index, folder) for index, layer in enumerate(self._layers)
        ]
        self._check_checkpoint()
        self.heads = heads_of(self.config, self._layers[0])
        self._model = self._without_layers(model)
        self._recorded: tuple[int, list[Kwargs]] | None = None

    def tokenize(self, text: str) -> list[int]:
        """Token ids by the folder's own tokenizer, with the special tokens it puts around a text."""
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as exc:
            raise GgmlExtError(f"{self.folder}: its tokenizer cannot be loaded ({exc}); check its files") from exc
        return list(tokenizer.encode(text))

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """What block 0 gets for token ids int64 [batch, tokens]: [batch, tokens, hidden]. Reads only the rows
        of the embedding that occur."""
        ids, places = tokens.cpu().unique(return_inverse=True)
        rows = self._checkpoint.read_rows("model.embed_tokens.weight", ids)
        embedding = self._model.embed_tokens
        embedding.weight = nn.Parameter(rows.to(self.device, self.dtype), requires_grad=False)
        return cast(Tensor, embedding(places.to(self.device)))

    def load(self, index: int) -> Block:
        """Reads the weights of block ``index``. Raises GgmlExtError if they are missing or not the GGUF file's."""
        return Block(self, index)

    def forward_kwargs(self, index: int, n_tokens: int) -> Kwargs:
        """What transformers passes to decoder block ``index`` for sequences of n_tokens from position 0."""
        if self._recorded is None or self._recorded[0] != n_tokens:
            recorders = [_Recorder() for _ in self._layers]
            self._model.layers = nn.ModuleList(recorders)
            blank = torch.zeros(1, n_tokens, self.hidden_size, device=self.device, dtype=self.dtype)
            with torch.no_grad():
                self._model(inputs_embeds=blank, use_cache=False)
            self._recorded = (n_tokens, [recorder.kwargs for recorder in recorders])
        return self._recorded[1][index]

    def read_block(self, index: int) -> tuple[nn.Module, dict[str, str], dict[SiteKind, Site]]:
        """The module of block ``index`` with its weights, HF parameter -> GGUF tensor, and the sites."""
        names = self._parameters[index]
        weights = {name: self._read(name, index) for name in names}
        rows = {}
        for module in (module for site in self.family.sites.values() for module in site):
            weight = weights[f"{module}.weight"].numpy()
            order = expected_rows(self.family, module, weight.shape[-2], self.heads)
            if self._matcher is not None:
                where = f"model.layers.{index}.{module}"
                order = self._matcher.match(names[f"{module}.weight"], weight, order, where)
            rows[module] = order
        weights = {name: weight.to(self.device) for name, weight in weights.items()}
        module = copy.deepcopy(self._layers[index])
        module.load_state_dict({name: w.to(self.dtype) for name, w in weights.items()}, assign=True)
        module.requires_grad_(False).eval()
        return module, names, build_sites(self.family, index, weights, rows, self.heads)

    def _read(self, parameter: str, index: int) -> Tensor:
        name = checkpoint_name(self.family, parameter, index)
        if "{}" not in name:
            return self._checkpoint.read(name)
        shape = self._layers[index].get_parameter(parameter).shape
        weight = torch.empty(shape)
        for expert in range(shape[0]):
            weight[expert] = self._checkpoint.read(name.format(expert))
        return weight

    def _check_checkpoint(self) -> None:
        """Raises GgmlExtError if the blocks' tensors in the checkpoint are not exactly those that are read."""
        wanted = set()
        for index, (layer, parameters) in enumerate(zip(self._layers, self._parameters, strict=True)):
            for parameter in parameters:
                name = checkpoint_name(self.family, parameter, index)
                experts = layer.get_parameter(parameter).shape[0] if "{}" in name else 1
                wanted |= {name.format(expert) for expert in range(experts)}
        for name in self._checkpoint.names:
            ignored = name.endswith("rotary_emb.inv_freq")  # of old checkpoints; computed from the config
            if name.startswith("model.layers.") and name not in wanted and not ignored:
                raise GgmlExtError(
                    f"{self.folder}: holds a tensor {name}, which calibration does not understand in a "
                    f"{self.family.architecture}; use transform none with rounding rtn or imatrix"
                )
        missing = sorted(wanted.difference(self._checkpoint.names))
        if missing:
            raise GgmlExtError(f"{self.folder}: no tensor {missing[0]}; download the model again")

    def _without_layers(self, model: Any) -> Any:
        """The model without weights, able to run: rotary embeddings are computed anew off the meta device."""
        model.norm = nn.Identity()
        model.rotary_emb = type(model.rotary_emb)(self.config).to(self.device)
        embedding = model.embed_tokens
        embedding.padding_idx = None  # ids are renumbered, see embed
        if hasattr(embedding, "scalar_embed_scale"):
            embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=self.device)
        return model


class Block:
    """One decoder block with its weights. ``sites``: what its matrices read; Linear.weight is float32 on the
    model's device and, if that computes in float32, shares memory with the module."""

    def __init__(self, model: BlockModel, index: int) -> None:
        self.index = index
        self._model = model
        self._module, names, self.sites = model.read_block(index)
        matrices = {linear.tensor for site in self.sites.values() for linear in site.linears}
        self._matrices = {tensor: name for name, tensor in names.items() if tensor in matrices}

    def run(
        self,
        hidden: Tensor,
        *,
        weights: Mapping[str, Tensor] | None = None,
        inputs: Mapping[SiteKind, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """The block's output [batch, tokens, hidden] for hidden states of that shape.

        weights: matrices to use instead of the block's, GGUF tensor name -> tensor in the order of
        Linear.weight. inputs: maps what a site's matrices read, [..., n] -> the same shape; q, k and v, and
        gate and up, share one call; the router of a mixture reads the unmapped input; the experts'
        intermediates come expert by expert. Differentiable with respect to hidden, weights and whatever
        ``inputs`` uses. Raises ValueError for a tensor that is not a matrix of this block.
        """
        unknown = set(weights or {}).difference(self._matrices)
        if unknown:
            raise ValueError(f"not matrices of block {self.index}: {', '.join(sorted(unknown))}")
        replaced = {self._matrices[tensor]: w.to(self._model.dtype) for tensor, w in (weights or {}).items()}
        with self._mapped(inputs or {}):
            return self._forward(hidden, replaced)

    @torch.no_grad()
    def collect(
        self,
        batches: Iterable[Tensor],
        on_output: Callable[[Tensor], None] | None = None,
        *,
        sample_tokens: int = 4096,
    ) -> dict[SiteKind, SiteStats]:
        """One pass over ``batches`` of hidden states [batch, tokens, hidden]: the statistics of each site.

        ``on_output`` gets the block's output for each batch, in order. The sample holds between
        sample_tokens / 2 and sample_tokens tokens (all, if there are fewer), evenly spread. In a mixture of
        experts the statistics of ffn_mid are over all routed pairs of token and expert, those of ffn_in
        over all tokens, and both have second moments per expert unless those take over 2 GiB. The tensors
        lie on the model's device. Same batches, same machine, one thread: the same bits.
        """
        moments = {
            kind: Moments(site.n, sample_tokens, self._model.device, self._experts(kind))
            for kind, site in self.sites.items()
        }
        with self._observed(moments):
            for hidden in batches:
                output = self._forward(hidden, {})
                if on_output is not None:
                    on_output(output)
        return {kind: moment.finish() for kind, moment in moments.items()}

    @torch.no_grad()
    def kv_moments(self, batches: Iterable[Tensor]) -> KvMoments:
        """Second moments of what a KV cache holds, and of the queries, over batches of hidden states."""
        head_dim = self._model.heads.head_dim
        sums = [torch.zeros(head_dim, head_dim, device=self._model.device) for _ in range(3)]
        counts = [0, 0, 0]

        def add(*states: Tensor) -> None:  # query, key, value [batch, heads, tokens, head_dim]
            for i, state in enumerate(states):
                rows = state.reshape(-1, head_dim).float()
                sums[i].addmm_(rows.T, rows)
                counts[i] += len(rows)

        attention = self._module.self_attn
        with _intercepted_attention(self._model.config, attention, add):
            for hidden in batches:
                states = self._module.input_layernorm(self._to_model(hidden))
                attention(hidden_states=states, **self._model.forward_kwargs(self.index, hidden.shape[1]))
        order = torch.from_numpy(self._head_order()).to(self._model.device)
        q, k, v = (total / max(count, 1) for total, count in zip(sums, counts, strict=True))
        return KvMoments(k=k[order][:, order], q=q[order][:, order], v=v)

    def _to_model(self, hidden: Tensor) -> Tensor:
        return hidden.to(self._model.device, self._model.dtype)

    def _forward(self, hidden: Tensor, replaced: dict[str, Tensor]) -> Tensor:
        kwargs = self._model.forward_kwargs(self.index, hidden.shape[1])
        hidden = self._to_model(hidden)
        return cast(Tensor, torch.func.functional_call(self._module, replaced, (hidden,), kwargs))

    def _modules(self, kind: SiteKind) -> list[nn.Module]:
        return [self._module.get_submodule(name) for name in self._model.family.sites[kind]]

    def _routed(self) -> RoutedExperts | None:
        experts = getattr(self._module.mlp, "experts", None)
        return experts if isinstance(experts, RoutedExperts) else None

    def _experts(self, kind: SiteKind) -> int:
        weight = self.sites[kind].linears[0].weight
        return weight.shape[0] if weight.dim() == 3 else 0

    def _head_order(self) -> Any:
        """Channel j of a head in GGUF is channel result[j] of the head in Hugging Face's q and k."""
        head_dim = self._model.heads.head_dim
        key = self.sites["attn_in"].linears[min(1, len(self.sites["attn_in"].linears) - 1)]
        heads = key.gguf_rows.reshape(-1, head_dim)
        order = heads[0] - heads[0].min()
        if not ((heads - heads.min(axis=1, keepdims=True)) == order).all():
            raise GgmlExtError(f"{key.tensor}: rows are reordered across heads; convert the model again")
        return order

    @contextmanager
    def _mapped(self, inputs: Mapping[SiteKind, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """While this is open, the matrices of a site read ``inputs[kind](x)``."""
        routed = self._routed()
        with ExitStack() as stack:
            for kind, function in inputs.items():
                if routed is not None and kind in ("ffn_in", "ffn_mid"):
                    continue
                hook = _mapping_hook(function)
                for module in self._modules(kind):
                    stack.callback(module.register_forward_pre_hook(hook).remove)
            if routed is not None:
                middle = inputs.get("ffn_mid")
                routed.on_input = inputs.get("ffn_in")
                routed.on_middle = None if middle is None else lambda x, _: middle(x)
                stack.callback(_release, routed)
            yield

    @contextmanager
    def _observed(self, moments: Mapping[SiteKind, Moments]) -> Iterator[None]:
        """While this is open, every forward pass adds to the statistics."""
        routed = self._routed()
        with ExitStack() as stack:
            for kind, moment in moments.items():
                if routed is None or kind in ("attn_in", "attn_out"):
                    hook = _observing_hook(moment)
                    stack.callback(self._modules(kind)[0].register_forward_pre_hook(hook).remove)
            if routed is not None:
                before, middle = moments["ffn_in"], moments["ffn_mid"]

                def on_tokens(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                    hidden, choice = args[:2]
                    before.add(hidden)
                    for expert in range(self._experts("ffn_in")):
                        before.add_routed(hidden[(choice == expert).any(-1)], expert)

                def on_middle(x: Tensor, expert: int) -> Tensor:
                    middle.add(x)
                    middle.add_routed(x, expert)
                    return x

                routed.on_middle = on_middle
                stack.callback(_release, routed)
                stack.callback(routed.register_forward_pre_hook(on_tokens).remove)
            yield


def skeleton(folder: Path) -> tuple[Family, Any, Any]:
    """The family, transformers' configuration and its decoder model on the meta device, experts apart.

    Raises GgmlExtError for an unknown architecture, a configuration that transformers refuses and a model
    whose weights are quantised already.
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise GgmlExtError(f"{path}: cannot be read ({exc}); download the file again") from exc
    family = family_of(list(content.get("architectures") or []), path)
    if content.get("quantization_config"):
        raise GgmlExtError(f"{path}: the model is quantised already; calibrate the float model it was made from")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(
                config, attn_implementation="eager" if family.softcap else "sdpa"
            )
    except (OSError, ValueError, KeyError, AttributeError, ImportError, TypeError) as exc:
        raise GgmlExtError(f"{path}: transformers cannot build the model ({exc}); check the file") from exc
    model.eval()
    if family.router:
        for index, layer in enumerate(model.layers):
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts = RoutedExperts(layer.mlp.experts, f"{folder}: block {index}")
    return family, model.config, model


def heads_of(config: Any, layer: Any) -> Heads:
    """The attention heads of a decoder layer. head_dim is the module's own: not always hidden / heads."""
    return Heads(config.num_attention_heads, config.num_key_value_heads, layer.self_attn.head_dim)


class _Recorder(nn.Module):
    """Takes the place of a decoder layer and keeps what it is called with."""

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        self.kwargs = kwargs
        return hidden


def _mapping_hook(function: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """A forward pre-hook for all matrices of a site; they are handed the same tensor, which is mapped once."""
    last: list[tuple[Tensor, Tensor]] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not last or last[0][0] is not args[0]:
            last[:] = [(args[0], function(args[0]))]
        return (last[0][1], *args[1:])

    return hook


def _observing_hook(moments: Moments) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        moments.add(args[0])

    return hook


def _release(routed: RoutedExperts) -> None:
    routed.on_input = routed.on_middle = None


@contextmanager
def _intercepted_attention(config: Any, attention: Any, add: Callable[..., None]) -> Iterator[None]:
    """While this is open, ``attention`` hands query, key and value to ``add`` instead of attending; its result
    is of no use."""

    def intercept(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, None]:
        add(query, key, value)
        return query.transpose(1, 2), None

    name = "ggml_ext_intercept"
    before = config._attn_implementation
    transformers.AttentionInterface.register(name, intercept)
    attention.config._attn_implementation = name
    try:
        yield
    finally:
        attention.config._attn_implementation = before
