"""-ctk and -ctv of perplexity, compare and bench, and the table of attention that is made with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval_models import llama_perplexity, make_model, text_of
from ggml_ext.build.toolkit import run_tool
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.measure import bench, report
from ggml_ext.measure.compare import compare
from ggml_ext.measure.evaluate import perplexity
from ggml_ext.runtime import tools
from ggml_ext.runtime.cache_types import NAMES, PLAIN, CacheTypes

CTX = 64
MIXED = CacheTypes("q8_0", "q4_0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    make_model(made / "base.gguf")
    (made / "text.txt").write_text(text_of(300))
    return made


def theirs(folder: Path, *arguments: str) -> str:
    """What llama-perplexity prints of the same model and text."""
    return llama_perplexity(folder / "base.gguf", "-f", str(folder / "text.txt"), "-c", str(CTX), *arguments)


@pytest.mark.parametrize("types", [MIXED, CacheTypes("f32", "f32"), CacheTypes("f16", "q8_0")])
def test_perplexity_equals_llama_perplexity(folder: Path, types: CacheTypes) -> None:
    output = theirs(folder, *types.arguments)
    expected = float(output.split("Final estimate: PPL = ")[1].split()[0])
    assert perplexity(folder / "base.gguf", folder / "text.txt", ctx=CTX, cache=types).ppl == pytest.approx(
        expected, rel=1e-5
    )


def test_the_base_keeps_f16(folder: Path, tmp_path: Path) -> None:
    """So a model beside itself shows what the cache costs; its own scores are not taken for the base's."""
    model, logits = folder / "base.gguf", str(tmp_path / "logits")
    theirs(folder, "--kl-divergence-base", logits)
    output = theirs(folder, *MIXED.arguments, "--kl-divergence-base", logits, "--kl-divergence")
    expected = float(output.split("Mean    KLD:")[1].split()[0])
    rows = compare(model, [model], folder / "text.txt", ctx=CTX, rounds=0, layers=0, cache=MIXED)
    assert rows[1]["kld"] == pytest.approx(expected, rel=2e-3, abs=1e-6)
    assert [(row["cache_k"], row["cache_v"]) for row in rows] == [("f16", "f16"), ("q8_0", "q4_0")]
    assert ", KV cache K q8_0, V q4_0 (the base's f16)" in report.markdown(rows, threads=None, rounds=0)
    again = compare(model, [model], folder / "text.txt", ctx=CTX, rounds=0, layers=0)
    assert again[1]["kld"] == 0
    assert "KV cache" not in report.markdown(again, threads=None, rounds=0)


def test_a_budget_of_cells(tmp_path: Path) -> None:
    """The base's cache is whole; what the budget leaves out shows beside it. The environment is
    as it was."""
    make_model(tmp_path / "base.gguf")
    model, text = tmp_path / "base.gguf", tmp_path / "text.txt"
    text.write_text(text_of(3000))
    cache = CacheTypes.of("f16", "f16", "256,sink=4,recent=8")
    before = dict(os.environ)
    rows = compare(model, [model], text, ctx=1024, layers=0, cache=cache)
    assert dict(os.environ) == before
    assert rows[1]["kld"] > 1e-6
    assert rows[1]["pp_tps"] is None
    assert [row["cache_kv"] for row in rows] == [None, "256,sink=4,recent=8"]
    assert ", KV cache f16, budget 256,sink=4,recent=8 (the base's f16)" in report.markdown(
        rows, threads=None, rounds=0
    )
    too_small = CacheTypes.of("f16", "f16", "256,recent=200")
    with pytest.raises(GgmlExtError, match=r"256 cells is less than 1 x .sink 16 . recent 200. . 48 for -ub"):
        perplexity(model, text, ctx=1024, cache=too_small)


def test_a_paged_cache(tmp_path: Path) -> None:
    """Nothing is evicted: what the cache's types cost, no more."""
    make_model(tmp_path / "base.gguf")
    model, text = tmp_path / "base.gguf", tmp_path / "text.txt"
    text.write_text(text_of(3000))
    plain, paged = (CacheTypes.of("f16", "f16", kv) for kv in (None, "paged"))
    rows = compare(model, [model], text, ctx=256, rounds=0, layers=0, cache=paged)
    assert 0 <= rows[1]["kld"] < 1e-3
    assert ", KV cache f16, paged (the base's f16)" in report.markdown(rows, threads=None, rounds=0)
    scores = [perplexity(model, text, ctx=256, cache=cache).ppl for cache in (plain, paged)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-2)


def test_a_paged_cache_that_evicts(tmp_path: Path) -> None:
    make_model(tmp_path / "base.gguf")
    model, text = tmp_path / "base.gguf", tmp_path / "text.txt"
    text.write_text(text_of(3000))
    cache = CacheTypes.of("f16", "f16", "paged,25%,policy=norm")
    rows = compare(model, [model], text, ctx=1024, layers=0, cache=cache)
    assert rows[1]["kld"] > 1e-6
    assert rows[1]["pp_tps"] is None
    too_small = CacheTypes.of("f16", "f16", "paged,64,policy=norm")
    with pytest.raises(GgmlExtError, match=r"a budget of 2 blocks of 64 tokens is less than 5 for -ub 48"):
        perplexity(model, text, ctx=1024, cache=too_small)


