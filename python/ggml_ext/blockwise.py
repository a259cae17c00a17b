"""One block's calibration: its statistics and transforms -> the tensors that go into the GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ggml_ext import native
from ggml_ext.block_file import Findings, Packed
from ggml_ext.errors import GgmlExtError
from ggml_ext.fold import fold, folded, unfold
from ggml_ext.rounding import Rounded, grid, relative_error, round_matrix
from ggml_ext.rounding.hessian import Hessian, choose_shrinkage, expert_moments, expert_shrinkage
from ggml_ext.rounding.learned import Learned, Matrix
from ggml_ext.rules import FLOAT_TYPES
from ggml_ext.sites import SITE_KINDS, Linear, Site, SiteKind, SiteStats, SiteTransform
from ggml_ext.source import Source, read_floats, reading

Bytes = NDArray[np.uint8]
Refine = Callable[[Sequence[Matrix]], Learned]


@dataclass(frozen=True)
class Job:
    """What to do with every block. ``types``: GGUF tensor -> type. ``rounding``: as in rounding.NAMES.
    ``threads``: 0 for all. ``refine``: for learned rounding, improves what GPTQ finds, all matrices of the
    block together."""

    types: Mapping[str, str]
    rounding: str
    threads: int = 0
    refine: Refine | None = None


def encode_block(
    sites: Mapping[SiteKind, Site],
    stats: Mapping[SiteKind, SiteStats],
    transforms: Mapping[SiteKind, SiteTransform],
    source: Source,
    job: Job,
) -> tuple[dict[str, Packed], Findings]:
    """Folds the transforms into the block's tensors and rounds its matrices.

    source: the float GGUF file, which norms, biases and routers are read from. Raises GgmlExtError for a
    matrix that its type cannot hold.
    """
    transforms = {kind: _on_cpu(transform) for kind, transform in transforms.items()}
    weights, others = transformed(sites, transforms, source)
    data: dict[str, Bytes] = {}
    errors: dict[str, float] = {}
    notes: dict[str, dict[str, float]] = {
        kind: dict(transforms[kind].notes) for kind in SITE_KINDS if transforms[kind].notes
    }
    for kind in SITE_KINDS:
        hessians = _Hessians(transforms[kind], stats[kind])
        names = [linear.tensor for linear in sites[kind].linears]
        found = _rounded({name: weights[name] for name in names}, hessians, job)
        data |= found[0]
        errors |= found[1]
    if job.refine is not None:
        learned = job.refine(_for_learning(sites, transforms, weights, data, job))
        notes["block"] = {"learned_before": learned.before, "learned_after": learned.after}
        for kind in SITE_KINDS:
            hessians = _Hessians(transforms[kind], stats[kind])
            for linear in sites[kind].linears:
                name = linear.tensor
                if name in learned.data:
                    data[name] = learned.data[name]
                    errors[name] = _error(weights[name], data[name], job.types[name], hessians)
    packed = {name: Packed(job.types[name], _dims(weights[name]), data[name]) for name in data}
    packed.update(_all_factors(sites, transforms, job))
    packed.update({name: _float_tensor(tensor, "f32") for name, tensor in others.items()})
    findings = Findings(
        hadamard=tuple(transforms[kind].hadamard for kind in SITE_KINDS),
        clip=tuple(transforms[kind].clip for kind in SITE_KINDS),
        errors=errors,
        notes=notes,
        folded=folded(transforms),
    )
    return packed, findings


def transformed(
    sites: Mapping[SiteKind, Site], transforms: Mapping[SiteKind, SiteTransform], source: Source
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The block's matrices after folding and in the transformed basis, and the other tensors that folding
    changed; both float32 in GGUF's order."""
    linears = [linear for site in sites.values() for linear in site.linears]
    tensors = {linear.tensor: _gguf_order(linear) for linear in linears}
    _read_others(sites, tensors, source)
    changed: set[str] = set()
    for kind, site in sites.items():
        changed |= fold(site, transforms[kind], tensors)
    weights = {
        linear.tensor: _moved(tensors.pop(linear.tensor), transforms[kind])
        for kind in SITE_KINDS
        for linear in sites[kind].linears
    }
    return weights, {name: tensors[name] for name in sorted(changed & tensors.keys())}


