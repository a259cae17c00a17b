"""The proof of a conversion's structure holds for what the observer finds, and fails where that is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest

import fold_files as folds
import transform_files as files
from arch_models import ArchModel
from ggml_ext.convert import convert
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.registry import TRANSFORMS
from ggml_ext.gguf.source import open_gguf
from ggml_ext.methods.calibrate.proof import powers, prove, written
from ggml_ext.methods.model_sites import ModelSites
from ggml_ext.methods.sites import Fold, Site
from ggml_ext.observe.observer import Observer
from ggml_ext.observe.sites import Table
from ggml_ext.runtime.llama import Model

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
    """Wrong about the sites of some matrices. ``reader``: their names, a regular expression."""

    reader: str
    change: Change

    @classmethod
    def of(cls, path: Path, reader: str, change: Change) -> Mutant:
        found = sites_of(path)
        mutant = cls(found.source, found.table, found.types)
        object.__setattr__(mutant, "reader", reader)
        object.__setattr__(mutant, "change", change)
        return mutant

    def block(self, index: int) -> dict[str, Site]:
        sites = super().block(index)
        assert any(map(self._meant, sites.values()))
        return {anchor: self._changed(site) for anchor, site in sites.items()}

    def _changed(self, site: Site) -> Site:
        return self.change(site) if self._meant(site) else site

    def _meant(self, site: Site) -> bool:
        return any(re.search(rf"\.({self.reader})\.weight", linear.tensor) for linear in site.linears)


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
    "kimi-linear-moe",  # linear attention
    "mamba2-dense",  # state space alone
    "grok-moe",  # dense and expert matrices in one block
]


@pytest.mark.parametrize("name", PROVEN)
def test_what_the_graph_allows_changes_nothing(
    name: str, architectures: dict[str, ArchModel], tmp_path: Path
) -> None:
    model = sites_of(architectures[name].path)
    prove(model, tmp_path, "flatquant", threads=1)
    prove(model, tmp_path, "folded", threads=1)


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
    prove(sites_of(path), tmp_path, "flatquant", threads=1)


def two_heads(path: Path, out: Path) -> Path:
    """A DeepSeek 2 whose latent attention has twice its one head, with weights of its own."""
    model, random = files.read(path), np.random.default_rng(1)
    for name, array in model.tensors.items():
        shape = list(array.shape)
        if re.search(r"attn_[kv]_b\.", name):
            shape = [2, *shape[-2:]]
        elif ".attn_q_b." in name:
            shape[0] *= 2
        elif ".attn_output." in name:
            shape[-1] *= 2
        if shape != list(array.shape):
            model.tensors[name] = random.normal(0, 0.1, shape).astype(np.float32)
    reader = gguf.GGUFReader(model.write(out), "r+")
    count = reader.fields["deepseek2.attention.head_count"]
    count.parts[count.data[0]][0] = 2
    reader.data.flush()
    return out


def test_heads_that_matrices_of_a_stack_make(architectures: dict[str, ArchModel], tmp_path: Path) -> None:
    """The channels of latent attention: row after row, head after head."""
    model = sites_of(two_heads(architectures["deepseek2-moe"].path, tmp_path / "two.gguf"))
    site = model.block(1)["blk.1.attn_output"]
    assert site.fold is not None
    assert (site.fold.tensor, site.fold.n) == ("blk.1.attn_v_b.weight", site.n)
    assert len(model.read(site.fold.tensor)) == 2
    prove(model, tmp_path, "flatquant", threads=1)


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
    ("name", "reader", "change", "transform"),
    [
        ("llama-dense", "attn_q", lose_a_reader, "flatquant"),
        ("qwen3moe-moe", "ffn_up_exps", lose_a_reader, "flatquant"),
        ("afmoe-moe", "attn_output", mix_heads, "flatquant"),
        ("afmoe-moe", "attn_output", mix_heads, "folded"),
        (
            "minimax-01-moe",
            "attn_q|attn_qkv",
            fold_into("attn_norm"),
            "flatquant",
        ),  # the normed input is also the residual
        ("olmo-dense", "attn_output", fold_values, "flatquant"),
    ],
    ids=["reader", "expert", "heads", "folded heads", "residual", "clamp"],
)
def test_a_wrong_structure_fails(
    name: str,
    reader: str,
    change: Change,
    transform: str,
    architectures: dict[str, ArchModel],
    tmp_path: Path,
) -> None:
    with pytest.raises(GgmlExtError, match="should change nothing changes the logits by"):
        prove(Mutant.of(architectures[name].path, reader, change), tmp_path, transform, threads=1)


@pytest.mark.parametrize("name", ["qwen2moe-moe", "deepseek2-moe", "falcon-h1-dense", "command-r-dense"])
def test_adapters_of_every_matrix_fit(name: str, architectures: dict[str, ArchModel], tmp_path: Path) -> None:
    """Of shared experts, latent attention, state space layers, and two layers behind one norm: what reads a
    site and what makes it is found in the file's table."""
    model = architectures[name]
    sites = sites_of(model.path)
    folded = written(sites, tmp_path, partial(powers, parts=TRANSFORMS["flatquant"]), "flatquant", 1)
    readers = {r.tensor for site in sites.table.sites for r in site.readers if r.tensor.startswith("blk.")}
    shapes = {
        tensor.name: tensor.dims[::-1]
        for tensor in sites.source.tensors
        if tensor.name in readers and len(tensor.dims) > 1
    }
    adapter = folds.write_adapter(tmp_path / "a.gguf", shapes, architecture=model.arch)
    with folds.AdapterModel(model.path) as a, folds.AdapterModel(folded) as b:
        expected = a.log_probabilities([(adapter, 1.0)])
        assert folds.divergence(expected, b.log_probabilities([(adapter, 1.0)])) <= 1e-6
        assert folds.divergence(expected, a.log_probabilities()) > 1e-3, "the adapter hardly acts"
