"""Every architecture that llama.cpp runs: loaded, rounded, and what the observer says about its graph.

The oracle of the sums is llama-imatrix over the same tokens, which finds its values node by node.
"""

from __future__ import annotations

import random
import re
import runpy
import shutil
import string
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from arch_models import BYTES_PER_TOKEN, NAMES, WRITTEN, ArchModel
from fold_probe import fold_all
from ggml_ext.convert import convert
from ggml_ext.core.registry import FLOAT_TYPES
from ggml_ext.gguf import imatrix
from ggml_ext.gguf.source import open_gguf
from ggml_ext.methods.rounding import grid
from ggml_ext.observe.sites import from_json
from ggml_ext.runtime import native, tools
from ggml_ext.runtime.llama import Model
from ggml_ext.types import rules
from observed import Float, ObservedModel, SiteSums

CTX, WINDOWS = 64, 2
TOKENS = CTX * WINDOWS
EXPERTS_USED = 2

LAYOUTS = ["deepseek2-moe", "deepseek4-moe", "jamba-dense", "lfm2-dense", "llama-dense", "llama-moe"]
LAYOUTS += ["mamba-dense", "minimax-01-moe", "qwen35-dense"]
"""Models with values of all layouts that there are: by tokens, sequences, heads or experts."""

UNCHANGED = 1e-4
"""Of logits: sums in another order, rounded to half precision in places."""
IMATRIX_CRASHES = {"glm5-next-moe"}
"""llama-imatrix reads the name of a node's first source, and here are nodes that have none."""

NO_PRODUCTS = {"ADD", "GET_ROWS", "MUL", "SSM_CONV"}
"""What else a matrix of a block can be for."""

NEVER_RUN = {
    "cogvlm-dense": r"\.vis_",  # for pictures
    "hy_v3-moe": r"\.ffn_(gate|up|down)\.",  # every block has experts
    "minimax-m3-moe": r"\.indexer\.",  # with flash attention only
    "mimo2-moe": r"\.ffn_(gate|up|down)\.",
    "qwen3next-moe": r"\.ssm_in\.",  # of older files, beside attn_qkv and attn_gate
    "refact-moe": r"\.ffn_(gate_inp|(gate|up|down)_exps)\.",
}
"""Weights that the text graph of a model leaves alone."""


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, architectures: dict[str, ArchModel]) -> ArchModel:
    return architectures[request.param]


def test_names(architectures: dict[str, ArchModel]) -> None:
    assert sorted(architectures) == sorted(NAMES)
    for name, model in architectures.items():
        assert open_gguf(model.path).arch == model.arch, name
    assert {model.arch for model in architectures.values()} >= {"gemma4", "llama", "mamba"}
    assert len(WRITTEN) == 3


def logits_of(path: Path) -> Float:
    """Logits [CTX, vocabulary] of random tokens."""
    with Model(path, threads=1) as loaded:
        loaded.start(n_ctx=CTX, n_seq=1, n_batch=CTX)
        tokens = np.random.default_rng(0).integers(0, loaded.n_vocab, CTX).astype(np.int32)
        positions = np.arange(CTX, dtype=np.int32)
        logits = loaded.decode(tokens, positions, np.zeros_like(positions), np.ones(CTX, np.bool_))
        assert logits.shape == (CTX, loaded.n_vocab)
        return logits.copy()


@pytest.fixture(scope="module")
def logits(model: ArchModel) -> Float:
    return logits_of(model.path)


def test_it_gives_finite_logits(logits: Float) -> None:
    assert np.isfinite(logits).all()
    assert np.ptp(logits) > 0.1


def test_it_is_rounded(model: ArchModel, tmp_path: Path) -> None:
    remarks: list[str] = []
    out = tmp_path / "out.gguf"
    result = convert(model.path, out, type_name="q4_0", threads=1, warn=remarks.append)
    assert all("rows do not fit the blocks" in line for line in remarks)
    assert result.weights["q4_0"] > 0
    assert np.isfinite(logits_of(out)).all()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many tokens as the windows hold."""
    letters = random.Random(3).choices(string.ascii_lowercase, k=BYTES_PER_TOKEN * TOKENS)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(letters))
    return path


class Observed(NamedTuple):
    """The observer's table, and the sums of its sites over the text."""

    table: dict[str, Any]
    sums: list[SiteSums]

    @property
    def sites(self) -> list[dict[str, Any]]:
        sites: list[dict[str, Any]] = self.table["sites"]
        return sites

    @property
    def others(self) -> dict[str, str]:
        """Weight that is at no site -> what else reads it."""
        return {other["tensor"]: other["use"] for other in self.table["others"]}

    def readers(self) -> Iterator[tuple[str, str, SiteSums]]:
        """Every weight in a site, the op that reads for it, and the site's sums."""
        for site, sums in zip(self.sites, self.sums, strict=True):
            for reader in site["readers"]:
                yield reader["tensor"], reader["op"], sums


