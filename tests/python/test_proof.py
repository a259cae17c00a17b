"""The proof of a conversion's structure holds for what the observer finds, and fails where that is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from arch_models import ArchModel
from ggml_ext.convert import convert
from ggml_ext.errors import GgmlExtError
from ggml_ext.llama import Model
from ggml_ext.model_sites import ModelSites
from ggml_ext.observe.observer import Observer
from ggml_ext.observe.sites import Table
from ggml_ext.proof import prove
from ggml_ext.sites import Fold, Site
from ggml_ext.source import open_gguf

Change = Callable[[Site], Site]


def table_of(path: Path) -> Table:
    with Observer(1) as observer, Model(path, weights=False) as model:
        observer.start(model, ctx=64, n_seq=1)
        return observer.table()


def sites_of(path: Path) -> ModelSites:
    """With all matrices of blocks to be rounded, routers apart."""
    source = open_gguf(path)
    rounded = re.compile(r"blk\.\d+\.(?!ffn_gate_inp).*\.weight")
    types = {
        tensor.name: "q4_0" if rounded.fullmatch(tensor.name) and len(tensor.dims) > 1 else "f32"
        for tensor in source.tensors
    }
    return ModelSites(source, table_of(path), types)


class Mutant(ModelSites):
    """Wrong about the sites of one kind."""

    kind: str
    change: Change

    @classmethod
    def of(cls, path: Path, kind: str, change: Change) -> Mutant:
        found = sites_of(path)
        mutant = cls(found.source, found.table, found.types)
        object.__setattr__(mutant, "kind", kind)
        object.__setattr__(mutant, "change", change)
        return mutant

    def block(self, index: int) -> dict[str, Site]:
        sites = super().block(index)
        assert any(site.kind == self.kind for site in sites.values())
        return {anchor: self._changed(site) for anchor, site in sites.items()}

    def _changed(self, site: Site) -> Site:
        return self.change(site) if site.kind == self.kind else site


PROVEN = [
    "llama-dense",
    "qwen2-dense",  # biases
    "bloom-dense",  # q, k and v in one matrix, no gate
    "phi3-dense",  # gate and up in one
    "qwen2moe-moe",  # shared experts
    "afmoe-moe",  # a gate behind attention
    "dbrx-moe",  # a clamp
    "command-r-dense",  # attention and FFN side by side
    "olmo2-dense",  # no norm in front
    "falcon-h1-dense",  # state space beside attention
    "hrm_text-dense",  # loops
    "deepseek2-moe",  # latent attention
    "gemma4-moe",
    "qwen35moe-moe",
]


@pytest.mark.parametrize("name", PROVEN)
def test_what_the_graph_allows_changes_nothing(
    name: str, architectures: dict[str, ArchModel], tmp_path: Path
) -> None:
    model = sites_of(architectures[name].path)
    prove(model, tmp_path, online=True, threads=1)
    prove(model, tmp_path, online=False, threads=1)


def test_half_precision_weights_near_its_smallest(
    architectures: dict[str, ArchModel], tmp_path: Path
) -> None:
    """A factor of a half loses bits of f16 weights below 6e-5 and would look like a wrong structure."""
    path = tmp_path / "f16.gguf"
    convert(architectures["llama-dense"].path, path, type_name="f16")
    for tensor in open_gguf(path).tensors:
        if tensor.name.endswith("ffn_up.weight"):
            n = tensor.n_bytes // 2
            np.memmap(path, np.float16, "r+", tensor.offset, (n,))[:] *= np.float16(2**-12)
    prove(sites_of(path), tmp_path, online=True, threads=1)


def lose_a_reader(site: Site) -> Site:
    return replace(site, linears=site.linears[:-1])


def mix_heads(site: Site) -> Site:
    assert not site.mixes_heads  # a gate acts on each channel
    return replace(site, mixes_heads=True)


def fold_into(tensor: str) -> Change:
    """Folds where the observer says that nothing can be folded."""

    def change(site: Site) -> Site:
        assert site.fold is None
        block = site.anchor.rpartition(".")[0]
        return replace(site, fold=Fold(f"{block}.{tensor}.weight", rows=False, n=site.n))

    return change


def fold_values(site: Site) -> Site:
    """Into v, past the clamp that stands behind it."""
    assert site.fold is None
    block = site.anchor.rpartition(".")[0]
    fold = Fold(f"{block}.attn_v.weight", rows=True, first=0, n=site.n)
    return replace(site, fold=fold, n_head=2, n_head_kv=2, head_dim=site.n // 2)


@pytest.mark.parametrize(
    ("name", "kind", "change"),
    [
        ("llama-dense", "attn_in", lose_a_reader),
        ("qwen3moe-moe", "ffn_in", lose_a_reader),
        ("afmoe-moe", "attn_out", mix_heads),
        ("minimax-01-moe", "attn_in", fold_into("attn_norm")),  # the normed input is also the residual
        ("olmo-dense", "attn_out", fold_values),
    ],
    ids=["reader", "expert", "heads", "residual", "clamp"],
)
def test_a_wrong_structure_fails(
    name: str, kind: str, change: Change, architectures: dict[str, ArchModel], tmp_path: Path
) -> None:
    with pytest.raises(GgmlExtError, match="should change nothing changes the logits by"):
        prove(Mutant.of(architectures[name].path, kind, change), tmp_path, online=True, threads=1)
