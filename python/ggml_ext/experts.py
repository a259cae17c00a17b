"""The experts of a mixture with their matrices apart, so that each GGUF tensor is one parameter and the
activations that the experts read can be seen and replaced.

transformers fuses gate and up into one parameter and picks one of several implementations; the arithmetic
here is that of its MixtralExperts.forward and Qwen3MoeExperts.forward, which are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ggml_ext.errors import GgmlExtError


class ExpertMatrix(nn.Module):
    """``weight`` [experts, n_out, n]."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device="meta"))


class RoutedExperts(nn.Module):
    """Stands in for transformers' experts module, with parameters on the meta device until weights are
    assigned. ``on_input`` replaces the tokens [tokens, n] before the experts read them, ``on_middle`` an
    expert's intermediate [routed tokens, ff], given the expert's index."""

    def __init__(self, fused: Any, where: str) -> None:
        """fused: transformers' module. Raises GgmlExtError if its parameters are not the ones known."""
        super().__init__()
        names = sorted(name for name, _ in fused.named_parameters())
        if names != ["down_proj", "gate_up_proj"]:
            raise GgmlExtError(
                f"{where}: its experts hold {', '.join(names)}, which calibration does not understand; "
                "use transform none with rounding rtn or imatrix"
            )
        self.n_experts, n, ff = fused.down_proj.shape
        self.gate_proj = ExpertMatrix(self.n_experts, ff, n)
        self.up_proj = ExpertMatrix(self.n_experts, ff, n)
        self.down_proj = ExpertMatrix(self.n_experts, n, ff)
        self.act_fn: Callable[[Tensor], Tensor] = fused.act_fn
        self.release()

    def release(self) -> None:
        """Nothing replaces the activations any more."""
        self.on_input: Callable[[Tensor], Tensor] | None = None
        self.on_middle: Callable[[Tensor, int], Tensor] | None = None

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden [tokens, n]; top_k_index int64 and top_k_weights [tokens, k]: the router's choice."""
        result = torch.zeros_like(hidden)
        if self.on_input is not None:
            hidden = self.on_input(hidden)
        for expert in range(self.n_experts):
            token, choice = torch.where(top_k_index == expert)
            if not len(token):
                continue
            x = hidden[token]
            middle = self.act_fn(linear(x, self.gate_proj.weight[expert]))
            middle = middle * linear(x, self.up_proj.weight[expert])
            if self.on_middle is not None:
                middle = self.on_middle(middle, expert)
            out = linear(middle, self.down_proj.weight[expert]) * top_k_weights[token, choice, None]
            result = result.index_add(0, token, out.to(result.dtype))
        return result
