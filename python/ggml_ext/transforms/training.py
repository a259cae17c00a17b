"""Transforms trained on a block's output, with the real quantisers and straight-through gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ggml_ext import native
from ggml_ext.rounding import round_matrix
from ggml_ext.rounding.hessian import Hessian, choose_shrinkage
from ggml_ext.sites import Linear, Site, SiteKind, SiteStats, SiteTransform
from ggml_ext.transforms.activation import fake_quant_activation
from ggml_ext.transforms.flatquant import MAX_CONDITION, condition
from ggml_ext.transforms.kronecker import Factors
from ggml_ext.transforms.request import TransformRequest

if TYPE_CHECKING:  # it brings transformers along
    from ggml_ext.blocks import Block

_FACTOR_RATE = 2e-3
_CLIP_RATE = 5e-2
_CHECKS = 3  # times that the weights are encoded anew and an iterate is compared with the best one
_CHECK_BATCHES = 8
_SMALLEST_CLIP, _LARGEST_CLIP = 0.01, 0.99  # learned clips; at 0 and 1 the logit is infinite


def train(
    block: Block,
    transforms: Mapping[SiteKind, SiteTransform],
    batches: Sequence[Tensor],
    targets: Sequence[Tensor],
    request: TransformRequest,
) -> dict[SiteKind, SiteTransform]:
    """Transforms with a smaller mean squared error of the block's output, on batches of hidden states
    [batch, tokens, hidden] against targets, what the block makes of them in float.

    Returns the best of a few iterates and the transforms as given, by the loss over the first batches with
    freshly encoded weights and factors as stored; iterates with ill-conditioned factors are left out.
    notes: "block_loss_start" and "block_loss", relative to the targets' power. Deterministic for a seed.
    """
    state = _State(block, transforms, batches, request)
    checks = list(itertools.islice(zip(batches, targets, strict=True), _CHECK_BATCHES))
    best, start = dict(transforms), state.loss_of(transforms, checks)
    state.encode()
    lowest = start
    optimiser = torch.optim.AdamW(state.groups(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(request.train_steps, 1))
    order = torch.Generator().manual_seed(request.seed)
    queue: list[int] = []
    for step in range(1, request.train_steps + 1):
        if not queue:
            queue = torch.randperm(len(batches), generator=order).tolist()
        index = queue.pop()
        optimiser.zero_grad()
        try:
            _relative_error(state.run(batches[index]), targets[index]).backward()
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # a factor became singular: no way back from there
            break
        optimiser.step()
        schedule.step()
        if step == request.train_steps or step % max(1, request.train_steps // _CHECKS) == 0:
            candidate = state.transforms()
            conditions = [condition(transform) for transform in candidate.values()]
            if math.inf in conditions:
                break
            state.encode()
            if max(conditions) > MAX_CONDITION:
                continue
            loss = state.loss_of(candidate, checks)
            if loss < lowest:
                best, lowest = candidate, loss
    figures = {"block_loss_start": start, "block_loss": lowest}
    return {
        kind: replace(transform, notes=transforms[kind].notes | figures) for kind, transform in best.items()
    }


@dataclass
class _Learned:
    """A site's parameters. ``noise``: what encoding left of each of its transformed matrices."""

    site: Site
    factors: Factors
    clip: float | Tensor
    noise: dict[str, Tensor]

    def clip_factor(self) -> float | Tensor:
        return self.clip.sigmoid() if isinstance(self.clip, Tensor) else self.clip

    def clip_value(self) -> float:
        if not isinstance(self.clip, Tensor):
            return self.clip
        return max(float(self.clip.detach().sigmoid()), _SMALLEST_CLIP)


