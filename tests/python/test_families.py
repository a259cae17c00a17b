"""Hugging Face folders as streams of blocks (families.py, blocks.py and their parts), for every family.

The oracles: llama.cpp's logits, transformers' own forward pass with hooks, the weights in the GGUF file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

import models
import tiny_families as tiny
from ggml_ext import hf
from ggml_ext.blocks import Block, BlockModel
from ggml_ext.errors import GgmlExtError
from ggml_ext.experts import RoutedExperts
from ggml_ext.families import FAMILIES, check_block
from ggml_ext.llama import Model
from ggml_ext.moments import MAX_EXPERT_BYTES, Moments, Sample
from ggml_ext.plan import plan
from ggml_ext.row_order import RowMatcher
from ggml_ext.sites import SITE_KINDS, Site, SiteKind
from ggml_ext.skeleton import open_skeleton
from ggml_ext.source import Source, open_gguf

every_family = pytest.mark.parametrize("family", tiny.CONFIGS)
MIXTURES = ("mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.getbasetemp()
    tiny.family_ggufs(folder, list(tiny.CONFIGS))
    return folder


def block_model(base: Path, family: str, **more: Any) -> BlockModel:
    return BlockModel(tiny.family_dir(base, family), gguf=open_gguf(tiny.family_gguf(base, family)), **more)


def hf_decoder(base: Path, family: str) -> Any:
    """transformers' text decoder with the attention that blocks use."""
    implementation = "eager" if family == "gemma2" else "sdpa"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny.family_dir(base, family), dtype=torch.float32, attn_implementation=implementation
    )
    return getattr(model.model, "language_model", model.model)


def prompts() -> Tensor:
    """Token ids [2, 48]."""
    return torch.from_numpy(np.stack([tiny.prompt(), tiny.prompt()[::-1]])).long()


def block_input(model: BlockModel) -> tuple[Block, Tensor]:
    """Block 0 and hidden states for it."""
    return model.load(0), model.embed(prompts())


def matrices(block: Block) -> dict[str, Tensor]:
    return {linear.tensor: linear.weight for site in block.sites.values() for linear in site.linears}


@every_family
def test_logits_of_transformers_and_llama_cpp_agree(base: Path, family: str) -> None:
    """Fails if a tiny model is not the same function on both sides, which every later comparison assumes."""
    ours = tiny.hf_logits(tiny.family_dir(base, family), tiny.prompt())
    theirs = tiny.llama_logits(tiny.family_gguf(base, family), tiny.prompt())
    tiny.assert_same_logits(ours, theirs)


@every_family
def test_blocks_in_sequence_are_the_model(base: Path, family: str) -> None:
    """Fails if embeddings, masks, rotary embeddings or a block's weights are not what transformers uses."""
    expected: list[Tensor] = []
    reference = hf_decoder(base, family)
    reference.norm.register_forward_pre_hook(lambda _, args: expected.append(args[0]))
    with torch.no_grad():
        expected[:0] = reference(prompts(), output_hidden_states=True).hidden_states[:-1]
    model = block_model(base, family)
    hidden = model.embed(prompts())
    for index in range(model.n_blocks):
        torch.testing.assert_close(hidden, expected[index], rtol=1e-5, atol=1e-5)
        hidden = model.load(index).run(hidden)
    torch.testing.assert_close(hidden, expected[-1], rtol=1e-5, atol=1e-5)


@every_family
def test_same_weights_and_inputs_give_the_same_bits(base: Path, family: str) -> None:
    """Halved matrices that read doubled inputs change no bit: fails if a matrix of a site is not replaced, or
    its input is mapped never or twice, or the router of a mixture reads the mapped input."""
    block, hidden = block_input(block_model(base, family))
    expected = block.run(hidden)
    weights = matrices(block)
    assert torch.equal(block.run(hidden, weights=weights), expected)
    inputs: dict[SiteKind, Callable[[Tensor], Tensor]] = {kind: lambda x: 2 * x for kind in SITE_KINDS}
    halved = {name: weight / 2 for name, weight in weights.items()}
    assert torch.equal(block.run(hidden, weights=halved, inputs=inputs), expected)
    assert not torch.equal(block.run(hidden, inputs=inputs), expected)
    assert torch.equal(block.run(hidden), expected)


