"""SmoothQuant (arXiv 2211.10438): a diagonal that shares the range of outlier channels between activations
and weights. Folded, so the file is an ordinary one."""

from __future__ import annotations

from ggml_ext.methods.sites import Site, SiteStats, SiteTransform
from ggml_ext.methods.transforms.clip import with_best_clip
from ggml_ext.methods.transforms.diagonal import smooth
from ggml_ext.methods.transforms.request import TransformRequest

ALPHA = 0.5  # section 5.1


def solve(site: Site, stats: SiteStats, request: TransformRequest) -> SiteTransform:
    """diag = max|x|^alpha / max|w|^(1 - alpha) over all the site's matrices."""
    alpha = ALPHA if request.alpha is None else request.alpha
    return with_best_clip(SiteTransform(smooth(site, stats, alpha)), site, stats, request)
