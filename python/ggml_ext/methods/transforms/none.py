"""No transform; only a clip of the activations where that is searched."""

from __future__ import annotations

from ggml_ext.methods.sites import Site, SiteStats, SiteTransform, identity
from ggml_ext.methods.transforms.clip import with_best_clip
from ggml_ext.methods.transforms.request import TransformRequest


def solve(site: Site, stats: SiteStats, request: TransformRequest) -> SiteTransform:
    return with_best_clip(identity(site.n), site, stats, request)
