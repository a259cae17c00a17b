"""scripts/bench-cpu: models that llama.cpp runs, ratios paired by round, resuming, errors in one line. Speeds
themselves are not asserted."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest

from devtools.bench_cpu import plan, report, results, runs
from devtools.bench_cpu.models import SHAPES, TYPES, Model, Shape, build
from devtools.bench_cpu.plan import PATCHED, STOCK, Contender, Group, Wanted
from ggml_ext.core.errors import GgmlExtError

TINY = Shape("tiny", hidden=256, ff=512, layers=2, heads=4, heads_kv=2, vocabulary=300)
FQ4, Q4_0 = Contender(PATCHED, "FQ4"), Contender(STOCK, "Q4_0")
GROUP = Group("tiny, short", "tiny", 1, (Q4_0, FQ4), 2, prompt=8, generated=4)

# A llama-bench whose speeds are its own name's: enough to see what is run, in which order, and what is kept.
FAKE_BENCH = """#!{python}
import json, sys
words = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps([{commit!r}, words]) + "\\n")
if {fails}:
    sys.exit("main: error: failed to load model")
option = dict(zip(words, words[1:]))
tests = []
for n, key in (("-p", "n_prompt"), ("-n", "n_gen")):
    if option[n] != "0":
        samples = [{speed}, {speed} + 2]
        counts = {{"n_prompt": 0, key: int(option[n])}}
        tests.append({{"build_commit": {commit!r}, **counts, "samples_ts": samples}})
print(json.dumps(tests))
"""
LIMITS = {
    "compiler": "gcc 1.2.3",
    "threads": 2,
    "passes": 4,
    "buffer_mib": 512,
    "read_bytes_per_s": {"best": 4e9, "median": 3e9},
    "int8_macs_per_s": [
        {"path": "slow", "best": 1e9, "median": 1e9},
        {"path": "fast", "best": 5e9, "median": 4e9},
    ],
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)


@pytest.fixture
def make_builds(tmp_path: Path) -> Callable[..., runs.Builds]:
    """Makes two fake builds; ``fails``: whether the patched one does."""

    def make(fails: bool = False, swapped: bool = False) -> runs.Builds:
        for name, speed, commit in ((STOCK, 10, "stock"), (PATCHED, 30, "ggml-ext-0.1.0")):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            fake = FAKE_BENCH.format(
                python=sys.executable,
                log=str(tmp_path / "log"),
                commit="stock" if swapped else commit,
                fails=fails and name == PATCHED,
                speed=speed,
            )
            (folder / "llama-bench").write_text(fake)
            (folder / "llama-bench").chmod(0o755)
        limits = tmp_path / "bench_limits"
        limits.write_text(f"#!/bin/sh\ncat <<'JSON'\n{json.dumps(LIMITS)}\nJSON\n")
        limits.chmod(0o755)
        return runs.Builds(tmp_path / STOCK, tmp_path / PATCHED, limits, 2)

    return make


def calls(tmp_path: Path) -> list[Any]:
    log = tmp_path / "log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


# --- models ---


@pytest.mark.parametrize("type_name", TYPES)
def test_a_model_is_what_it_says(type_name: str, tmp_path: Path) -> None:
    """Every matrix has the type, or a ratio would compare something else; the byte count is the file's."""
    model = Model(TINY, 2, type_name)
    reader = gguf.GGUFReader(build(model, tmp_path))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    matrices = {name: tensor for name, tensor in tensors.items() if "norm" not in name}
    assert len(matrices) == 2 * 7 + 2
    assert {tensor.tensor_type for tensor in matrices.values()} == {TYPES[type_name]}
    shapes = {name: tuple(int(n) for n in tensor.shape) for name, tensor in tensors.items()}
    assert shapes["blk.1.attn_q.weight"] == (256, 256)
    assert shapes["blk.1.attn_k.weight"] == shapes["blk.0.attn_v.weight"] == (256, 128)
    assert shapes["blk.0.ffn_down.weight"] == (512, 256)
    assert shapes["output.weight"] == shapes["token_embd.weight"] == (256, 300)
    assert shapes["blk.0.ffn_norm.weight"] == (256,)
    read = [tensor.n_bytes for name, tensor in matrices.items() if name != "token_embd.weight"]
    assert model.decode_bytes == sum(read)
    # The last layer's feed-forward part sees one token of the prompt only.
    assert model.prefill_macs == 2 * (2 * 256 * 256 + 2 * 128 * 256) + 3 * 512 * 256


