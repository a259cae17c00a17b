"""One block's calibration: its statistics and transforms -> the tensors that go into the GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ggml_ext import native
from ggml_ext.block_file import Findings, Packed
from ggml_ext.fold import fold
from ggml_ext.rounding import round_matrix
from ggml_ext.sites import SITE_KINDS, Linear, Site, SiteKind, SiteStats, SiteTransform
from ggml_ext.source import Source, read_floats, reading


@dataclass(frozen=True)
class Job:
    """What to do with every block. ``types``: GGUF tensor -> type. ``rounding``: as in rounding.NAMES.
    ``threads``: 0 for all."""

    types: Mapping[str, str]
    rounding: str
    threads: int = 0


def encode_block(
    sites: Mapping[SiteKind, Site],
    stats: Mapping[SiteKind, SiteStats],
    transforms: Mapping[SiteKind, SiteTransform],
    source: Source,
    job: Job,
    on_tensor: Callable[[str, float], None] = lambda _name, _error: None,
) -> tuple[dict[str, Packed], Findings]:
    """Folds the transforms into the block's tensors and rounds its matrices.

    source: the float GGUF file, which norms, biases and routers are read from. on_tensor: called with the
    name and the error of each matrix that is done. Raises GgmlExtError for a matrix that its type cannot
    hold.
    """
    transforms = {kind: _on_cpu(transform) for kind, transform in transforms.items()}
    tensors = {
        linear.tensor: linear.weight.detach().float().cpu()[..., torch.from_numpy(linear.gguf_rows), :]
        for site in sites.values()
        for linear in site.linears
    }
    _read_others(sites, tensors, source)
    changed: set[str] = set()
    for kind, site in sites.items():
        changed |= fold(site, transforms[kind], tensors)
    packed: dict[str, Packed] = {}
    errors: dict[str, float] = {}
    for kind in SITE_KINDS:
        site, transform = sites[kind], transforms[kind]
        hessians = _Hessians(transform, stats[kind])
        for linear in site.linears:
            weight = transform.weight(tensors.pop(linear.tensor))
            packed[linear.tensor], errors[linear.tensor] = _rounded(weight, linear, hessians, job)
            on_tensor(linear.tensor, errors[linear.tensor])
        packed.update(_factors(site, transform))
    packed.update({name: _float_tensor(tensors[name], "f32") for name in sorted(changed & tensors.keys())})
    return packed, _findings(transforms, errors)


def _on_cpu(transform: SiteTransform) -> SiteTransform:
    parts = {"diag": transform.diag, "head": transform.head, "left": transform.left, "right": transform.right}
    moved = {name: None if part is None else part.detach().double().cpu() for name, part in parts.items()}
    return replace(transform, **cast("dict[str, Tensor]", moved))


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
    """Second moments of a site's transformed inputs, one expert's or everybody's."""

    def __init__(self, transform: SiteTransform, stats: SiteStats) -> None:
        self._transform = transform
        self._stats = stats
        self._shared: Tensor | None = None

    def of(self, expert: int | None) -> Tensor:
        """float64 [n, n]. An expert that no calibration token reached gets everybody's."""
        own, tokens = self._stats.expert_hessian, self._stats.expert_tokens
        if expert is not None and own is not None and (tokens is None or int(tokens[expert]) > 0):
            return self._transform.hessian(own[expert].cpu())
        if self._shared is None:
            self._shared = self._transform.hessian(self._stats.hessian.cpu())
        return self._shared


def _rounded(weight: Tensor, linear: Linear, hessians: _Hessians, job: Job) -> tuple[Packed, float]:
    """The matrix in its type, and its error; the mean over the experts if there are several."""
    type_name = job.types[linear.tensor]
    experts = list(weight) if weight.dim() == 3 else [weight]
    data, errors = [], []
    for index, matrix in enumerate(experts):
        hessian = hessians.of(index if weight.dim() == 3 else None)
        w = np.ascontiguousarray(matrix.numpy())
        rounded = round_matrix(w, type_name, job.rounding, hessian, threads=job.threads)
        data.append(rounded.data)
        errors.append(rounded.error)
    dims = tuple(reversed(weight.shape))
    return Packed(type_name, dims, np.concatenate(data)), float(np.mean(errors))


def _float_tensor(tensor: Tensor, type_name: str) -> Packed:
    rows = np.ascontiguousarray(tensor.reshape(-1, tensor.shape[-1]).numpy(), np.float32)
    return Packed(type_name, tuple(reversed(tensor.shape)), native.quantize(type_name, rows))


def _factors(site: Site, transform: SiteTransform) -> dict[str, Packed]:
    """The online factors, F16 where that is exact. Element [i][a] is at i * n + a."""
    factors = {}
    for suffix, factor in (("fq_l", transform.left), ("fq_r", transform.right)):
        if factor is not None:
            exact = bool((factor.half().double() == factor).all())
            factors[f"{site.anchor}.{suffix}"] = _float_tensor(factor.float(), "f16" if exact else "f32")
    return factors


def _findings(transforms: Mapping[SiteKind, SiteTransform], errors: dict[str, float]) -> Findings:
    return Findings(
        hadamard=tuple(transforms[kind].hadamard for kind in SITE_KINDS),
        clip=tuple(transforms[kind].clip for kind in SITE_KINDS),
        errors=errors,
        notes={kind: transforms[kind].notes for kind in SITE_KINDS if transforms[kind].notes},
    )
