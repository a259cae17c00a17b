"""What an observation says, against llama-imatrix, transformers and sums in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

import models
import tiny_families as tiny
from eval_models import make_model, text_of
from ggml_ext.gguf import imatrix
from ggml_ext.gguf.source import open_gguf
from ggml_ext.observe import prepare
from ggml_ext.observe.layout import DIAGONAL, MOMENT, OWN_MOMENTS, block_floats, panels
from ggml_ext.observe.observer import LARGEST_TOKEN, Observer
from ggml_ext.observe.prepare import Request
from ggml_ext.observe.reader import Observation
from ggml_ext.observe.run import observe
from ggml_ext.observe.sites import Site
from ggml_ext.runtime import tools
from ggml_ext.runtime.llama import Model
from observed import tempered

Doubles = NDArray[np.float64]
CTX = 32


def quiet(request: Request, folder: Path) -> Observation:
    observe(request, folder, warn=lambda _line: None)
    return Observation(folder)


@contextmanager
def batches_of(tokens: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "BATCH_TOKENS", tokens)
        yield


def assert_moment(found: NDArray[np.float32], expected: Doubles, bound: float) -> None:
    """Each entry within ``bound`` of sqrt(H_ii H_jj)."""
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    assert found.shape == expected.shape
    worst = float(((np.abs(found - expected) - 1e-12) / np.maximum(scale, 1e-30)).max())
    assert worst <= bound


# llama-imatrix


@pytest.mark.parametrize("experts", [0, 4])
def test_importances_are_llama_imatrixs(tmp_path: Path, experts: int) -> None:
    """Fails if tokens are missed or counted twice, in the last block above all, or experts mixed up."""
    model = make_model(tmp_path / "m.gguf", kind=Type.F32, blocks=2, experts=experts)
    text = tmp_path / "text"
    text.write_text(text_of(160))
    with Model(model, weights=False) as loaded:
        tokens = loaded.tokenize(text.read_bytes().removesuffix(b"\n"))
    assert len(tokens) > 5 * CTX
    with batches_of(3 * CTX):
        seen = quiet(Request(model, text, ctx=CTX, threads=1, importances=True), tmp_path / "o")
    out = tmp_path / "i.gguf"
    command = [
        tools.find("llama-imatrix"),
        "-m",
        model,
        "-f",
        text,
        "-o",
        out,
        "-c",
        str(CTX),
        "-b",
        str(CTX),
    ]
    command += ["-t", "1", "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
    subprocess.run(command, check=True, capture_output=True, env=tools.environment())
    theirs = imatrix.load(out)
    assert theirs.chunks == seen.description.windows == len(tokens) // CTX
    assert len(theirs.entries) == 2 * (8 if experts else 7)
    for name, expected in theirs.entries.items():
        found = seen.importance(name)
        assert found is not None
        means, rows = found
        assert means.shape == (experts if name.endswith("_exps.weight") else 1, expected.size // len(means))
        assert rows.sum() == theirs.chunks * CTX * (2 if len(rows) > 1 else 1)
        np.testing.assert_allclose(means.reshape(-1), expected, rtol=2e-5)
    assert seen.importance("output_norm.weight") is None
    assert seen.importance("output.weight") is not None


# transformers


def loaded_by_transformers(folder: Path) -> Any:
    eager = folder.name.startswith("gemma2")  # only so are scores capped
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager" if eager else "sdpa"
    )


@torch.no_grad()
def activations(model: Any, windows: NDArray[np.int32]) -> dict[str, Doubles]:
    """GGUF tensor -> what transformers' matrix reads, [tokens, n]."""
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.k_proj": "attn_k",
        "self_attn.o_proj": "attn_output",
        "mlp.up_proj": "ffn_up",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.gate_proj": "ffn_gate",
        "mlp.down_proj": "ffn_down",
        "mlp.gate": "ffn_gate_inp",
    }
    seen: dict[str, Doubles] = {}

    def keep(name: str, x: Tensor) -> None:
        seen[name] = x.reshape(-1, x.shape[-1]).double().numpy()

    for index, layer in enumerate(model.model.layers):
        for module, tensor in names.items():
            try:
                found = layer.get_submodule(module)
            except AttributeError:
                continue
            name = f"blk.{index}.{tensor}.weight"
            found.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
    model(torch.from_numpy(windows).long())
    return seen


