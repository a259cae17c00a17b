"""AWQ (arXiv 2306.00978): a diagonal that enlarges the weights of the channels with large activations,
searched with the real quantiser. Folded, so the file is an ordinary one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ggml_ext.core.registry import ROUNDINGS
from ggml_ext.methods.sites import Site, SiteStats, SiteTransform, identity
from ggml_ext.methods.transforms.activation import FLOAT_BITS, fake_quant_activation
from ggml_ext.methods.transforms.clip import with_best_clip
from ggml_ext.methods.transforms.diagonal import expand, reduce_mean
from ggml_ext.methods.transforms.request import TransformRequest
from ggml_ext.runtime import native

GRID = 20  # exponents 0, 1/20, ... 19/20, as in the paper's code
_ROWS = 1024  # of a matrix; more rows give the same choice
_TOKENS = 512
_FLOATS = ("f32", "f16", "bf16")


def solve(site: Site, stats: SiteStats, request: TransformRequest) -> SiteTransform:
    """diag = mean|x|^a / sqrt(largest x smallest), with the a of the least error; the identity (a = 0) is
    one of them, and stays where nothing can be folded. notes: "exponent", "error", "error_start"."""
    if site.fold is None:
        return with_best_clip(identity(site.n), site, stats, request)
    mean = reduce_mean(site, stats.sample.abs().mean(0).double().cpu())
    mean = mean.clamp_min(1e-4 * float(mean.mean().clamp_min(torch.finfo(torch.float64).tiny)))
    objective = Objective(site, stats, request)
    best, notes = identity(site.n), {"exponent": 0.0}
    lowest = start = objective(best)
    for step in range(1, GRID):
        scale = mean ** (step / GRID)
        candidate = SiteTransform(expand(site, scale / (scale.max() * scale.min()).sqrt()))
        error = objective(candidate)
        if error < lowest:
            best, lowest, notes = candidate, error, {"exponent": step / GRID}
    notes |= {"error": lowest, "error_start": start}
    return with_best_clip(SiteTransform(best.diag, notes=notes), site, stats, request)


class Objective:
    """The error of a site's outputs under a transform, relative to each matrix's outputs and summed over the
    matrices: tr(dW H dW^T) / tr(W H W^T) with dW what the matrix's type leaves of W, plus the mean of |dx
    W^T|^2 over the sample with dx what rounding the activations leaves of x. Experts are averaged, each with
    its own H where there is one."""

    def __init__(self, site: Site, stats: SiteStats, request: TransformRequest) -> None:
        self._site, self._request = site, request
        self._sample = stats.sample[:: max(1, -(-len(stats.sample) // _TOKENS))].cpu().float()
        shared = stats.hessian.cpu().float()
        own = stats.expert_hessian
        self._matrices: list[tuple[Tensor, Tensor, str, float]] = []  # rows, H, type, share
        for linear in site.linears:
            experts = linear.weight.reshape(-1, *linear.weight.shape[-2:])
            per_expert = max(1, _ROWS // len(experts))
            for index, weight in enumerate(experts):
                h = shared
                if own is not None and (stats.expert_tokens is None or stats.expert_tokens[index] > 0):
                    h = own[index].cpu().float()
                w = weight[:: max(1, -(-len(weight) // per_expert))].cpu().float()
                self._matrices.append((w, h, request.type_of(linear), 1 / len(experts)))

    def __call__(self, transform: SiteTransform) -> float:
        moved = transform.apply(self._sample)
        dx = transform.invert(fake_quant_activation(moved, self._request.activation)) - self._sample
        total = 0.0
        for w, h, type_name, share in self._matrices:
            dw = self._rounded(transform, w, h, type_name) - w
            error = ((dw @ h) * dw).sum()
            if self._request.activation.bits < FLOAT_BITS:
                error = error + (dx @ w.T).square().sum() / len(dx)
            output = ((w @ h) * w).sum().clamp_min(torch.finfo(torch.float32).tiny)
            total += share * float(error / output)
        return total

    def _rounded(self, transform: SiteTransform, w: Tensor, h: Tensor, type_name: str) -> Tensor:
        """W after rounding in the transformed basis, back in its own."""
        if type_name.lower() in _FLOATS:
            return w
        moved = np.ascontiguousarray(transform.weight(w).numpy())
        importance = None
        if ROUNDINGS[self._request.rounding].measures or native.needs_imatrix(type_name):
            importance = transform.hessian(h).diagonal().float().clamp_min(0).numpy()
        data = native.quantize(type_name, moved, importance, threads=1)
        return transform.effective_weight(
            torch.from_numpy(native.dequantize(type_name, data, moved.shape[1]))
        )