def test_fq4_is_really_used() -> None:
    """Rows that are no multiple of 256 could not be FQ4; writing such a shape would fail late."""
    for shape in (SHAPES["1B"], SHAPES["0.5B"]):
        assert all(k % 256 == 0 for _, k in shape.block().values())
    assert sum(rows * k for rows, k in SHAPES["1B"].block().values()) * 16 == 973_078_528  # Llama-3.2-1B


@pytest.mark.parametrize("type_name", TYPES)
def test_llama_bench_runs_the_models(
    type_name: str, tmp_path: Path, patched_bin_dir: Path, stock_build: Path, tiny: None
) -> None:
    """The real programs take our arguments and files, and the parser takes their output."""
    builds = runs.Builds(stock_build, patched_bin_dir, tmp_path, 1)
    model = build(Model(TINY, 1, type_name), tmp_path)
    contender = Contender(PATCHED if type_name == "FQ4" else STOCK, type_name, "q8_0")
    group = replace(GROUP, contenders=(contender,), depth=32, warm_up=False, repetitions=2)
    run = runs.measure(builds, group, contender, 0, model)
    assert len(run.pp) == len(run.tg) == 2
    assert min(run.pp + run.tg) > 0


def test_a_model_is_written_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a file under the final name would be measured as if it were a model."""
    model = Model(TINY, 1, "Q4_0")
    with monkeypatch.context() as broken:
        broken.setattr("devtools.bench_cpu.models._matrix", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    path = build(model, tmp_path)
    stamp = path.stat().st_mtime_ns
    assert build(model, tmp_path).stat().st_mtime_ns == stamp
    others = [replace(model, layers=2), replace(model, shape=replace(TINY, vocabulary=301))]
    assert len({model.file_name(), *(other.file_name() for other in others)}) == 3


# --- ratios ---


def test_ratios_are_paired_by_round() -> None:
    """The ratio of medians would be 2 here, and a round that one contender lacks must not count."""
    found = results.paired({0: 10.0, 1: 20.0, 2: 90.0, 4: 1.0}, {0: 10.0, 1: 10.0, 2: 30.0, 3: 1.0})
    assert found == results.Ratio(2.0, 1.0, 3.0, 3)
    assert results.paired({0: 1.0}, {1: 1.0}) is None


def run_of(group: Group, contender: Contender, number: int, pp: float, tg: float) -> runs.Run:
    return runs.Run(group.name, str(contender), number, (pp,), (tg,), 1.0, 0.5 if number else 0.0)


def test_shares_use_the_limits_of_their_round(tiny: None) -> None:
    """On a shared machine the bandwidth moves; a share against another round's would be above one."""
    model = Model(TINY, 1, "FQ4")
    slow = {**LIMITS, "read_bytes_per_s": {"best": 2e9, "median": 1e9}}
    speeds = [run_of(GROUP, FQ4, 0, 1e9 / model.prefill_macs, 2e9 / model.decode_bytes)]
    speeds.append(run_of(GROUP, FQ4, 1, 2.5e9 / model.prefill_macs, 1e9 / model.decode_bytes))
    found = results.Results([GROUP], speeds, {(GROUP.name, 0): LIMITS, (GROUP.name, 1): slow})
    decode = found.share(GROUP.name, FQ4, "tg")
    prefill = found.share(GROUP.name, FQ4, "pp")
    assert decode is not None
    assert decode.median == pytest.approx(0.5)
    assert prefill is not None
    assert (prefill.low, prefill.high) == pytest.approx((0.2, 0.5))  # of the fastest instruction
    assert found.disturbed() == 1


@pytest.mark.parametrize(("speed", "text"), [(15.0, "met"), (14.9, "not met"), (None, "not measured")])
def test_lines_are_judged(speed: float | None, text: str) -> None:
    """1.5 times Q4_0 in prefill, no less."""
    groups = plan.groups(Wanted())
    group = groups[0]
    made = [run_of(group, Q4_0, 0, 10.0, 1.0)]
    if speed is not None:
        made.append(run_of(group, FQ4, 0, speed, 1.0))
    verdicts = results.verdicts(results.Results(groups, made, {}))
    assert verdicts[0].text == text
    assert {verdict.text for verdict in verdicts[6:]} == {"not measured"}


