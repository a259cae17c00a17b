"""A calibration's blocks: solved, folded, rounded, one file each. They do not depend on each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ggml_ext.gguf.source import Source
from ggml_ext.methods import transforms
from ggml_ext.methods.calibrate import given
from ggml_ext.methods.calibrate.block import Job, encode_block
from ggml_ext.methods.calibrate.block_file import Findings, block_path, outside_path, save
from ggml_ext.methods.calibrate.outside import round_outside
from ggml_ext.methods.calibrate.plan import Plan
from ggml_ext.methods.model_sites import ModelSites
from ggml_ext.methods.rounding.hessian import Hessian, choose_shrinkage
from ggml_ext.methods.sites import ActivationSpec, Linear, Site, SiteStats, SiteTransform, identity
from ggml_ext.methods.transforms import TransformRequest
from ggml_ext.methods.transforms.loss import SAMPLE_TOKENS
from ggml_ext.observe.layout import SAMPLE_ROWS
from ggml_ext.observe.reader import Observation


@dataclass(frozen=True)
class Work:
    """What the blocks of a plan are made of. ``folder``: of the calibration. ``matrices``: transforms that
    were given, in GGUF's order, None where they are solved. ``threads``: 0 for all."""

    folder: Path
    plan: Plan
    model: ModelSites
    seen: Observation
    matrices: given.Matrices | None = None
    threads: int = 0


def sample_rows(activation: Sequence[int] | None) -> int:
    """Rows of each site's sample. With activations of 4 bits it is part of what transforms are solved for;
    else it only tells how far to trust the moments."""
    return SAMPLE_ROWS if activation is None else SAMPLE_TOKENS


def calibrate_block(work: Work, index: int) -> dict[str, float]:
    """Calibrates one block, writes its file, and returns the errors of its matrices."""
    plan, seen, matrices = work.plan, work.seen, work.matrices
    sites, rows = work.model.block(index), sample_rows(plan.activation)
    torch.manual_seed(plan.seed)
    if matrices is not None:
        solved = given.sites(matrices, index, sites, clips=plan.activation is not None)
    else:
        solved = _solve(plan, sites, seen)
    job = Job(plan.types, plan.rounding, work.model.read, work.model.marks(index), work.threads)
    packed, findings = encode_block(sites, lambda site: site_stats(seen, site, rows), solved, job)
    if matrices is not None:
        packed |= given.cache_tensors(matrices, index)
    save(block_path(work.folder, index), packed, findings)
    return findings.errors


def calibrate_outside(work: Work, source: Source) -> None:
    """Rounds the matrices outside the blocks and writes their file."""
    plan, packed, errors = work.plan, {}, {}
    for tensor in source.tensors:
        if tensor.name not in plan.outside:
            continue
        site = Site(tensor.name, tensor.row_length, (Linear(tensor.name, torch.empty(0)),), None)
        stats = site_stats(work.seen, site, sample_rows(plan.activation))
        hessian = Hessian(
            stats.hessian.double(), choose_shrinkage(stats.hessian, stats.n_tokens, stats.sample)
        )
        packed[tensor.name], errors[tensor.name] = round_outside(
            tensor, plan.types[tensor.name], plan.rounding, hessian, threads=work.threads
        )
    save(outside_path(work.folder), packed, Findings(errors=errors))


class _ExpertMoments(Sequence[Tensor]):
    """The second moments of a site's experts, read when they are asked for: all together are large."""

    def __init__(self, seen: Observation, tensor: str, experts: int) -> None:
        self._seen, self._tensor, self._experts = seen, tensor, experts

    def __len__(self) -> int:
        return self._experts

    def __getitem__(self, expert: int) -> Tensor:  # type: ignore[override]  # no slices
        site = self._seen.site_of(self._tensor)
        assert site is not None
        return torch.from_numpy(self._seen.expert_moment(site, expert))


def site_stats(seen: Observation, site: Site, rows: int) -> SiteStats:
    """What was observed at the site, with at most so many rows of its sample."""
    tensor = (*site.linears, *site.folded)[0].tensor
    its = seen.site_of(tensor)
    assert its is not None, tensor
    experts = its.experts
    return SiteStats(
        hessian=torch.from_numpy(seen.moment(its)),
        absmax=torch.from_numpy(seen.absmax(its)),
        sample=torch.from_numpy(seen.sample(its, rows)),
        n_tokens=round(seen.rows(its)),
        expert_hessian=_ExpertMoments(seen, tensor, experts) if seen.has_expert_moments(its) else None,
        expert_diagonal=torch.from_numpy(seen.expert_diagonals(its)) if experts else None,
        expert_tokens=torch.from_numpy(np.rint(seen.expert_rows(its)).astype(np.int64)) if experts else None,
    )


def _activation(plan: Plan) -> ActivationSpec:
    return ActivationSpec() if plan.activation is None else ActivationSpec(*plan.activation)


def _solve(plan: Plan, sites: Mapping[str, Site], seen: Observation) -> dict[str, SiteTransform]:
    wanted = TransformRequest(
        name=plan.transform,
        types=plan.types,
        activation=_activation(plan),
        rounding=plan.rounding,
        seed=plan.seed,
    )
    budgets = transforms.split_budget(sites, plan.transform_bits)
    solved = {anchor: identity(site.n) for anchor, site in sites.items()}
    if plan.transform == "none" and not wanted.clips:
        return solved
    device = torch.device(plan.device)
    for anchor, site in sites.items():
        its, stats = _on_device(site, site_stats(seen, site, sample_rows(plan.activation)), device)
        solved[anchor] = transforms.solve(its, stats, replace(wanted, budget_bits=budgets[anchor]))
    return solved


def _on_device(site: Site, stats: SiteStats, device: torch.device) -> tuple[Site, SiteStats]:
    if device.type == "cpu":
        return site, stats
    linears = tuple(Linear(linear.tensor, linear.weight.to(device)) for linear in site.linears)
    return replace(site, linears=linears), replace(
        stats,
        hessian=stats.hessian.to(device),
        absmax=stats.absmax.to(device),
        sample=stats.sample.to(device),
    )
