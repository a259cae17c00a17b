"""Sees and replaces the activations at a decoder block's sites while the block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import transformers
from torch import Tensor, nn

from ggml_ext.experts import RoutedExperts
from ggml_ext.families import Family
from ggml_ext.moments import Moments
from ggml_ext.sites import SiteKind


class SitePoints:
    """The places in a decoder layer where the sites' activations pass: the inputs of the matrices that read
    them, and for a mixture of experts the two points of RoutedExperts."""

    def __init__(self, layer: Any, family: Family) -> None:
        self._routed: RoutedExperts | None = layer.mlp.experts if family.router else None
        in_experts = ("ffn_in", "ffn_mid") if self._routed is not None else ()
        self._modules: dict[SiteKind, list[nn.Module]] = {
            kind: [layer.get_submodule(name) for name in names]
            for kind, names in family.sites.items()
            if kind not in in_experts
        }

    @contextmanager
    def mapped(self, inputs: Mapping[SiteKind, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """While this is open, the matrices of a site read ``inputs[kind](x)`` instead of x."""
        with ExitStack() as stack:
            for kind, modules in self._modules.items():
                if kind in inputs:
                    hook = _mapping_hook(inputs[kind])
                    for module in modules:
                        stack.callback(module.register_forward_pre_hook(hook).remove)
            if self._routed is not None:
                self._routed.on_input = inputs.get("ffn_in")
                middle = inputs.get("ffn_mid")
                self._routed.on_middle = (lambda x, _expert: middle(x)) if middle else None
                stack.callback(self._routed.release)
            yield

    @contextmanager
    def observed(self, moments: Mapping[SiteKind, Moments]) -> Iterator[None]:
        """While this is open, each forward pass adds to the statistics of every site."""
        with ExitStack() as stack:
            for kind, modules in self._modules.items():
                hook = _observing_hook(moments[kind])
                stack.callback(modules[0].register_forward_pre_hook(hook).remove)
            if self._routed is not None:
                hook = _routing_hook(moments["ffn_in"])
                stack.callback(self._routed.register_forward_pre_hook(hook).remove)
                self._routed.on_middle = _middle_observer(moments["ffn_mid"])
                stack.callback(self._routed.release)
            yield


def _mapping_hook(function: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """A forward pre-hook for all matrices of a site: they get the same tensor, which is mapped once."""
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


def _routing_hook(moments: Moments) -> Callable[..., None]:
    """A forward pre-hook for RoutedExperts, called with the tokens and the router's choice first."""

    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        tokens, choice = args[:2]
        moments.add(tokens)
        for expert in range(module.n_experts):
            moments.add_routed(tokens[(choice == expert).any(-1)], expert)

    return hook


def _middle_observer(moments: Moments) -> Callable[[Tensor, int], Tensor]:
    def observe(x: Tensor, expert: int) -> Tensor:
        moments.add(x)
        moments.add_routed(x, expert)
        return x

    return observe


@contextmanager
def intercepted_attention(attention: Any, take: Callable[[Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """While this is open, the attention module hands its queries, keys and values [batch, heads, tokens,
    head_dim], after QK-norm and RoPE, to ``take``. It does not attend: its result means nothing."""

    def intercept(
        _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, None]:
        take(query, key, value)
        return query.transpose(1, 2), None

    name = "ggml_ext_intercept"
    transformers.AttentionInterface.register(name, intercept)
    before = attention.config._attn_implementation
    attention.config._attn_implementation = name
    try:
        yield
    finally:
        attention.config._attn_implementation = before