FAMILIES = {"llama": 6, "mistral": 6, "qwen2": 6, "qwen3": 6, "phi3": 4, "mixtral": 4, "qwen3_moe": 4}
FAMILIES |= {"gemma2": 6, "gemma3": 6}
"""Family -> matrices of a block that are looked at."""

MIXTURES = ("mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.getbasetemp()
    tiny.family_ggufs(folder, list(FAMILIES))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(models.TEXT * 12)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_transformers_activations(
    base: Path, text: Path, tmp_path: Path, family: str
) -> None:
    """In every block. Fails if a site is of another activation, misses tokens, or sums them wrongly."""
    request = Request(tiny.family_gguf(base, family), text, samples=10, ctx=CTX, threads=1)
    batch = 4 * CTX
    with batches_of(batch):
        tokens = prepare.prepare(request, request.source, text.read_bytes(), lambda _line: None).tokens
        seen = quiet(request, tmp_path / "o")
    model = loaded_by_transformers(tiny.family_dir(base, family))
    expected = activations(model, tokens)
    assert len(expected) == len(model.model.layers) * FAMILIES[family]
    bound = {"gemma2": 1e-3, "gemma3": 2e-3}.get(family, 1e-4)  # llama.cpp looks GELU up in a table of f16
    for name, x in expected.items():
        site = seen.site_of(name)
        assert site is not None
        assert (seen.rows(site), seen.n_tokens) == (len(x), tokens.size)
        rows = np.concatenate([tempered(x[i : i + batch]) for i in range(0, len(x), batch)])
        assert_moment(seen.moment(site), rows.T @ rows / len(rows), bound)
        scale = np.abs(rows).max()
        np.testing.assert_allclose(seen.absmax(site), np.abs(rows).max(0), atol=bound * scale)
        np.testing.assert_allclose(seen.sample(site), rows, atol=bound * scale)


def routed(layer: Any, tokens: Tensor) -> dict[str, list[Tensor]]:
    """What each expert of a transformers mixture reads, and its intermediates, from the fused parameters."""
    experts, choice = layer.mlp.experts, layer.mlp.gate(tokens)[2]
    found: dict[str, list[Tensor]] = {"ffn_up_exps": [], "ffn_down_exps": []}
    for expert, gate_up in enumerate(experts.gate_up_proj):
        x = tokens[(choice == expert).any(1)]
        gate, up = (x @ gate_up.T).chunk(2, dim=-1)
        found["ffn_up_exps"].append(x)
        found["ffn_down_exps"].append(experts.act_fn(gate) * up)
    return found


@pytest.mark.parametrize("family", MIXTURES)
@torch.no_grad()
def test_experts_figures_are_those_of_transformers_experts(
    base: Path, text: Path, tmp_path: Path, family: str
) -> None:
    """Fails if experts are mixed up, or tokens reach another one."""
    request = Request(tiny.family_gguf(base, family), text, samples=10, ctx=CTX, threads=1)
    tokens = prepare.prepare(request, request.source, text.read_bytes(), lambda _line: None).tokens
    seen = quiet(request, tmp_path / "o")
    model = loaded_by_transformers(tiny.family_dir(base, family))
    layer, read = model.model.layers[0], activations(model, tokens)["blk.0.ffn_gate_inp.weight"]
    for name, parts in routed(layer, torch.from_numpy(read).float()).items():
        site = seen.site_of(f"blk.0.{name}.weight")
        assert site is not None
        assert seen.expert_rows(site).tolist() == [len(x) for x in parts]
        for x, diagonal in zip(parts, seen.expert_diagonals(site), strict=True):
            np.testing.assert_allclose(diagonal, x.square().mean(0), rtol=2e-3, atol=1e-6)


def test_massive_tokens_are_scaled_down(tmp_path: Path) -> None:
    """As in real Llamas a window's first token, which would be all that a moment shows."""
    model = make_model(tmp_path / "m.gguf", kind=Type.F32)
    weights = {
        tensor.name: np.memmap(model, "<f4", "r+", tensor.offset, tensor.dims[::-1])
        for tensor in open_gguf(model).tensors
    }
    embedding, gain = weights["token_embd.weight"], weights["blk.0.attn_norm.weight"]
    embedding[:, 7] = 0.01
    embedding[1] = np.arange(embedding.shape[1]) == 7  # BOS
    gain[7] = 100
    for array in (embedding, gain):
        array.flush()
    (tmp_path / "text").write_text(text_of(200))
    request = Request(model, tmp_path / "text", samples=4, ctx=CTX, threads=1)
    tokens = prepare.prepare(request, model, (tmp_path / "text").read_bytes(), lambda _line: None).tokens
    seen = quiet(request, tmp_path / "o")
    x = embedding[tokens.reshape(-1)].astype(np.float64)
    x *= gain / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5)
    expected = tempered(x)
    power = (expected * expected).sum(1)
    assert power.max() == pytest.approx(LARGEST_TOKEN * np.sort(power)[(len(power) - 1) // 2])
    assert (x * x).sum(1).max() > 10 * power.max()
    site = seen.site_of("blk.0.attn_q.weight")
    assert site is not None
    assert_moment(seen.moment(site), expected.T @ expected / len(x), 1e-5)
    np.testing.assert_allclose(seen.absmax(site), np.abs(expected).max(0), rtol=1e-5)
    np.testing.assert_allclose(seen.sample(site), expected, rtol=1e-4, atol=1e-5)


# Sums that have to agree with each other


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Observation:
    """Of four experts, two of them active, with more tokens than an expert's moment needs."""
    folder = tmp_path_factory.mktemp("mixture")
    model = make_model(folder / "m.gguf", kind=Type.F32, blocks=2, experts=4)
    (folder / "text").write_text(text_of(1600))
    request = Request(model, folder / "text", samples=72, ctx=CTX, threads=1)
    with batches_of(16 * CTX):
        return quiet(request, folder / "o")


def test_experts_share_the_rows(mixture: Observation) -> None:
    """Every token has two experts: their sums are those of all rows of the intermediates, and twice those of
    the tokens before."""
    for name, times in (("ffn_down_exps", 1), ("ffn_up_exps", 2)):
        site = mixture.site_of(f"blk.1.{name}.weight")
        assert site is not None
        assert site.experts == 4
        assert mixture.has_expert_moments(site)
        rows = mixture.expert_rows(site)
        assert rows.sum() == 2 * mixture.n_tokens == times * mixture.rows(site)
        moments = np.stack([mixture.expert_moment(site, expert) for expert in range(4)]).astype(np.float64)
        together = (rows[:, None, None] * moments).sum(0) / times / mixture.rows(site)
        if times == 1:
            assert_moment(mixture.moment(site), together, 1e-5)
        else:  # not the same tokens twice, but the same number of them
            assert np.abs(together.trace() / mixture.moment(site).trace() - 1) < 1e-5
        diagonals = np.stack([moment.diagonal() for moment in moments])
        np.testing.assert_allclose(mixture.expert_diagonals(site), diagonals, rtol=1e-5)


def test_a_router_reads_all_tokens(mixture: Observation) -> None:
    site = mixture.site_of("blk.0.ffn_gate_inp.weight")
    assert site is not None
    router = mixture.importance("blk.0.ffn_gate_inp.weight")
    experts = mixture.importance("blk.0.ffn_up_exps.weight")
    assert router is not None
    assert experts is not None
    assert (router[0].shape, experts[0].shape) == ((1, site.n), (4, site.n))
    np.testing.assert_array_equal(router[0][0], mixture.moment(site).diagonal())


def test_samples_of_a_mixture_are_of_every_slot(mixture: Observation) -> None:
    """A stride of a power of two would keep each token's first expert only."""
    site = mixture.site_of("blk.0.ffn_down_exps.weight")
    assert site is not None
    x = mixture.sample(site)
    assert x.shape[0] == -(-2 * mixture.n_tokens // 5)
    assert 2 * mixture.n_tokens / 4 > 1024  # so a stride of 4 would not do
    assert np.abs((x**2).mean(0) / mixture.diagonal(site) - 1).mean() < 0.2


@pytest.mark.parametrize("n", [1, 255, 256, 257, 576, 1000])
def test_panels_hold_a_moment_once(n: int) -> None:
    assert sum(rows for _, rows in panels(n)) == n
    for experts in (0, 3):
        for moments in (DIAGONAL, MOMENT, OWN_MOMENTS):
            site = Site("a", n, experts, (), (), 1)
            with Observer(1) as observer:
                assert block_floats(site, moments) == observer.size(n, experts, moments)


def test_special_tokens(tmp_path: Path) -> None:
    """With parse_special the spelling of a control token is that token."""
    model = make_model(tmp_path / "m.gguf", kind=Type.F32)
    text = tmp_path / "chat"
    text.write_text("the cat</s>" * 60)
    request = Request(model, text, samples=3, ctx=CTX, threads=1)

    def tokens(request: Request) -> NDArray[np.int32]:
        return prepare.prepare(request, model, text.read_bytes(), lambda _line: None).tokens

    assert (tokens(request) == 2).sum() == 0
    assert (tokens(replace(request, parse_special=True)) == 2).sum() > 3


def test_whole_windows_stay_apart(tmp_path: Path) -> None:
    """Fails if windows of one batch see each other: any batch size gives the same moments."""
    model = make_model(tmp_path / "m.gguf", kind=Type.F32, blocks=2)
    (tmp_path / "text").write_text(text_of(400))
    request = Request(model, tmp_path / "text", samples=12, ctx=CTX, threads=1)
    found: list[Any] = []
    for tokens in (CTX, 5 * CTX, 4096):
        with batches_of(tokens):
            found.append(quiet(request, tmp_path / f"o{tokens}"))
    assert [seen.description.batch for seen in found] == [CTX, 5 * CTX, 12 * CTX]
    for site in found[0].table.sites:
        expected = found[0].moment(site).astype(np.float64)
        for seen in found[1:]:
            assert_moment(seen.moment(site), expected, 1e-5)


_REMOTE = """
import sys
from logits import use_rpc_server
from ggml_ext.runtime import llama
from ggml_ext.core import paths
from ggml_ext.cli.entry import main
llama.bindings()
use_rpc_server(str(paths.lib_dir()), sys.argv.pop(1))
main()
"""


def test_a_remote_backend_gives_the_same_moments(tmp_path: Path, rpc_server: str) -> None:
    """Fails if activations on another device are read before they are there, or not copied."""
    model = make_model(tmp_path / "m.gguf", kind=Type.F32, blocks=2, experts=4)
    (tmp_path / "text").write_text(text_of(400))
    local = quiet(Request(model, tmp_path / "text", samples=8, ctx=CTX, threads=1), tmp_path / "local")
    command = [sys.executable, "-c", _REMOTE, rpc_server, "observe", model, "-o", tmp_path / "remote"]
    command += ["--calibration", tmp_path / "text", "--samples", "8", "--ctx", str(CTX), "-t", "1"]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[1])
    remote = Observation(tmp_path / "remote")
    assert remote.table == local.table
    for site in local.table.sites:
        assert_moment(remote.moment(site), local.moment(site).astype(np.float64), 1e-5)
        np.testing.assert_allclose(remote.expert_diagonals(site), local.expert_diagonals(site), rtol=1e-5)
