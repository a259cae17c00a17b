"""scripts/arch_flat4.py: what a file says of its matrices, and the page that is made of it."""

from __future__ import annotations

import json
import runpy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from arch_models import gemma4

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "arch_flat4.py"
S = runpy.run_path(str(SCRIPT))


def result(name: str, matrices: dict[str, Any], error: str = "", steps: int = 0) -> Any:
    return S["Result"](name, name.rpartition("-")[0], matrices, [], 1.0, error, steps)


GPTQ = S["Ending"]("fq4", "gptq", online=True, folded=True)
ROUTER = S["Ending"]("f32", "float", online=False, folded=False)
UNREAD = S["Ending"]("fq4", "nearest", online=False, folded=False, use="never")
LOOKED_UP = S["Ending"]("q5_0", "nearest", online=False, folded=False, use="GET_ROWS")
EIGHT_BITS = S["Ending"]("q8_0", "imatrix", online=True, folded=False)
RESULTS = [
    result("one-dense", {"blk.0.a.weight": GPTQ, "blk.1.a.weight": GPTQ}),
    result("two-dense", {"blk.0.a.weight": GPTQ, "blk.0.r.weight": ROUTER}),
    result(
        "two-moe",
        {
            "blk.0.a.weight": UNREAD,
            "blk.1.c.weight": UNREAD,
            "blk.0.b.weight": LOOKED_UP,
            "blk.0.e.weight": EIGHT_BITS,
        },
    ),
    result("six-dense", {}, "RuntimeError: a|b"),
]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """flat4 on a mixture of experts, with few steps."""
    folder = tmp_path_factory.mktemp("flat4")
    models, text = S["prepare"](folder, lambda into: gemma4(into / "gemma4-moe.gguf", experts=4))
    torch.set_num_threads(1)
    return S["run"](models / "gemma4-moe.gguf", text, steps=8)


def test_a_file_says_how_its_matrices_ended(mixture: Any) -> None:
    assert (mixture.model, mixture.arch, mixture.error) == ("gemma4-moe", "gemma4", "")
    assert len(mixture.matrices) == 5 * 9 + 4, "of attention, experts, FFN and router; a layer has no V"
    for name, its in mixture.matrices.items():
        if "ffn_gate_inp" in name:
            assert (its.rounding, its.type) == ("float", "f32")
        else:
            assert its.rounding == "gptq", name
            assert its.online, name
            assert its.folded == ("attn_output" not in name), "RMS_NORM makes its input"
    assert not mixture.short


def test_results_are_read_back(mixture: Any, tmp_path: Path) -> None:
    log = tmp_path / "results.jsonl"
    lines = [json.dumps(asdict(its)) for its in (result("gemma4-moe", {}, "failed"), mixture, RESULTS[2])]
    log.write_text("\n".join(lines) + "\n")
    assert S["load"](log) == {"gemma4-moe": mixture, "two-moe": RESULTS[2]}
    assert S["load"](tmp_path / "none") == {}


def test_a_failed_model_is_a_result(tmp_path: Path) -> None:
    found = S["run"](tmp_path / "none-dense.gguf", tmp_path / "text.txt")
    assert found.short
    assert "none-dense.gguf" in found.error
    assert not found.matrices


def test_the_page_names_what_falls_short() -> None:
    page = S["page"](RESULTS)
    assert "In 2 of 4 models, and in all models of 1 of 3 architectures" in page
    assert "\none-dense 2, two-dense 2 (1).\n" in page
    why = "b (GET_ROWS reads them); a, c (no text reads them); e (q8_0 has no levels to choose from)"
    assert f"| two-moe | 4 |  |  | 1 | 3 | {why} |" in page
    assert "(`--steps`)" not in page
    assert "In 1 of 1 models the search" in S["page"]([result("one-dense", {}, steps=2)])
    assert "| six-dense |  |  |  |  |  | RuntimeError: a\\|b |" in page


def test_kinds_of_weights_are_counted_over_models() -> None:
    lines = S["page"](RESULTS).splitlines()
    assert "| a | 3 | 4 | 3 |  | 1 |  | 1 | 3 | 3 | 1 |" in lines
    assert "| e | 1 | 1 |  | 1 |  |  |  | 1 |  |  |" in lines
    assert "| r | 1 | 1 |  |  |  | 1 f32 |  |  |  |  |" in lines


def test_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done is not done again, but for a failure and, without --steps, a search that was cut short.
    With names the page is left alone."""
    log, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    there = [RESULTS[0], result("cut-dense", {}, steps=2), result("bad-dense", {}, "failed")]

    def done(*arguments: str) -> list[tuple[str, int]]:
        """Models that were converted, and steps of their search."""
        (tmp_path / "models").mkdir(exist_ok=True)
        log.write_text("".join(json.dumps(asdict(its)) + "\n" for its in there))
        calls: list[tuple[str, int]] = []

        def run(model: Path, text: Path, steps: int) -> Any:
            calls.append((model.stem, steps))
            return result(model.stem, {}, steps=steps)

        monkeypatch.setitem(S["main"].__globals__, "run", run)
        names = [its.model for its in there]
        monkeypatch.setattr(
            "sys.argv", [str(SCRIPT), *names, "--folder", str(tmp_path), "-o", str(page), *arguments]
        )
        S["main"]()
        assert S["load"](log)["bad-dense"].error == ""
        return calls

    assert done("--steps", "2") == [("bad-dense", 2)]
    assert done() == [("cut-dense", 0), ("bad-dense", 0)]
    assert not page.exists()