@every_family
def test_run_is_differentiable(base: Path, family: str) -> None:
    """Fails if training would not reach a matrix, a site's transform or the hidden states."""
    block, hidden = block_input(block_model(base, family))
    weights = {name: weight.clone().requires_grad_() for name, weight in matrices(block).items()}
    scales = {kind: torch.ones(site.n, requires_grad=True) for kind, site in block.sites.items()}
    inputs: dict[SiteKind, Callable[[Tensor], Tensor]] = {
        kind: lambda x, kind=kind: x * scales[kind] for kind in SITE_KINDS
    }
    hidden = hidden.clone().requires_grad_()
    block.run(hidden, weights=weights, inputs=inputs).square().mean().backward()
    for name, tensor in {**weights, **scales, "hidden": hidden}.items():
        assert tensor.grad is not None, name
        assert tensor.grad.abs().max() > 0, name
    # The gradient along a scaling of all of a site's channels is that along one of its matrices.
    for kind, site in block.sites.items():
        along = sum((weights[linear.tensor].grad * linear.weight).sum() for linear in site.linears)
        torch.testing.assert_close(scales[kind].grad.sum(), along, rtol=1e-3, atol=1e-5)


@contextmanager
def site_inputs(layer: Any, sites: dict[SiteKind, str]) -> Iterator[dict[SiteKind, list[Tensor]]]:
    """What the named modules of a transformers layer are called with."""
    seen: dict[SiteKind, list[Tensor]] = {kind: [] for kind in sites}
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kind=kind: seen[kind].append(args[0].flatten(0, -2))
        )
        for kind, name in sites.items()
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def routed_intermediates(layer: Any, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Per expert of a transformers mixture: its tokens and its intermediates, from the fused parameters."""
    experts = layer.mlp.experts
    choice = layer.mlp.gate(tokens)[2]
    inputs, middles = [], []
    for expert, (gate_up, _) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        x = tokens[(choice == expert).any(1)]
        gate, up = (x @ gate_up.T).chunk(2, dim=-1)
        inputs.append(x)
        middles.append(experts.act_fn(gate) * up)
    return inputs, middles


@every_family
@torch.no_grad()
def test_statistics_are_those_of_the_activations(base: Path, family: str) -> None:
    """Against transformers' own forward pass. Fails if a site's statistics are of another activation, miss
    tokens, or mix up experts."""
    reference = hf_decoder(base, family)
    layer = reference.layers[0]
    points: dict[SiteKind, str] = {
        "attn_out": "self_attn.o_proj",
        "ffn_in": "mlp",
        "ffn_mid": "mlp.down_proj",
    }
    points["attn_in"] = "self_attn.qkv_proj" if family == "phi3" else "self_attn.q_proj"
    if family in MIXTURES:
        del points["ffn_mid"]
    with site_inputs(layer, points) as seen:
        reference(prompts())
    model = block_model(base, family)
    block = model.load(0)
    outputs: list[Tensor] = []
    batches = model.embed(prompts()).split(1)
    stats = block.collect(batches, outputs.append)
    expected = {kind: torch.cat(tensors) for kind, tensors in seen.items()}
    experts: dict[SiteKind, list[Tensor]] = {}
    if family in MIXTURES:
        experts["ffn_in"], experts["ffn_mid"] = routed_intermediates(layer, expected["ffn_in"])
        expected["ffn_mid"] = torch.cat(experts["ffn_mid"])
    for kind, x in expected.items():
        assert stats[kind].n_tokens == len(x)
        torch.testing.assert_close(stats[kind].hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stats[kind].absmax, x.abs().amax(0), rtol=1e-4, atol=1e-5)
        assert stats[kind].sample.shape == x.shape
        assert (stats[kind].expert_hessian is not None) == (kind in experts)
    for kind, tokens in experts.items():
        counts, hessians = stats[kind].expert_tokens, stats[kind].expert_hessian
        assert counts is not None
        assert hessians is not None
        assert counts.tolist() == [len(x) for x in tokens]
        for x, hessian in zip(tokens, hessians, strict=True):
            torch.testing.assert_close(hessian, x.T @ x / max(len(x), 1), rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cat(outputs), torch.cat([block.run(batch) for batch in batches]))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_collecting_twice_gives_the_same_bits(base: Path, family: str) -> None:
    """Fails if something random or left over enters: calibration that is resumed must give the same file."""
    model = block_model(base, family)
    block, hidden = block_input(model)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, second = (block.collect([hidden], sample_tokens=20) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    for kind in SITE_KINDS:
        for name in ("hessian", "absmax", "sample"):
            assert torch.equal(getattr(first[kind], name), getattr(second[kind], name))


def gguf_tensors(source: Source) -> dict[str, np.memmap[Any, Any]]:
    """Writable views of a float32 file's tensors, numpy shape."""
    return {
        tensor.name: np.memmap(tensor.path, "<f4", "r+", tensor.offset, tensor.dims[::-1])
        for tensor in source.tensors
    }


@every_family
def test_rows_are_found_in_the_gguf_file(base: Path, family: str) -> None:
    """Fails if a row of a rounded matrix would land in another row's place, or a name is not the GGUF one."""
    model = block_model(base, family)
    tensors = gguf_tensors(open_gguf(tiny.family_gguf(base, family)))
    plain = BlockModel(tiny.family_dir(base, family))
    for index in range(model.n_blocks):
        without = plain.load(index)
        for kind, site in model.load(index).sites.items():
            assert site.anchor == site.linears[0].tensor.removesuffix(".weight")
            for linear, assumed in zip(site.linears, without.sites[kind].linears, strict=True):
                stored = tensors[linear.tensor]
                assert np.array_equal(stored, linear.weight[..., linear.gguf_rows, :].numpy())
                np.testing.assert_array_equal(assumed.gguf_rows, linear.gguf_rows)
                permuted = family in ("llama", "mistral", "mixtral") and linear.tensor.endswith(
                    ("attn_q.weight", "attn_k.weight")
                )
                identity = np.array_equal(linear.gguf_rows, np.arange(stored.shape[-2]))
                assert identity != permuted


def fold_into(tensors: dict[str, Any], site: Site, diag: np.ndarray[Any, Any]) -> None:
    """Divides the channels of a site by ``diag``, where its Fold says, and multiplies what reads them."""
    fold = site.fold
    assert fold is not None
    if not fold.rows:
        tensors[fold.tensor][:] /= diag
    else:
        # attn_out: the heads of a group read the same rows of v, and get one diag
        rows = diag if fold.n == site.n else diag.reshape(site.n_head_kv, -1, site.head_dim)[:, 0].ravel()
        tensors[fold.tensor][..., fold.first : fold.first + fold.n, :] /= rows[:, None]
        if fold.bias:
            tensors[fold.bias][fold.first : fold.first + fold.n] /= rows
    for name in (*(linear.tensor for linear in site.linears), *site.also):
        tensors[name][:] *= diag


@every_family
def test_folds_change_no_logit(base: Path, family: str, tmp_path: Path) -> None:
    """Fails if the offline part of a transform goes to the wrong tensor, rows, bias, or misses the router."""
    original = tiny.family_gguf(base, family)
    folded = tmp_path / "folded.gguf"
    shutil.copyfile(original, folded)
    tensors = gguf_tensors(open_gguf(folded))
    random = np.random.default_rng(5)
    model = BlockModel(tiny.family_dir(base, family))
    for index in range(model.n_blocks):
        for site in model.load(index).sites.values():
            diag = np.exp(random.uniform(-1, 1, site.n)).astype(np.float32)
            if site.kind == "attn_out":
                heads = diag.reshape(site.n_head_kv, -1, site.head_dim)
                heads[:] = heads[:, :1]
            fold_into(tensors, site, diag)
    for tensor in tensors.values():
        tensor.flush()
    before, after = (tiny.llama_logits(path, tiny.prompt()) for path in (original, folded))
    assert not np.array_equal(before, after)
    tiny.assert_same_logits(before, after)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "mixtral"])
