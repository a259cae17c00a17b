"""One block's calibration: its statistics and transforms -> the tensors that go into the GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.registry import FLOAT_TYPES, ROUNDINGS
from ggml_ext.methods.calibrate.block_file import Findings, Packed
from ggml_ext.methods.fold import file_sites, fold
from ggml_ext.methods.rounding import Rounded, grid, round_matrix
from ggml_ext.methods.rounding.hessian import Hessian, choose_shrinkage, expert_moments, expert_shrinkage
from ggml_ext.methods.sites import Linear, Site, SiteStats, SiteTransform
from ggml_ext.runtime import native

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Job:
    """What to do with every block. ``types``: GGUF tensor -> type. ``rounding``: one of registry.ROUNDINGS.
    ``read``: a tensor of the float model by its name, for norms, biases and routers. ``marked``: the file
    needs a stored factor, or stock llama.cpp would run it without its transforms. ``threads``: 0 for
    all."""

    types: Mapping[str, str]
    rounding: str
    read: Callable[[str], Tensor]
    marked: bool = False
    threads: int = 0


def encode_block(
    sites: Mapping[str, Site],
    stats: Callable[[Site], SiteStats] | None,
    transforms: Mapping[str, SiteTransform],
    job: Job,
) -> tuple[dict[str, Packed], Findings]:
    """Folds the transforms into the block's tensors and rounds its matrices.

    sites, transforms: by anchor. stats: a site's statistics, asked for once; None where the types are those
    of the float model, which need none. Raises GgmlExtError for a
    matrix that its type cannot hold.
    """
    transforms = {anchor: _on_cpu(transform) for anchor, transform in transforms.items()}
    weights, others = transformed(sites, transforms, job.read)
    data: dict[str, Bytes] = {}
    errors: dict[str, float] = {}
    for anchor, site in sites.items():
        seen, transform = None if stats is None else stats(site), transforms[anchor]
        for linears, its in ((site.linears, transform), (site.folded, transform.offline)):
            names = [linear.tensor for linear in linears]
            hessians = None if seen is None else _Hessians(its, seen)
            found = _rounded({name: weights[name] for name in names}, hessians, job)
            data |= found[0]
            errors |= found[1]
    packed = {name: Packed(job.types[name], _dims(weights[name]), data[name]) for name in data}
    packed.update(_all_factors(sites, transforms, job))
    packed.update({name: _float_tensor(tensor, "f32") for name, tensor in others.items()})
    findings = Findings(
        sites=file_sites(sites, transforms),
        errors=errors,
        notes={anchor: dict(its.notes) for anchor, its in transforms.items() if its.notes},
    )
    return packed, findings


def transformed(
    sites: Mapping[str, Site], transforms: Mapping[str, SiteTransform], read: Callable[[str], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The block's matrices after folding and in the transformed basis, and the other tensors that folding
    changed; both float32 in GGUF's order."""
    tensors = {linear.tensor: linear.weight for site in sites.values() for linear in _all(site)}
    for name in _others(sites) - tensors.keys():
        tensors[name] = read(name)
    changed: set[str] = set()
    for anchor, site in sites.items():
        changed |= fold(site, transforms[anchor], tensors)
    weights: dict[str, Tensor] = {}
    for anchor, site in sites.items():
        for linears, its in (
            (site.linears, transforms[anchor]),
            (site.folded, transforms[anchor].offline),
        ):
            weights |= {linear.tensor: _moved(tensors.pop(linear.tensor), its) for linear in linears}
    return weights, {name: tensors[name] for name in sorted(changed & tensors.keys())}


def _all(site: Site) -> tuple[Linear, ...]:
    return (*site.linears, *site.folded)


def _others(sites: Mapping[str, Site]) -> set[str]:
    """What folding may change and is not rounded: norms, biases, routers."""
    wanted = {name for site in sites.values() for name in site.also}
    for site in sites.values():
        if site.fold is not None:
            wanted |= {site.fold.tensor, site.fold.bias} - {""}
    return wanted


