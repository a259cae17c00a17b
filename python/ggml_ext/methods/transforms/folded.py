"""What of FlatQuant can be folded: a learned diagonal and, behind attention, a learned matrix over the
channels of a value head. Nothing is left to do at run time, so the file is an ordinary one."""

from __future__ import annotations

from dataclasses import replace

from ggml_ext.methods.sites import Site, SiteStats, SiteTransform, identity
from ggml_ext.methods.transforms import flatquant
from ggml_ext.methods.transforms.clip import with_best_clip
from ggml_ext.methods.transforms.request import TransformRequest


def solve(site: Site, stats: SiteStats, request: TransformRequest) -> SiteTransform:
    """flatquant's search without online factors; the identity where nothing can be folded. notes:
    flatquant's."""
    if site.fold is None:
        return with_best_clip(identity(site.n), site, stats, request)
    return flatquant.solve(replace(site, online=False), stats, request)