@torch.no_grad()
def test_kv_moments_are_those_of_the_cache(base: Path, family: str) -> None:
    """Against transformers' KV cache. Fails if k is taken before RoPE or QK-norm, or has another order."""
    cache = hf_decoder(base, family)(prompts(), use_cache=True).past_key_values
    model = block_model(base, family)
    block, hidden = block_input(model)
    moments = block.kv_moments(hidden.split(1))
    keys, values = (states.flatten(0, 2) for states in (cache.layers[0].keys, cache.layers[0].values))
    if family in ("llama", "mixtral"):  # (half, pair) -> (pair, half)
        keys = keys.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
    torch.testing.assert_close(moments.k, keys.T @ keys / len(keys), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.v, values.T @ values / len(values), rtol=1e-4, atol=1e-5)
    assert moments.q.shape == moments.k.shape
    torch.testing.assert_close(block.run(hidden), block.run(hidden))  # attention is left as it was


@torch.no_grad()
def test_query_moments(base: Path) -> None:
    """With q_proj's heads set to k_proj's, queries are keys: fails if q is not treated as k is."""
    block, hidden = block_input(block_model(base, "llama"))
    layer = block._layer
    layer.self_attn.q_proj.weight = nn.Parameter(layer.self_attn.k_proj.weight.repeat(2, 1))
    moments = block.kv_moments([hidden])
    torch.testing.assert_close(moments.q, moments.k, rtol=1e-4, atol=1e-5)