def test_every_line_is_measured_by_a_default_run() -> None:
    """A line whose group or contenders nobody runs would stay "not measured" for ever."""
    groups = {group.name: group for group in plan.groups(Wanted())}
    assert len(results.LINES) == 14
    for line in results.LINES:
        assert line.ours in groups[line.group].contenders
        if line.other is not None:
            assert (line.ours, line.other) in groups[line.group].pairs()


def test_stock_never_runs_fq4_and_turns_alternate() -> None:
    """Stock refuses the type; and with one fixed order a drift would favour the same contender each time."""
    for group in plan.groups(Wanted()):
        assert Contender(STOCK, "FQ4") not in group.contenders
        assert group.order(1) == group.order(0)[::-1]


def test_quick_and_only() -> None:
    """What the options promise."""
    quick = plan.groups(Wanted(quick=True))
    assert [group.name for group in quick] == ["1B, short", "1B, depth 4096"]
    only = plan.groups(Wanted(parts=("decode",), types=("FQ4", "IQ4_XS"), shapes=("1B",), rounds=2, layers=3))
    assert [(group.prompt, group.generated, group.rounds, group.layers) for group in only] == [(0, 128, 2, 3)]
    assert only[0].contenders == (Contender(STOCK, "IQ4_XS"), FQ4)
    with pytest.raises(GgmlExtError, match="nothing to measure"):
        plan.groups(Wanted(parts=("kv",), shapes=("0.5B",)))


# --- runs ---


def test_a_run_is_resumed(tmp_path: Path, make_builds: Callable[..., runs.Builds], tiny: None) -> None:
    """Nothing is measured twice, a torn line is measured again, and without resume all is new."""
    builds = make_builds()
    path = runs.journal_path(tmp_path, builds, [GROUP])
    runs.measure_all(builds, [GROUP], tmp_path, runs.Journal(path, resume=False))
    assert len(calls(tmp_path)) == 4
    assert [commit for commit, _ in calls(tmp_path)] == ["stock", "ggml-ext-0.1.0", "ggml-ext-0.1.0", "stock"]

    path.write_text(path.read_text()[:-10])
    resumed = runs.Journal(path, resume=True)
    assert runs.pending([GROUP], resumed) == [(GROUP, Q4_0, 1)]
    runs.measure_all(builds, [GROUP], tmp_path, resumed)
    assert len(calls(tmp_path)) == 5
    found = results.Results([GROUP], resumed.runs, resumed.limits)
    assert found.ratio(GROUP.name, "pp", FQ4, Q4_0) == results.Ratio(31 / 11, 31 / 11, 31 / 11, 2)
    assert set(resumed.limits) == {(GROUP.name, 0), (GROUP.name, 1)}

    more = replace(GROUP, rounds=3)
    assert runs.journal_path(tmp_path, builds, [more]) == path
    assert len(runs.pending([more], runs.Journal(path, resume=True))) == 2
    assert len(runs.pending([GROUP], runs.Journal(path, resume=False))) == 4