def test_run_gives_tools_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[str], str | None]] = []

    def execve(_program: Path, arguments: list[str], environment: dict[str, str]) -> None:
        seen.append((arguments[1:], environment.get("GGML_EXT_KV")))
        raise OSError(2, "not in a test")

    monkeypatch.setattr(os, "execve", execve)
    for tool, kv in (
        ("llama-server", "25%"),
        ("llama-cli", "4096,sink=32"),
        ("llama-server", "paged,2G"),
        ("llama-server", "paged,25%,policy=norm"),
        ("llama-server", "paged,25%,policy=attention,sink=8"),
        ("llama-server", None),
    ):
        with pytest.raises(GgmlExtError, match="cannot start"):
            run_tool(tool, ["-m", "x"], kv=kv)
    assert seen == [
        (["--ctx-checkpoints", "0", "-m", "x"], "budget=25%"),
        (["-m", "x"], "budget=4096,sink=32"),
        (["-m", "x"], "paged,budget=2G"),
        (["-m", "x"], "paged,budget=25%,policy=norm"),
        (["--ctx-checkpoints", "0", "-m", "x"], "paged,budget=25%,policy=attention,sink=8"),
        (["-m", "x"], None),
    ]


def test_speeds_have_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[CacheTypes] = []

    def measure(*arguments: object) -> tuple[float, float]:
        seen.append(arguments[-1])  # type: ignore[arg-type]
        return 1.0, 1.0

    monkeypatch.setattr(bench, "_measure", measure)
    model = folder / "base.gguf"
    compare(model, [model], folder / "text.txt", ctx=CTX, rounds=1, layers=0, cache=MIXED)
    assert seen == [PLAIN, MIXED]
    call = bench.command(model, prompt=8, generate=8, threads=1, cache=MIXED)
    assert call[-6:] == ["-ctk", "q8_0", "-ctv", "q4_0", "-fa", "on"]
    assert "-ctk" not in bench.command(model, prompt=8, generate=8, threads=1)


def test_types_are_those_of_llama_cpp(repo_root: Path) -> None:
    """All that common/arg.cpp lists, each with its number."""
    shown = subprocess.run(
        [tools.find("llama-perplexity"), "--help"], capture_output=True, text=True, env=tools.environment()
    ).stdout
    listed = shown.split("--cache-type-k TYPE")[1].split("allowed values:")[1].split("(default")[0]
    assert sorted(name.strip() for name in listed.replace("\n", " ").split(",")) == sorted(NAMES)
    assert CacheTypes.of("F16", "iq4_nl").ids == (1, 20)
    assert CacheTypes.of("f16", "q8_0", "25%,sink=4").setting == "budget=25%,sink=4"
    assert CacheTypes.of("f16", "q8_0", "paged").setting == "paged"
    assert CacheTypes.of("f16", "q8_0", "paged,policy=random").setting == "paged,policy=random"
    evicts = CacheTypes.of("f16", "q8_0", "paged,512,policy=norm,sink=4,recent=32")
    assert evicts.setting == "paged,budget=512,policy=norm,sink=4,recent=32"
    assert [CacheTypes("f16", "f16", kv).ubatch(512) for kv in ("", "paged,25%", "25%", evicts.kv)] == [
        512,
        512,
        48,
        48,
    ]
    for wrong in (
        "",
        "x",
        "25%,",
        "25%,window=3",
        "-1",
        "2G",
        "paged,sink=4",
        "pagedX",
        "paged,policy=window",
    ):
        with pytest.raises(GgmlExtError, match=f"--kv {wrong}: no budget; write 25% of the context"):
            CacheTypes.of("f16", "f16", wrong)
    with pytest.raises(GgmlExtError, match=r"-ctv q3_k: no type of a cache; use one of f32, f16"):
        CacheTypes.of("f16", "q3_k")


def test_attention_table(folder: Path, repo_root: Path, tmp_path: Path) -> None:
    """Two rows are there already; the others are measured, against the base that has no row."""
    script = repo_root / "scripts" / "attention_table.py"
    sys.path.insert(0, str(script.parent))
    try:
        import attention_table as table
    finally:
        sys.path.remove(str(script.parent))
    out = tmp_path / "out"
    out.mkdir()
    made = {"ln_ppl_ratio": 0.01, "ln_ppl_ratio_se": 0.001, "kld": 0.5, "kld_se": 0.25}
    for case in table.CASES:
        if case.setting != "half" or case.cache != "q4_0":
            (out / f"{CTX}-{case.name}.json").write_text(json.dumps(made))
    command = [sys.executable, script, folder / "base.gguf", folder / "text.txt", out, "--ctx", CTX]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "| q8_0 | `half` | on | +1.0050 % ± 0.1000 | 0.5000000 ± 0.2500000 |" in lines
    measured = [line for line in lines if line.startswith("| q4_0 | `half` |")]
    assert len(measured) == 2
    assert all("0.5000000" not in line and "0.0000000" not in line for line in measured)
    assert len(lines) == 3 + len(table.CASES)