def test_bfloat16_blocks_have_float32_statistics(base: Path) -> None:
    """Fails if bf16 arithmetic reaches the sums or the weights that are rounded."""
    exact, hidden = block_input(block_model(base, "llama"))
    block, _ = block_input(block_model(base, "llama", dtype=torch.bfloat16))
    outputs: list[Tensor] = []
    stats = block.collect([hidden], outputs.append)
    assert outputs[0].dtype == torch.bfloat16
    torch.testing.assert_close(outputs[0].float(), exact.run(hidden), rtol=0.1, atol=0.1)
    for kind, stat in exact.collect([hidden]).items():
        assert stats[kind].hessian.dtype == torch.float32
        assert (stats[kind].hessian - stat.hessian).norm() < 0.02 * stat.hessian.norm()
        assert torch.equal(block.sites[kind].linears[0].weight, exact.sites[kind].linears[0].weight)


def test_tokens_are_those_of_llama_cpp(base: Path) -> None:
    """Fails if calibration reads other tokens than evaluation does."""
    with Model(tiny.family_gguf(base, "llama"), weights=False) as loaded:
        expected = loaded.tokenize(models.TEXT.encode()).tolist()
    assert BlockModel(tiny.family_dir(base, "llama")).tokenize(models.TEXT) == expected