def test_another_task_or_build_has_another_journal(
    tmp_path: Path, make_builds: Callable[..., runs.Builds], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results of another build, thread count, depth or switch must not be resumed from."""
    builds = make_builds()
    paths = [runs.journal_path(tmp_path, builds, [GROUP])]
    paths.append(runs.journal_path(tmp_path, replace(builds, threads=1), [GROUP]))
    paths.append(runs.journal_path(tmp_path, builds, [replace(GROUP, depth=4)]))
    with monkeypatch.context() as switch:
        switch.setenv("GGML_EXT_ATTN", "off")
        paths.append(runs.journal_path(tmp_path, builds, [GROUP]))
    (builds.patched / "libggml-cpu.so").write_text("new")
    paths.append(runs.journal_path(tmp_path, builds, [GROUP]))
    assert len(set(paths)) == 5


def test_llama_bench_gets_the_task(
    tmp_path: Path, make_builds: Callable[..., runs.Builds], tiny: None
) -> None:
    """Both cache types, flash attention and the depth, or stock would refuse or measure something else."""
    group = replace(GROUP, contenders=(replace(Q4_0, cache="q8_0"),), rounds=1, depth=64, warm_up=False)
    builds = make_builds()
    runs.measure_all(builds, [group], tmp_path, runs.Journal(tmp_path / "runs", resume=False))
    [(_, words)] = calls(tmp_path)
    option = dict(itertools.pairwise(words))
    wanted = {
        "-p": "8",
        "-n": "4",
        "-d": "64",
        "-ctk": "q8_0",
        "-ctv": "q8_0",
        "-fa": "1",
        "-t": "2",
        "-r": "1",
    }
    assert {name: option[name] for name in wanted} == wanted
    assert "--no-warmup" in words


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"fails": True}, "patched FQ4: llama-bench failed: main: error: failed to load model"),
        ({"swapped": True}, "the folder of the patched build has commit stock"),
    ],
)
def test_a_failed_run_is_one_line(
    how: dict[str, bool],
    message: str,
    tmp_path: Path,
    make_builds: Callable[..., runs.Builds],
    tiny: None,
) -> None:
    """And what was measured before it stays."""
    builds = make_builds(**how)
    journal = runs.Journal(tmp_path / "runs", resume=False)
    with pytest.raises(GgmlExtError, match=message) as caught:
        runs.measure_all(builds, [GROUP], tmp_path, journal)
    assert "\n" not in str(caught.value)
    assert len(runs.Journal(tmp_path / "runs", resume=True).runs) == 1


# --- the program ---


def program(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "devtools.bench_cpu", *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(Path(plan.__file__).parents[2])}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_a_whole_run(
    tmp_path: Path, make_builds: Callable[..., runs.Builds], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables, JSON and document come from the same results and hold switches but no paths of the machine; a
    second run with --resume measures nothing."""
    builds = make_builds()
    document = tmp_path / "performance.md"
    monkeypatch.setenv("GGML_EXT_ATTN", "off")
    monkeypatch.setenv("OMP_FOLDER", str(tmp_path))
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    options = ["--repository", tmp_path, "--dir", tmp_path / "models", "--limits", builds.limits]
    options += ["--stock", builds.stock, "--patched", builds.patched, "--types", "FQ4,Q4_0", "--layers", 1]
    options += ["--rounds", 1, "--only", "decode", "--shapes", "0.5B", "--threads", 2]
    options += ["--json", tmp_path / "out.json", "--update", document]
    done = program(*options)
    assert done.returncode == 0, done.stderr
    assert "not measured" in done.stdout

    found = json.loads((tmp_path / "out.json").read_text())
    assert found["version"] == report.JSON_VERSION
    assert found["machine"]["threads"] == 2
    assert found["machine"]["compiler"] == "gcc 1.2.3"
    [group] = found["groups"]
    assert group["limits"]["0"]["macs_path"] == "fast"
    ratio = next(ratio for ratio in group["ratios"] if ratio["ours"] == "patched FQ4")
    assert ratio["median"] == pytest.approx(31 / 11)
    assert len(found["lines"]) == len(results.LINES)

    text = document.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "| tg128 | patched FQ4 | stock Q4_0 | 2.818 |" in text
    assert "old" not in text
    assert "GGML_EXT_ATTN=off" in text
    assert str(tmp_path) not in text

    n_calls = len(calls(tmp_path))
    assert program(*options, "--resume").returncode == 0
    assert len(calls(tmp_path)) == n_calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--types", "Q9_9"], "unknown type: Q9_9; choose from FQ4"),
        (["--only", "speed"], "unknown part: speed"),
        (["--stock", "/nowhere"], "no stock llama-bench in /nowhere"),
        (["--limits", "/nowhere"], "no program /nowhere"),
        (["--dir", "/proc/nowhere"], "/proc/nowhere"),
        (["--update", "/nowhere.md", "--types", "Q4_0"], "/nowhere.md"),
    ],
)
def test_errors_are_one_line(
    options: list[str], message: str, tmp_path: Path, make_builds: Callable[..., runs.Builds]
) -> None:
    """And come before anything is measured."""
    builds = make_builds()
    usual = ["--repository", tmp_path, "--stock", builds.stock, "--patched", builds.patched]
    done = program(*usual, "--limits", builds.limits, "--layers", 1, "--rounds", 1, *options)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("bench-cpu: error: ")
    assert len(done.stderr.splitlines()) == 1
    assert calls(tmp_path) == []


def test_a_document_without_markers_is_left_alone(tmp_path: Path) -> None:
    """Guessing a place would overwrite somebody's text."""
    document = tmp_path / "page.md"
    document.write_text("text")
    with pytest.raises(GgmlExtError, match="lacks the lines"):
        report.update(document, "tables")
    assert document.read_text() == "text"