@pytest.fixture(scope="module")
def observed(model: ArchModel, text: Path) -> Observed:
    with ObservedModel(model.path, CTX) as loaded:
        tokens = loaded.model.tokenize(text.read_bytes())
        table = loaded.table()
        sums = loaded.sums(tokens.reshape(WINDOWS, CTX))
        assert loaded.table() == table
    return Observed(table, sums)


def test_no_weight_is_unaccounted(model: ArchModel, observed: Observed) -> None:
    read = [weight for weight, _, _ in observed.readers()]
    assert len(set(read)) == len(read)
    assert not set(read) & set(observed.others)
    assert {tensor.name for tensor in open_gguf(model.path).tensors} <= set(read) | set(observed.others)
    anchors = [site["anchor"] for site in observed.sites]
    assert len(set(anchors)) == len(anchors)


def test_the_committed_table(model: ArchModel, observed: Observed, repo_root: Path) -> None:
    row = runpy.run_path(str(repo_root / "scripts" / "arch_table.py"))["row"]
    line = row(model.name, observed.table, open_gguf(model.path))
    committed = (repo_root / "docs" / "architectures.md").read_text().splitlines()
    assert line in committed, "write it anew with scripts/arch_table.py"


def test_the_committed_page_of_flat4(model: ArchModel, observed: Observed, repo_root: Path) -> None:
    """What the graph and the types leave no choice about: how many matrices are rounded how."""
    table, source = from_json(observed.table), open_gguf(model.path)
    asked = replace(rules.compile_rules("fq4", [], []), no_matrices=table.no_matrices)
    choices = rules.choose([t.shape for t in source.tensors], source.arch, asked, native.block_size)
    types = {choice.name: choice.target for choice in choices}
    counts: Counter[str] = Counter()
    for tensor in source.tensors:
        if re.fullmatch(r"blk\..*\.weight", tensor.name) and sum(n > 1 for n in tensor.dims) > 1:
            if types[tensor.name] in FLOAT_TYPES:
                counts["float"] += 1
            elif table.site_of(tensor.name) is None:
                counts["nearest"] += 1
            else:
                counts["gptq" if grid.supports(types[tensor.name]) else "imatrix"] += 1
    page = (repo_root / "docs" / "architectures-flat4.md").read_text()
    if counts["nearest"] or counts["imatrix"]:
        cells = [counts.total(), *(counts[its] for its in ("gptq", "float", "imatrix", "nearest"))]
        expected = re.escape(f"| {model.name} | {' | '.join(str(cell or '') for cell in cells)} |")
    else:
        floats = f" ({counts['float']})" if counts["float"] else ""
        expected = rf"(^|\s){re.escape(f'{model.name} {counts.total()}{floats}')}[,.]"
    assert re.search(expected, page), "write it anew with scripts/arch_flat4.py"


def test_every_matrix_of_a_block_has_a_site_or_a_reason(model: ArchModel, observed: Observed) -> None:
    read = {weight for weight, _, _ in observed.readers()}
    for tensor in open_gguf(model.path).tensors:
        if re.fullmatch(r"blk\..*\.weight", tensor.name) and tensor.n_rows > 1 and tensor.name not in read:
            use = observed.others[tensor.name]
            unused = re.search(NEVER_RUN.get(model.name, "$^"), tensor.name)
            assert use == "never" if unused else use in NO_PRODUCTS, tensor.name


def test_what_is_no_matrix_is_known_without_the_graph(model: ArchModel, observed: Observed) -> None:
    """Conversions that look at no graph go by names: none that llama.cpp runs may be missing among them."""
    unread = from_json(observed.table).no_matrices
    tensors = [tensor.shape for tensor in open_gguf(model.path).tensors]
    taken = [tensor for tensor in tensors if rules.allows_quantization(tensor, model.arch)]
    by_names = {tensor.name for tensor in taken if not rules.is_matrix(tensor, None)}
    assert {tensor.name for tensor in taken if not rules.is_matrix(tensor, unread)} == by_names