def _moved(weight: Tensor, transform: SiteTransform) -> Tensor:
    """W T^-T, expert by expert: the arithmetic in float64 takes several times the matrix."""
    if weight.dim() == 2:
        return transform.weight(weight)
    return torch.stack([transform.weight(expert) for expert in weight])


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
        tokens = self._stats.expert_tokens
        if expert is None or tokens is None or int(tokens[expert]) == 0:
            return self.shared
        own = self._own(expert)
        if own is None:
            return self.shared
        count, shared = int(tokens[expert]), self.shared
        measured = expert_moments(self._transform.hessian(own), count, shared.measured)
        return Hessian(measured, expert_shrinkage(count, len(measured), shared.shrinkage))

    def _own(self, expert: int) -> Tensor | None:
        """The expert's moments; where only its diagonal is known, the correlations are everybody's."""
        stats = self._stats
        if stats.expert_hessian is not None:
            return stats.expert_hessian[expert].cpu()
        if stats.expert_diagonal is None:
            return None
        shared = stats.hessian.cpu()
        ratio = (stats.expert_diagonal[expert].cpu() / shared.diagonal().clamp_min(_TINY)).sqrt()
        return shared * ratio * ratio[:, None]


_TINY = torch.finfo(torch.float32).tiny


def _matrices(weight: Tensor) -> list[tuple[int | None, NDArray[np.float32]]]:
    """(expert, matrix [rows, n]) of each expert, or (None, the one matrix that ``weight`` is)."""
    if weight.dim() == 2:
        return [(None, np.ascontiguousarray(weight.numpy()))]
    return [(i, np.ascontiguousarray(w.numpy())) for i, w in enumerate(weight)]


def _rounded(
    weights: Mapping[str, Tensor], hessians: _Hessians | None, job: Job
) -> tuple[dict[str, Bytes], dict[str, float]]:
    """The encodings of matrices that read one site, and their errors: the means over the experts if there
    are several.

    Expert by expert: all matrices that read the same inputs share their moments' factors.
    """
    parts: dict[str, list[Rounded]] = {name: [] for name in weights}
    groups: dict[int, dict[str, list[tuple[int | None, NDArray[np.float32]]]]] = {}
    for name, weight in weights.items():
        matrices = _matrices(weight)
        groups.setdefault(len(matrices), {})[name] = matrices
    for group in groups.values():
        for members in zip(*group.values(), strict=True):
            hessian = None if hessians is None else hessians.of(members[0][0])
            for name, (_, w) in zip(group, members, strict=True):
                method = job.rounding
                if ROUNDINGS[method].otherwise and not _has_grid(job.types[name]):
                    method = ROUNDINGS[method].otherwise
                try:
                    rounded = round_matrix(w, job.types[name], method, hessian, threads=job.threads)
                except GgmlExtError as exc:
                    raise GgmlExtError(f"{name}: {exc}") from exc
                parts[name].append(rounded)
    data = {name: np.concatenate([part.data for part in its]) for name, its in parts.items()}
    return data, {name: float(np.mean([part.error for part in its])) for name, its in parts.items()}


def _has_grid(type_name: str) -> bool:
    return type_name not in FLOAT_TYPES and grid.supports(type_name)


def _dims(tensor: Tensor) -> tuple[int, ...]:
    return tuple(reversed(tensor.shape))


def _float_tensor(tensor: Tensor, type_name: str) -> Packed:
    rows = np.ascontiguousarray(tensor.reshape(-1, tensor.shape[-1]).numpy(), np.float32)
    return Packed(type_name, _dims(tensor), native.quantize(type_name, rows))


def _all_factors(
    sites: Mapping[str, Site], transforms: Mapping[str, SiteTransform], job: Job
) -> dict[str, Packed]:
    factors: dict[str, Packed] = {}
    for anchor, site in sites.items():
        factors.update(_factors(site, transforms[anchor]))
    rotated = [site for anchor, site in sites.items() if transforms[anchor].hadamard > 1]
    if job.marked and rotated and not factors:
        # One stored factor makes stock llama.cpp refuse the file: the smallest that is an identity.
        orders = {site.anchor: site.n // transforms[site.anchor].hadamard for site in rotated}
        site = min(rotated, key=lambda site: orders[site.anchor])
        eye = torch.eye(orders[site.anchor], dtype=torch.float64)
        factors = _factors(site, replace(transforms[site.anchor], left=eye))
    return factors


def _factors(site: Site, transform: SiteTransform) -> dict[str, Packed]:
    """The online factors, F16 where that is exact. Element [i][a] is at i * n + a."""
    factors = {}
    for suffix, factor in (("fq_l", transform.left), ("fq_r", transform.right)):
        if factor is not None:
            exact = bool((factor.half().double() == factor).all())
            factors[f"{site.anchor}.{suffix}"] = _float_tensor(factor.float(), "f16" if exact else "f32")
    return factors