def _moved(weight: Tensor, transform: SiteTransform) -> Tensor:
    """W T^-T, expert by expert: the arithmetic in float64 takes several times the matrix."""
    if weight.dim() == 2:
        return transform.weight(weight)
    for expert in weight:
        expert.copy_(transform.weight(expert))
    return weight


def _on_cpu(transform: SiteTransform) -> SiteTransform:
    def moved(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.detach().double().cpu()

    return replace(
        transform,
        diag=transform.diag.detach().double().cpu(),
        head=moved(transform.head),
        left=moved(transform.left),
        right=moved(transform.right),
    )


def _gguf_order(linear: Linear) -> Tensor:
    return linear.weight.detach().float().cpu()[..., torch.from_numpy(linear.gguf_rows), :]


def _read_others(sites: Mapping[SiteKind, Site], tensors: dict[str, Tensor], source: Source) -> None:
    """Adds what folding may change and no site reads: norms, biases, routers."""
    wanted = {name for site in sites.values() for name in site.also}
    for site in sites.values():
        if site.fold is not None:
            wanted |= {site.fold.tensor, site.fold.bias} - {""}
    by_name = {tensor.name: tensor for tensor in source.tensors}
    for name in wanted - tensors.keys():
        tensor = by_name[name]
        with reading(tensor) as file:
            rows = read_floats(file, tensor, 0, tensor.n_rows)
        tensors[name] = torch.from_numpy(rows.reshape(tensor.dims[::-1]))


class _Hessians:
    """Second moments of a site's transformed inputs, one expert's or everybody's, shrunk for GPTQ."""

    def __init__(self, transform: SiteTransform, stats: SiteStats) -> None:
        self._transform = transform
        self._stats = stats

    @cached_property
    def shared(self) -> Hessian:
        """Of all tokens."""
        measured = self._transform.hessian(self._stats.hessian.cpu())
        sample = self._transform.apply(self._stats.sample.cpu())
        return Hessian(measured, choose_shrinkage(measured, self._stats.n_tokens, sample))

    def of(self, expert: int | None) -> Hessian:
        """Of the tokens that an expert got; everybody's if there were none. Not kept: those of all experts
        together are large."""
        own, tokens = self._stats.expert_hessian, self._stats.expert_tokens
        if expert is None or own is None or tokens is None or int(tokens[expert]) == 0:
            return self.shared
        count, shared = int(tokens[expert]), self.shared
        measured = expert_moments(self._transform.hessian(own[expert].cpu()), count, shared.measured)
        return Hessian(measured, expert_shrinkage(count, len(measured), shared.shrinkage))


def _matrices(weight: Tensor) -> list[tuple[int | None, NDArray[np.float32]]]:
    """(expert, matrix [rows, n]) of each expert, or (None, the one matrix that ``weight`` is)."""
    if weight.dim() == 2:
        return [(None, np.ascontiguousarray(weight.numpy()))]
    return [(i, np.ascontiguousarray(w.numpy())) for i, w in enumerate(weight)]


def _rounded(
    weights: Mapping[str, Tensor], hessians: _Hessians, job: Job
) -> tuple[dict[str, Bytes], dict[str, float]]:
    """The encodings of a site's matrices, and their errors: the means over the experts if there are several.

    Expert by expert: all matrices that read the same inputs share their moments' factors.
    """
    parts: dict[str, list[Rounded]] = {name: [] for name in weights}
    for group in zip(*(_matrices(weight) for weight in weights.values()), strict=True):
        hessian = hessians.of(group[0][0])
        for name, (_, w) in zip(weights, group, strict=True):
            method = "gptq" if job.rounding == "learned" else job.rounding
            if method == "gptq" and not _has_grid(job.types[name]):
                method = "imatrix"
            try:
                parts[name].append(round_matrix(w, job.types[name], method, hessian, threads=job.threads))
            except GgmlExtError as exc:
                raise GgmlExtError(f"{name}: {exc}") from exc
    data = {name: np.concatenate([part.data for part in its]) for name, its in parts.items()}
    return data, {name: float(np.mean([part.error for part in its])) for name, its in parts.items()}


def _has_grid(type_name: str) -> bool:
    return type_name not in FLOAT_TYPES and grid.supports(type_name)


def _error(weight: Tensor, data: Bytes, type_name: str, hessians: _Hessians) -> float:
    """The error of an encoding, as _rounded gives it."""
    errors, first = [], 0
    for expert, w in _matrices(weight):
        part = native.dequantize(type_name, data[first : first + len(w)], w.shape[1])
        errors.append(relative_error(w, part, hessians.of(expert).measured))
        first += len(w)
    return float(np.mean(errors))


def _for_learning(
    sites: Mapping[SiteKind, Site],
    transforms: Mapping[SiteKind, SiteTransform],
    weights: Mapping[str, Tensor],
    data: Mapping[str, Bytes],
    job: Job,
) -> list[Matrix]:
    """The quantised matrices as learned rounding wants them."""
    found = []
    for kind in SITE_KINDS:
        for linear in sites[kind].linears:
            name = linear.tensor
            if not _has_grid(job.types[name]):
                continue
            folds = [
                (site, transforms[site.kind])
                for site in sites.values()
                if site.fold is not None and site.fold.tensor == name
            ]
            original = partial(_original, linear=linear, transform=transforms[kind], folds=folds)
            wanted = weights[name].reshape(-1, weights[name].shape[-1])
            found.append(Matrix(name, job.types[name], data[name], wanted, original))
    return found


def _original(
    rows: Tensor,
    *,
    linear: Linear,
    transform: SiteTransform,
    folds: Sequence[tuple[Site, SiteTransform]],
) -> Tensor:
    """A transformed and folded matrix [rows, n], GGUF's order, as the block itself would have it."""
    weight = transform.effective_weight(rows.cpu()).reshape(linear.weight.shape)
    for site, its in folds:
        weight = unfold(site, its, weight)
    back = torch.from_numpy(np.argsort(linear.gguf_rows))
    return weight[..., back, :].to(linear.weight.device)


def _dims(tensor: Tensor) -> tuple[int, ...]:
    return tuple(reversed(tensor.shape))


def _float_tensor(tensor: Tensor, type_name: str) -> Packed:
    rows = np.ascontiguousarray(tensor.reshape(-1, tensor.shape[-1]).numpy(), np.float32)
    return Packed(type_name, _dims(tensor), native.quantize(type_name, rows))


def _all_factors(
    sites: Mapping[SiteKind, Site], transforms: Mapping[SiteKind, SiteTransform], job: Job
) -> dict[str, Packed]:
    factors: dict[str, Packed] = {}
    for kind in SITE_KINDS:
        factors.update(_factors(sites[kind], transforms[kind]))
    rotated = [kind for kind in SITE_KINDS if transforms[kind].hadamard > 1]
    first = sites["attn_in"].anchor.startswith("blk.0.")
    if first and rotated and not factors and "fq4" not in job.types.values():
        # Stock llama.cpp would run a file of its own types whose only transforms are Hadamard matrices, and
        # wrongly (docs/gguf.md). One stored factor makes it refuse: the smallest that is an identity.
        orders = {kind: sites[kind].n // transforms[kind].hadamard for kind in rotated}
        kind = min(orders, key=lambda kind: orders[kind])
        eye = torch.eye(orders[kind], dtype=torch.float64)
        factors = _factors(sites[kind], replace(transforms[kind], left=eye))
    return factors


def _factors(site: Site, transform: SiteTransform) -> dict[str, Packed]:
    """The online factors, F16 where that is exact. Element [i][a] is at i * n + a."""
    factors = {}
    for suffix, factor in (("fq_l", transform.left), ("fq_r", transform.right)):
        if factor is not None:
            exact = bool((factor.half().double() == factor).all())
            factors[f"{site.anchor}.{suffix}"] = _float_tensor(factor.float(), "f16" if exact else "f32")
    return factors
