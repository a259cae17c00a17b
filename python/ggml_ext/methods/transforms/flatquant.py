"""FlatQuant (arXiv 2410.09426): a learned Kronecker product and a diagonal per site, here from a closed-form
loss without any forward pass. docs/flatquant.md."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from ggml_ext.methods.sites import Site, SiteStats, SiteTransform, identity
from ggml_ext.methods.transforms.clip import with_best_clip
from ggml_ext.methods.transforms.diagonal import smooth
from ggml_ext.methods.transforms.kronecker import Factors
from ggml_ext.methods.transforms.loss import Loss
from ggml_ext.methods.transforms.matrices import spreading
from ggml_ext.methods.transforms.request import TransformRequest
from ggml_ext.methods.transforms.structure import Structure, folds_heads, largest, stored

ALPHA = 0.3  # of the diagonal that the search starts from
MAX_CONDITION = 100.0
_MATRIX_RATE = 0.15  # of the root mean square of a factor's entries
_DIAGONAL_RATE = 4e-2
_CLIP_RATE = 0.15
_BETAS = (0.8, 0.95)  # few steps: averages over the last five and twenty
_START_CLIP = 0.85
_CHECKS = 4  # times that the loss itself is looked at


def solve(site: Site, stats: SiteStats, request: TransformRequest) -> SiteTransform:
    """Minimises the closed-form loss with Adam, from Hadamard factors after a SmoothQuant diagonal or none.

    Returns the best of the iterates looked at whose stored factors have condition numbers of at most
    MAX_CONDITION; the start is one of them, and the only one where nothing is stored or folded (an implicit
    Hadamard matrix has no parameters). The identity if the moments are too singular for the start.
    notes: "loss_start", "loss", "condition" (the largest of a factor), "rejected" (iterates that were
    ill-conditioned).
    """
    loss = Loss(site, stats, request)
    clip = torch.tensor(_START_CLIP if request.clips else 1.0).logit().requires_grad_(request.clips)
    best, lowest = _start(site, stats, request, loss, float(clip.detach().sigmoid()))
    if lowest == math.inf:
        return with_best_clip(identity(site.n), site, stats, request)
    first, rejected = lowest, 0
    factors = Factors(site, best)
    steps = request.steps if factors.parameters else 0
    groups: list[dict[str, Any]] = [{"params": []}]
    groups += [{"params": [p], "lr": _rate(p.detach())} for p in factors.parameters.values()]
    if request.clips:
        groups.append({"params": [clip], "lr": _CLIP_RATE})
    optimiser = torch.optim.Adam(groups, betas=_BETAS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        try:
            loss.surrogate(factors, clip.sigmoid()).backward()
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # a factor became singular: no way back from there
            break
        optimiser.step()
        schedule.step()
        if step == steps or step % max(1, steps // _CHECKS) == 0:
            candidate = factors.transform()
            if condition(candidate) > MAX_CONDITION:
                rejected += 1
                continue
            value = _value(loss, site, candidate, float(clip.detach().sigmoid()))
            if value < lowest:
                best, lowest = candidate, value
    notes = {
        "loss_start": first,
        "loss": lowest,
        "condition": condition(best),
        "rejected": float(rejected),
    }
    return with_best_clip(replace(best, notes=notes), site, stats, request)


def _rate(parameter: torch.Tensor) -> float:
    """A step's size. Entries of an orthogonal factor of order n have about the size n^-1/2."""
    return _DIAGONAL_RATE if parameter.dim() < 2 else _MATRIX_RATE * float(parameter.square().mean().sqrt())


def _start(
    site: Site, stats: SiteStats, request: TransformRequest, loss: Loss, clip: float
) -> tuple[SiteTransform, float]:
    """Hadamard factors after a SmoothQuant diagonal or none, whichever has the smaller loss; and that
    loss."""
    structure = largest(site, request.budget_bits)
    alpha = ALPHA if request.alpha is None else request.alpha
    diagonals = [smooth(site, stats, alpha), torch.ones(site.n, dtype=torch.float64)]
    starts = [Factors(site, initial(site, diag, structure)).transform() for diag in diagonals]
    losses = [_value(loss, site, start, clip) for start in starts]
    return min(zip(starts, losses, strict=True), key=lambda pair: pair[1])


def _value(loss: Loss, site: Site, candidate: SiteTransform, clip: float) -> float:
    """The loss of a candidate; infinite where it cannot be computed."""
    try:
        value = loss.value(Factors(site, candidate), clip)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return math.inf
    return value if math.isfinite(value) else math.inf


def initial(site: Site, diag: torch.Tensor, structure: Structure) -> SiteTransform:
    """Orthogonal factors with entries of equal size, where they exist, after the diagonal."""
    return SiteTransform(
        diag,
        head=spreading(site.head_dim) if folds_heads(site) else None,
        left=stored(spreading(structure.left)) if structure.left else None,
        right=stored(spreading(structure.right)) if structure.right else None,
        hadamard=structure.hadamard if structure.hadamard > 1 else 0,
    )


def condition(transform: SiteTransform) -> float:
    """Largest condition number of a factor other than the diagonal; infinite if a value is NaN or Inf."""
    matrices = [m for m in (transform.head, transform.left, transform.right) if m is not None]
    if not all(bool(m.isfinite().all()) for m in (transform.diag, *matrices)):
        return math.inf
    return max((float(torch.linalg.cond(m)) for m in matrices), default=1.0)