# Statistics


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=12), st.integers(1, 40))
def test_sample_is_evenly_spread(sizes: list[int], limit: int) -> None:
    """Fails if the sample depends on how tokens are batched, exceeds its limit or could be larger."""
    tokens = torch.arange(sum(sizes) + 1, dtype=torch.float32)[:, None]
    sample = Sample(limit)
    for part in tokens.split([1, *sizes]):
        sample.add(part)
    kept = sample.tokens()
    stride = 1 if len(kept) == 1 else int(kept[1, 0] - kept[0, 0])
    if len(kept) > 1:
        assert torch.equal(kept, tokens[::stride])
    assert len(kept) <= limit
    assert len(kept) == len(tokens) or len(tokens[:: max(stride // 2, 1)]) > limit


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    n=st.integers(1, 9),
    panel=st.integers(1, 10),
    seed=st.integers(0, 2**31),
)
def test_moments_against_numpy(sizes: list[int], n: int, panel: int, seed: int) -> None:
    """Fails if batches or panels change a mean, or tokens reach another expert."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ggml_ext.moments.PANEL", panel)
        check_moments(sizes, n, seed)


def bounded(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tokens of more than 64 times the lower median of |x|^2 in a batch are scaled down to that."""
    power = np.square(x).sum(1)
    limit = 64 * np.sort(power)[(len(x) - 1) // 2] if len(x) else 0.0
    large = (power > limit) & (limit > 0)
    return np.where(large[:, None], x * np.sqrt(limit / np.where(large, power, 1))[:, None], x)


def check_moments(sizes: list[int], n: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = random.standard_normal((sum(sizes), n), np.float32)
    expert = random.integers(0, 3, len(x))
    moments = Moments(n, 100, torch.device("cpu"), experts=3)
    choices = np.split(expert, np.cumsum(sizes)[:-1])
    for part, choice in zip(torch.from_numpy(x).split(sizes), choices, strict=True):
        moments.add(part)
        for i in range(3):
            moments.add_routed(part[torch.from_numpy(choice == i)], i)
    stats = moments.finish()
    batches = np.split(x.astype(np.float64), np.cumsum(sizes)[:-1])
    exact = np.concatenate([bounded(batch) for batch in batches])
    np.testing.assert_allclose(stats.hessian, exact.T @ exact / len(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats.absmax, np.abs(exact).max(0), rtol=1e-6)
    assert stats.expert_hessian is not None
    for i in range(3):
        parts = [bounded(batch[choice == i]) for batch, choice in zip(batches, choices, strict=True)]
        mine = np.concatenate(parts)
        expected = mine.T @ mine / max(len(mine), 1)
        np.testing.assert_allclose(stats.expert_hessian[i], expected, rtol=1e-4, atol=1e-5)


def test_large_expert_statistics_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a mixture with many wide experts would exhaust memory."""
    assert MAX_EXPERT_BYTES == 2**31
    monkeypatch.setattr("ggml_ext.moments.MAX_EXPERT_BYTES", 4 * 8 * 8 * 4 - 1)
    moments = Moments(8, 4, torch.device("cpu"), experts=4)
    moments.add(torch.ones(2, 8))
    moments.add_routed(torch.ones(2, 8), 1)
    stats = moments.finish()
    assert stats.expert_hessian is None
    assert stats.expert_tokens is not None
    assert stats.expert_tokens.tolist() == [0, 2, 0, 0]


# Row order


@settings(max_examples=30, deadline=None)
@given(n_out=st.integers(1, 12), n=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_shuffled_rows_are_found(
    n_out: int, n: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any order, with equal rows among them. Fails if rows are matched by anything but their bits."""
    random = np.random.default_rng(seed)
    weight = random.integers(-1, 2, (n_out, n)).astype(np.float32)
    stored = weight[random.permutation(n_out)]
    path = models.write_gguf(tmp_path_factory.mktemp("rows") / "rows.gguf", {"w.weight": stored})
    rows = RowMatcher(open_gguf(path), "folder").match("w.weight", weight, np.arange(n_out), "w")
    assert np.array_equal(weight[rows], stored)
    assert sorted(rows) == list(range(n_out))


def test_other_weights_are_refused(base: Path, tmp_path: Path) -> None:
    """A GGUF file of another model. Fails if rows of the one could be written into the other."""
    random = np.random.default_rng(2)
    weight = random.standard_normal((4, 32), np.float32)
    changed = weight.copy()
    changed[2, 5] = np.nextafter(changed[2, 5], np.float32(9), dtype=np.float32)
    path = models.write_gguf(tmp_path / "a.gguf", {"w.weight": changed, "x.weight": weight[:3]})
    matcher = RowMatcher(open_gguf(path), "folder")
    for name, message in (
        ("w.weight", "rows of w.weight are not those of self_attn.q_proj in folder"),
        ("x.weight", r"x.weight has shape \[3, 32\], self_attn.q_proj"),
        ("y.weight", "no tensor y.weight, which holds self_attn.q_proj"),
    ):
        with pytest.raises(GgmlExtError, match=message):
            matcher.match(name, weight, np.arange(4), "self_attn.q_proj")
    other = open_gguf(tiny.family_gguf(base, "mistral"))
    folder = tmp_path / "other"
    tiny.save(transformers.AutoConfig.from_pretrained(tiny.family_dir(base, "llama")), folder, seed=9)
    with pytest.raises(
        GgmlExtError, match=r"blk.1.attn_q.weight are not those of model.layers.1.self_attn.q_proj"
    ):
        BlockModel(folder, gguf=other).load(1)


# Refusals


def copy_of(base: Path, family: str, folder: Path, **changes: Any) -> Path:
    """The family's folder with changes to config.json."""
    shutil.copytree(tiny.family_dir(base, family), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["FalconForCausalLM"]}, "does not know the architecture FalconForCausalLM"),
        ({"architectures": None}, r"does not know the architecture \(none named\)"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised already"),
        ({"hidden_size": "wide"}, "transformers cannot build the model"),
        ({"attention_bias": True}, "no tensor model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_configurations_are_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Fails if a model that calibration cannot treat is started on, or refused without its reason."""
    with pytest.raises(GgmlExtError, match=message):
        BlockModel(copy_of(base, "llama", tmp_path / "m", **changes))


@every_family
def test_modules_that_are_not_understood_are_named(base: Path, family: str) -> None:
    """Fails if a variant of a family with one more parameter, or one fewer, would be half understood."""
    skeleton = open_skeleton(tiny.family_dir(base, family))
    layer = skeleton.layers[1]
    layer.self_attn.extra_proj = nn.Linear(4, 4, device="meta")
    with pytest.raises(GgmlExtError, match=r"block 1 holds self_attn.extra_proj.weight.*not understand"):
        check_block(skeleton.family, layer, 1, "folder")
    del layer.self_attn.extra_proj
    check_block(skeleton.family, layer, 1, "folder")
    layer.input_layernorm.bias = nn.Parameter(torch.zeros(4, device="meta"))
    with pytest.raises(GgmlExtError, match=r"block 1 holds input_layernorm.bias"):
        check_block(skeleton.family, layer, 1, "folder")
    del layer.input_layernorm.bias
    del layer.self_attn.o_proj
    with pytest.raises(GgmlExtError, match=r"block 1 lacks self_attn.o_proj"):
        check_block(skeleton.family, layer, 1, "folder")


def test_dense_block_in_a_mixture_is_refused(base: Path, tmp_path: Path) -> None:
    """llama.cpp wants experts in every block of a Qwen3-MoE; fails if mlp_only_layers goes unnoticed."""
    folder = copy_of(base, "qwen3_moe", tmp_path / "m", mlp_only_layers=[1])
    with pytest.raises(GgmlExtError, match=r"block 1 holds mlp.gate_proj.weight"):
        BlockModel(folder)


def test_unknown_experts_are_refused() -> None:
    """Fails if a mixture whose experts have a bias would be run without it."""
    fused = nn.Module()
    for name in ("gate_up_proj", "down_proj", "down_proj_bias"):
        fused.register_parameter(name, nn.Parameter(torch.zeros(2, 4, 4)))
    with pytest.raises(GgmlExtError, match="down_proj_bias"):
        RoutedExperts(fused, "block 0")


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Changes the folder's tensors (name -> float32 array)."""
    path = folder / "model.safetensors"
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    models.write_safetensors(path, tensors)
    return folder


def test_checkpoints_are_refused(base: Path, tmp_path: Path) -> None:
    """Fails if a tensor of a block that is extra, missing or in an unknown type is passed over."""
    extra = "model.layers.1.self_attn.q_proj.lora_A.weight"
    folder = rewritten(
        copy_of(base, "llama", tmp_path / "a"), lambda t: t.update({extra: np.zeros((2, 2), np.float32)})
    )
    with pytest.raises(GgmlExtError, match=f"holds a tensor {extra}"):
        BlockModel(folder)
    missing = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    folder = rewritten(copy_of(base, "mixtral", tmp_path / "b"), lambda t: t.pop(missing))
    with pytest.raises(GgmlExtError, match=f"no tensor {missing}"):
        BlockModel(folder)
    folder = copy_of(base, "llama", tmp_path / "c")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))
    with pytest.raises(GgmlExtError, match="is stored as I32"):
        BlockModel(folder).load(0)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(GgmlExtError, match="pickled weights"):
        BlockModel(folder)


def test_code_in_the_folder_is_not_run(base: Path, tmp_path: Path) -> None:
    """Phi-3 folders bring code; fails if it would run, in this process or in the converter's, or stop the
    folder from being used."""
    code = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model", "AutoModel": "mine.Model"}
    folder = copy_of(base, "phi3", tmp_path / "m", auto_map={**code, "AutoTokenizer": ["mine.T", None]})
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["mine.T", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ran = tmp_path / "ran.txt"
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\nraise SystemExit('it ran')")
    model = BlockModel(folder)
    assert model.load(0).index == 0
    assert model.tokenize("a text")
    hf.to_gguf(folder, tmp_path / "m.gguf")
    assert open_gguf(tmp_path / "m.gguf").arch == "phi3"
    assert not ran.exists()


def test_only_matrices_of_the_block_can_be_replaced(base: Path) -> None:
    """Fails if a misspelt tensor would silently not be replaced."""
    block, hidden = block_input(block_model(base, "llama"))
    with pytest.raises(ValueError, match=r"not matrices of block 0: blk.1.attn_q.weight"):
        block.run(hidden, weights={"blk.1.attn_q.weight": torch.zeros(1)})


# Plans


def test_plan_of_an_8b_model(tmp_path: Path) -> None:
    """128 x 2048 tokens of an 8B Llama fit into 24 GB; fails if the plan reads weights (there are none), or
    the arithmetic is not that of the shapes."""
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    config.save_pretrained(tmp_path)
    planned = plan(tmp_path, samples=128, context=2048, batch=4, training=True)
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert planned.n_weights == weights
    assert planned.forward_macs == 128 * 2048 * (weights + 32 * 2048 * 4096)
    assert planned.disk_activations == 2 * 128 * 2048 * 4096 * 4
    assert planned.collect < planned.train < planned.solve == planned.peak < 24e9
    without = plan(tmp_path, samples=128, context=2048, batch=4)
    assert without.peak == max(planned.collect, planned.solve)


def test_plan_of_a_mixture(base: Path) -> None:
    """Fails if all experts count as run for every token, or their second moments as kept for none."""
    shared = {"samples": 2, "context": 64}
    planned = plan(tiny.family_dir(base, "mixtral"), **shared)
    experts = tiny.EXPERTS * 3 * tiny.HIDDEN * tiny.FFN
    attention = 2 * tiny.HIDDEN * tiny.HIDDEN + 2 * tiny.HIDDEN * tiny.HIDDEN // 2
    assert planned.n_weights == 2 * (attention + experts)
    assert planned.forward_macs == 2 * 128 * (attention + experts // 2 + 64 * tiny.HIDDEN)
    assert planned.n_tokens == 128


def test_every_family_is_tested(base: Path) -> None:
    """Fails if a family is added to the table without a tiny model."""
    named = {open_skeleton(tiny.family_dir(base, family)).family.architecture for family in tiny.CONFIGS}
    assert named == set(FAMILIES)