def test_every_site_counts_all_tokens(observed: Observed) -> None:
    """The last block too, although it is the outputs that it is computed for."""
    for site, sums in zip(observed.sites, observed.sums, strict=True):
        ops = {reader["op"] for reader in site["readers"]}
        assert sums.tokens >= TOKENS * len(site["values"]), site["anchor"]
        most = TOKENS * site["rows"] * len(site["values"])
        assert sums.tokens == most if len(site["values"]) == 1 else sums.tokens <= most, site["anchor"]
        if not site["experts"]:
            assert sums.tokens == TOKENS * len(site["values"]), site["anchor"]
        elif "MUL_MAT_ID" in ops:
            assert sums.by_expert.sum() in (sums.tokens, EXPERTS_USED * sums.tokens), site["anchor"]
        else:
            assert (sums.by_expert == TOKENS).all(), site["anchor"]


def changed(path: Path, sites: list[dict[str, Any]], before: Float, copy: Path) -> float:
    """Largest difference of the logits from ``before``, relative to the largest, after folds at ``sites``."""
    shutil.copyfile(path, copy)
    fold_all(copy, sites)
    return float(np.abs(logits_of(copy) - before).max() / np.abs(before).max())


def test_folds_change_nothing(model: ArchModel, observed: Observed, logits: Float, tmp_path: Path) -> None:
    assert changed(model.path, observed.sites, logits, tmp_path / "folded.gguf") < UNCHANGED
    for site in observed.sites:
        assert "kind" in site["fold"] or site["fold"]["reason"], site["anchor"]


def importances(model: Path, text: Path, out: Path) -> dict[str, Float]:
    """What llama-imatrix finds: weight -> mean squares [experts * n], float32."""
    size = str(CTX)
    command: list[str | Path] = [tools.find("llama-imatrix"), "-m", model, "-f", text, "-o", out]
    command += ["-t", "1", "-c", size, "-b", size, "-ub", size, "--no-ppl", "--process-output"]
    command += ["-fa", "off", "-ctk", "f32", "-ctv", "f32"]
    subprocess.run(command, check=True, capture_output=True, env=tools.environment())
    return imatrix.load(out).entries


def test_sums_are_those_of_llama_imatrix(
    model: ArchModel, observed: Observed, text: Path, tmp_path: Path
) -> None:
    if model.name in IMATRIX_CRASHES:
        pytest.skip("llama-imatrix crashes")
    entries = importances(model.path, text, tmp_path / "imatrix.gguf")
    seen = set()
    for weight, op, sums in observed.readers():
        if weight not in entries:
            assert not weight.startswith("blk."), weight
            continue
        found, counts = sums.diagonal[None], np.array([sums.tokens])
        if op == "MUL_MAT_ID" or entries[weight].size > found.size:
            found, counts = sums.diagonals, sums.by_expert
        expected = entries[weight].reshape(found.shape) * counts[:, None]
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=weight)
        seen.add(weight)
    assert seen == set(entries)


def test_a_wrong_fold_is_noticed(architectures: dict[str, ArchModel], tmp_path: Path) -> None:
    """A reader left out, and another norm's gain."""
    path, copy = architectures["llama-dense"].path, tmp_path / "folded.gguf"
    with ObservedModel(path, CTX) as loaded:
        site = next(s for s in loaded.table()["sites"] if s["anchor"] == "blk.0.attn_q")
    before = logits_of(path)
    assert len(site["readers"]) == 3
    assert changed(path, [site], before, copy) < UNCHANGED
    assert changed(path, [{**site, "readers": site["readers"][:2]}], before, copy) > 10 * UNCHANGED
    elsewhere = {**site["fold"], "tensor": "blk.0.ffn_norm.weight"}
    assert changed(path, [{**site, "fold": elsewhere}], before, copy) > 10 * UNCHANGED


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_are_those_of_a_token_in_every_sequence(
    name: str, architectures: dict[str, ArchModel], text: Path
) -> None:
    """Two sequences in one decode, of which the second counts nothing, are the first alone."""
    half = CTX // 2
    with ObservedModel(architectures[name].path, CTX, n_seq=2) as both:
        tokens = both.model.tokenize(text.read_bytes())[:CTX]
        counted = (np.arange(CTX) < half).astype(np.float32)
        found = both.sums(tokens[None], counted)
        sites = both.table()["sites"]
    with ObservedModel(architectures[name].path, half) as alone:
        assert [site["anchor"] for site in alone.table()["sites"]] == [site["anchor"] for site in sites]
        expected = alone.sums(tokens[None, :half])
    for site, sums, first in zip(sites, found, expected, strict=True):
        assert sums.tokens == first.tokens, site["anchor"]
        np.testing.assert_array_equal(sums.by_expert, first.by_expert)
        scale = first.diagonal.max()
        np.testing.assert_allclose(sums.diagonal / scale, first.diagonal / scale, atol=1e-3)
        np.testing.assert_allclose(sums.diagonals / scale, first.diagonals / scale, atol=1e-3)
