"""scripts/bench-sampling: what is measured is what it says, ratios are paired, errors take one line. Speeds
themselves are not asserted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from devtools.bench_sampling import plan, report
from devtools.bench_sampling.measure import CHAIN, CONTENDERS, DIRECT, UPSTREAM, Rows, measure, write_model
from ggml_ext.runtime import sampling
from interrupts import INTERRUPTED

N_VOCAB = 500


def bench(repo_root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(repo_root / "scripts" / "bench-sampling"), *options],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHON": sys.executable},
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model.gguf", N_VOCAB)
    return tmp_path / "model.gguf"


def test_the_logits_are_what_they_are_called() -> None:
    settings = {"top_k": 0, "min_p": 0.0, "order": ("top_p", "temperature")}
    for n_vocab in (1000, 32000):
        with sampling.fused(top_p=0.95, **settings) as sampler:
            for row in plan.make_logits("flat", n_vocab, 2):
                assert len(sampler.kept(row)[0]) > 0.7 * n_vocab
            for row in plan.make_logits("peaked", n_vocab, 2):
                assert len(sampler.kept(row)[0]) == 12
    rows = plan.make_logits("peaked", 1000, 2)
    assert not np.array_equal(rows[0], rows[1])
    assert np.array_equal(rows, plan.make_logits("peaked", 1000, 2))


def test_cases_are_all_that_was_asked_for() -> None:
    cases = plan.cases(quick=False)
    assert len(cases) == len(set(cases)) == 4 * 2 * 2 * len(plan.CHAINS)
    assert set(plan.cases(quick=True)) < set(cases)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("chain", plan.CHAINS)
def test_contenders_draw_from_the_contexts_logits(chain: str, batch: int, model: Path) -> None:
    """One token has all the mass in each row, so every contender has one answer per row."""
    rows = Rows(model, batch)
    try:
        rows._logits[:] = -100.0
        for row in range(batch):
            rows._logits[row, 7 + row] = 100.0
        with rows.contenders(chain) as contenders:
            seen = {name: contender.tokens() for name, contender in contenders.items()}
    finally:
        rows.close()
    assert set(seen) == set(CONTENDERS)
    assert all(tokens == [7 + row for row in range(batch)] for tokens in seen.values())


@pytest.mark.parametrize("chain", plan.CHAINS)
def test_contenders_do_the_same_work(chain: str, model: Path) -> None:
    rows = Rows(model, 1)
    stock = rows._chain(rows._stock(plan.CHAINS[chain])[:-1])
    logits = np.random.default_rng(1).standard_normal(N_VOCAB).astype(np.float32)
    left, _ = sampling.apply(logits, sampling.address(stock))
    with sampling.fused(**plan.CHAINS[chain]) as sampler:
        kept = sampler.kept(logits)[0]
    assert set(left["id"][np.isfinite(left["logit"])].tolist()) == set(kept.tolist())
    rows._api.llama_sampler_free(stock)
    rows.close()


def test_measures_every_round(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devtools.bench_sampling.measure._LEAST_SECONDS", 0.0)
    rows = Rows(model, 2)
    rows.fill("peaked")
    found = measure(rows, plan.Case("32k", "peaked", 2, "defaults"), rounds=4)
    rows.close()
    assert set(found) == set(CONTENDERS)
    assert all(len(values) == 4 and min(values) > 0 for values in found.values())


def test_ratios_are_paired_and_lines_judged() -> None:
    headline = plan.Case("152k", "flat", 32, "top-p 0.95")
    other = plan.Case("32k", "peaked", 1, "defaults")
    results = {
        headline: {UPSTREAM: [10.0, 100.0, 60.0], CHAIN: [2.0, 10.0, 12.0], DIRECT: [1.0, 10.0, 6.0]},
        other: {UPSTREAM: [9.0, 9.0, 9.0], CHAIN: [10.0, 10.0, 10.0], DIRECT: [3.0, 3.0, 4.0]},
    }
    assert report.ratio(results[headline], CHAIN).median == 5.0
    verdicts = {verdict.line: verdict for verdict in report.verdicts(results)}
    assert {line: verdict.text for line, verdict in verdicts.items()} == {
        "152k, flat, top-p 0.95, in a chain": "met",
        "every case, in a chain": "not met",
        "152k, flat, top-p 0.95, on logits": "met",
        "every case, on logits": "met",
    }
    assert verdicts["every case, in a chain"].worst == other
    missing = {verdict.text for verdict in report.verdicts({other: results[other]})}
    assert missing == {"met", "not met", "not measured"}
    assert report.verdicts({})[1].text == "not measured"


def test_the_script(repo_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = bench(repo_root, "--quick", "--rounds", "1", "--json", str(out))
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found["version"] == report.JSON_VERSION
    assert len(found["cases"]) == len(plan.cases(quick=True))
    assert {line["verdict"] for line in found["lines"]} <= {"met", "not met"}
    assert result.stdout.splitlines()[-1].startswith("bench-sampling: ")
    assert "152k, flat, top-p 0.95, in a chain" in result.stdout


def test_errors_take_one_line(repo_root: Path, tmp_path: Path) -> None:
    result = bench(repo_root, "--rounds", "0")
    assert result.returncode == 2
    result = bench(repo_root, "--quick", "--rounds", "1", "--json", str(tmp_path / "none" / "out.json"))
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert line.startswith("bench-sampling: error: ")


def test_ctrl_c_tells_what_there_is(repo_root: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "devtools.bench_sampling", "--repository", str(repo_root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(repo_root)},
    )
    for _ in range(600):
        if list(tmp_path.glob("bench-sampling-*/32k.gguf")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in INTERRUPTED, err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert "Lines to reach" in out
    assert not list(tmp_path.iterdir()), "the models are gone"