class _State:
    """The block with rounded weights and activations as a function of its sites' parameters. It runs in the
    transformed bases, as the file will: the matrices are W T^-T + noise and read the rounded x T. The noise
    is what the real rounding leaves; between two encodings it stays as it is."""

    def __init__(
        self,
        block: Block,
        transforms: Mapping[SiteKind, SiteTransform],
        batches: Sequence[Tensor],
        request: TransformRequest,
    ) -> None:
        self._block, self._request = block, request
        self._stats = block.collect(batches)
        self._learned = self._build(transforms)

    def _build(self, transforms: Mapping[SiteKind, SiteTransform]) -> dict[SiteKind, _Learned]:
        learned: dict[SiteKind, _Learned] = {}
        for kind, transform in transforms.items():
            site = self._block.sites[kind]
            clip: float | Tensor = transform.clip
            if self._request.clips:
                factor = min(max(transform.clip, _SMALLEST_CLIP), _LARGEST_CLIP)
                device = site.linears[0].weight.device
                clip = torch.tensor(math.log(factor / (1 - factor)), device=device, requires_grad=True)
            learned[kind] = _Learned(site, Factors(site, transform), clip, {})
        return learned

    def groups(self) -> list[dict[str, object]]:
        parts = self._learned.values()
        factors = [p for part in parts for p in part.factors.parameters.values()]
        clips = [part.clip for part in parts if isinstance(part.clip, Tensor)]
        groups: list[dict[str, object]] = [{"params": factors, "lr": _FACTOR_RATE}] if factors else []
        return [*groups, {"params": clips, "lr": _CLIP_RATE}] if clips else groups

    def transforms(self) -> dict[SiteKind, SiteTransform]:
        return {
            kind: replace(part.factors.transform(), clip=part.clip_value())
            for kind, part in self._learned.items()
        }

    @torch.no_grad()
    def loss_of(
        self, transforms: Mapping[SiteKind, SiteTransform], checks: Sequence[tuple[Tensor, Tensor]]
    ) -> float:
        """Mean relative error of the block's output with these transforms and weights encoded for them."""
        current, self._learned = self._learned, self._build(transforms)
        for kind, part in self._learned.items():
            part.clip = transforms[kind].clip
        self.encode()
        errors = [float(_relative_error(self.run(hidden), target)) for hidden, target in checks]
        self._learned = current
        return sum(errors) / len(errors)

    @torch.no_grad()
    def encode(self) -> None:
        """Rounds the transformed matrices as the file's will be."""
        for kind, part in self._learned.items():
            hessian = self._hessian(part.factors, self._stats[kind])
            for linear in part.site.linears:
                w = part.factors.weights(linear.weight)
                part.noise[linear.tensor] = self._rounded(linear, w, hessian) - w

    def run(self, hidden: Tensor) -> Tensor:
        weights = {
            linear.tensor: part.factors.weights(linear.weight) + part.noise[linear.tensor]
            for part in self._learned.values()
            for linear in part.site.linears
        }
        inputs = {kind: self._reader(part) for kind, part in self._learned.items()}
        return self._block.run(hidden, weights=weights, inputs=inputs)

    def _reader(self, part: _Learned) -> Callable[[Tensor], Tensor]:
        def read(x: Tensor) -> Tensor:
            moved = part.factors.inputs(x.float())
            return fake_quant_activation(moved, self._request.activation, part.clip_factor()).to(x.dtype)

        return read

    def _hessian(self, factors: Factors, stats: SiteStats) -> Hessian:
        moments = factors.moments(stats.hessian).cpu()
        sample = factors.inputs(stats.sample).cpu()
        return Hessian(moments, choose_shrinkage(moments, stats.n_tokens, sample))

    def _rounded(self, linear: Linear, w: Tensor, hessian: Hessian) -> Tensor:
        type_name = self._request.type_of(linear)
        method = "gptq" if self._request.rounding == "learned" else self._request.rounding
        decoded = []
        for matrix in w.reshape(-1, *w.shape[-2:]).cpu():
            rows = np.ascontiguousarray(matrix.numpy())
            data = round_matrix(rows, type_name, method, hessian, threads=torch.get_num_threads()).data
            decoded.append(torch.from_numpy(native.dequantize(type_name, data, rows.shape[1])))
        return torch.stack(decoded).view(w.shape).to(w.device)


def _relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error relative to the target's power, token by token, then the mean: what reads the hidden
    states normalises each token, and a few tokens are so large that they would drown the others."""
    error = (output.float() - target.float()).square().sum(-1)
    power = target.float().square().sum(-1)
    return (error / power.clamp_min(torch.finfo(power.dtype).tiny)).mean()
