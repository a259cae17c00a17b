"""Transforms of every tiny family: the sites of its blocks, and files that are the same function.

The oracles: transformers' logits, and llama.cpp's of the float file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import models
import tiny_families as tiny
from ggml_ext.convert import convert
from ggml_ext.gguf.source import open_gguf
from ggml_ext.methods import transforms
from ggml_ext.methods.calibrate import run as calibrate
from ggml_ext.methods.calibrate.plan import Request
from ggml_ext.methods.model_sites import ModelSites
from ggml_ext.methods.sites import Site, SiteStats, SiteTransform
from ggml_ext.methods.transforms import TransformRequest
from ggml_ext.observe.reader import Observation
from ggml_ext.recipes import Method

every_family = pytest.mark.parametrize("family", tiny.CONFIGS)
MIXTURES = ("mixtral", "qwen3_moe")
GROUPS = tiny.HEADS // tiny.KV_HEADS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.getbasetemp()
    tiny.family_ggufs(folder, list(tiny.CONFIGS))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(models.TEXT * 3)
    return path


@every_family
def test_logits_of_transformers_and_llama_cpp_agree(base: Path, family: str) -> None:
    """Fails if a tiny model is not the same function on both sides, which comparisons with transformers
    assume."""
    ours = tiny.hf_logits(tiny.family_dir(base, family), tiny.prompt())
    theirs = tiny.llama_logits(tiny.family_gguf(base, family), tiny.prompt())
    tiny.assert_same_logits(ours, theirs)


def invertible(n: int, random: torch.Generator) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64) + 0.3 * torch.randn(
        n, n, generator=random, dtype=torch.float64
    ) / float(n**0.5)


def any_transform(site: Site, _stats: SiteStats, _request: TransformRequest) -> SiteTransform:
    """Every part that a site can have, at random: one that is left out, inverted or misplaced shows."""
    random = torch.Generator().manual_seed(sum(map(ord, site.anchor)))
    diag = (2 * torch.rand(site.n, generator=random, dtype=torch.float64) - 1).exp()
    head = None
    if site.head_dim:
        heads = diag.view(site.n_head_kv, -1, site.head_dim)
        heads[:] = heads[:, :1].clone()
        head = invertible(site.head_dim, random)
    right = 16
    return SiteTransform(
        diag, head=head, left=invertible(site.n // right, random), right=invertible(right, random)
    )


@every_family
def test_a_transformed_file_is_the_same_function(
    base: Path, family: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of f32: transforms are exact. Fails if an offline part goes to the wrong tensor, rows or bias, misses
    the router, or llama.cpp does the online part elsewhere."""
    monkeypatch.setattr(transforms, "solve", any_transform)
    source = tiny.family_gguf(base, family)
    request = Request(
        source, text, Method("f32", "flatquant", "rtn", samples=2), keep=["."], ctx=16, threads=1
    )
    folder, out = tmp_path / "c", tmp_path / "m.gguf"
    calibrate.calibrate(request, folder, warn=lambda _line: None)
    convert(source, out, calibrated=folder, threads=1)
    before, after = (tiny.llama_logits(path, tiny.prompt()) for path in (source, out))
    assert not np.array_equal(before, after)
    tiny.assert_same_logits(before, after)

    opened = open_gguf(source)
    factors = {tensor.name for tensor in open_gguf(out).tensors} - {tensor.name for tensor in opened.tensors}
    model = ModelSites(opened, Observation(folder / "observation").table, {})
    assert not model.remarks("flatquant")
    anchors = []
    for index in range(opened.n_blocks):
        sites = model.block(index)
        assert all(site.online and site.fold for site in sites.values())
        attention = sites[f"blk.{index}.attn_output"]
        assert attention.n_head // attention.n_head_kv == GROUPS
        assert attention.mixes_heads
        anchors += [site.anchor for site in sites.values()]
    assert factors == {f"{anchor}.{part}" for anchor in anchors for part in ("fq_l", "fq_r")}
