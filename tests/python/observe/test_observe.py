"""ggml-ext observe: what it writes, that it goes on, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

import models
import tiny_bpe
from eval_models import make_model, text_of
from ggml_ext.cli import observe as cli_observe
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.hf import folder as hf
from ggml_ext.methods.calibrate import folder as calibration_folder
from ggml_ext.observe import estimate as estimates
from ggml_ext.observe import prepare, run, state
from ggml_ext.observe.observer import Observer
from ggml_ext.observe.prepare import Request
from ggml_ext.observe.reader import Observation
from ggml_ext.observe.run import Observed, observe
from ggml_ext.observe.sites import Table, parse
from ggml_ext.observe.state import ABSMAX, SAMPLES, load_state

CTX, WINDOWS = 16, 60
BATCH = 2 * CTX

COMMAND = f"""
import sys
from ggml_ext.cli.entry import main
from ggml_ext.observe import prepare, run
prepare.BATCH_TOKENS, run.COMMIT_SECONDS = {BATCH}, float(sys.argv.pop(1))
main()
"""
"""ggml-ext with small batches, whose sums are committed every so many seconds."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m.gguf", kind=Type.F32, blocks=2, experts=4)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(text_of(900))
    return path


@pytest.fixture
def request_of(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    monkeypatch.setattr(prepare, "BATCH_TOKENS", BATCH)
    return Request(model, text, samples=WINDOWS, ctx=CTX, threads=1)


@pytest.fixture(scope="module")
def finished(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("observed") / "o"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "BATCH_TOKENS", BATCH)
        quiet(Request(model, text, samples=WINDOWS, ctx=CTX, threads=1), folder)
    return folder


@pytest.fixture
def hf_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in Hugging Face layout, and its conversion at hand: the converter takes seconds."""
    base = tmp_path_factory.getbasetemp()
    made = models.llama_gguf(base)
    monkeypatch.setattr(hf, "to_gguf", lambda _folder, out, **_: shutil.copyfile(made, out))
    return models.llama_dir(base)


def quiet(request: Request, folder: Path) -> Observed:
    return observe(request, folder, warn=lambda _line: None)


def figures(folder: Path) -> dict[str, bytes]:
    names = {"sums": load_state(folder).sums, "absmax": ABSMAX, "samples": SAMPLES}
    return {what: (folder / name).read_bytes() for what, name in names.items()}


def refused(request: Request, folder: Path, message: str) -> None:
    with pytest.raises(GgmlExtError, match=message) as caught:
        quiet(request, folder)
    assert ";" in str(caught.value), "no remedy"


def started(model: Path, text: Path, folder: Path, commit: float, *more: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", COMMAND, str(commit), "observe", str(model), "-o", str(folder)]
    arguments += ["--calibration", str(text), "--samples", str(WINDOWS), "--ctx", str(CTX), "-t", "1", *more]
    return subprocess.Popen(
        arguments,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(child: subprocess.Popen[str], holds: Callable[[], bool]) -> None:
    while not holds():
        assert child.poll() is None, child.communicate()
        time.sleep(0.001)


def test_a_folder_holds_one_generation_when_it_is_done(request_of: Request, finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {"lock", "plan.json", "state.json", "sums-0.bin", ABSMAX, SAMPLES}
    (finished / "sums-1.bin").write_text("left by a run that was killed at its end")
    again = quiet(request_of, finished)
    assert not (finished / "sums-1.bin").exists()
    assert (again.done, again.windows) == (0, WINDOWS)
    assert "60 windows of 16 tokens, 0 of them observed now" in again.summary()


def test_killed_anywhere_the_figures_are_the_same(
    model: Path, text: Path, request_of: Request, finished: Path, tmp_path: Path
) -> None:
    """Byte for byte: sums that count a batch twice or not at all would show, and a state that names a file
    that is not whole."""
    folder, chance = tmp_path / "o", random.Random(4)
    seen = set()
    for _ in range(6):
        child = started(model, text, folder, chance.choice((0.0, 0.001, 0.002)))
        for _ in range(chance.randint(1, 3)):  # commits, of thirty: a machine's speed does not count
            before = load_state(folder)
            until(child, lambda before=before: load_state(folder) != before)  # type: ignore[misc]
        time.sleep(chance.random() * 0.002)
        child.kill()
        child.communicate()
        seen.add(load_state(folder).windows)
        if load_state(folder).windows > WINDOWS // 2:
            break
    assert len(seen) > 1
    assert 0 < quiet(request_of, folder).done < WINDOWS
    assert figures(folder) == figures(finished)
    assert not list(folder.glob(".*"))


def test_interrupted_it_goes_on(
    model: Path, text: Path, request_of: Request, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "o"
    child = started(model, text, folder, 0.0)
    until(child, lambda: load_state(folder).windows > 0)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate()
    done = load_state(folder).windows
    assert child.returncode == 130
    assert f"{folder}: {done} of 60 windows are done; the same command goes on there" in errors
    assert "Traceback" not in errors
    with pytest.raises(GgmlExtError, match=rf"{done} of 60 windows are observed; go on with the command"):
        Observation(folder)
    assert quiet(request_of, folder).done == WINDOWS - done
    assert figures(folder) == figures(finished)


def test_a_generation_counts_when_it_is_on_the_disk(
    request_of: Request, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure between the sums and the state leaves the last state, whose file nobody has written to."""
    folder, writes = tmp_path / "o", iter(range(1000))

    def fail(path: Path, content: str) -> None:
        if next(writes) == 3:
            raise OSError(errno.EIO, "pulled")
        path.write_text(content)

    with monkeypatch.context() as patch:
        patch.setattr(run, "COMMIT_SECONDS", 0.0)
        patch.setattr(state, "write_text", fail)
        with pytest.raises(OSError, match="pulled"):
            quiet(request_of, folder)
    assert load_state(folder).windows == 3 * BATCH // CTX
    assert quiet(request_of, folder).done == WINDOWS - 3 * BATCH // CTX
    assert figures(folder) == figures(finished)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ctx": 32}, "windows 60 there, .*ctx 16 there, 32 here"),
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"samples": 59}, "windows 60 there, 59 here"),
        ({"parse_special": True}, "parse_special False there, True here"),
        ({"memory": 550_000}, r"batch 32 there, 16 here"),
    ],
)
def test_other_settings_are_named(
    request_of: Request, finished: Path, change: dict[str, int], message: str
) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.name != "lock"}
    refused(replace(request_of, **change), finished, f"holds an observation with other settings .*{message}")
    assert before == {path.name: path.read_bytes() for path in finished.iterdir() if path.name != "lock"}


def test_another_text_or_model_is_named(request_of: Request, finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text(request_of.text.read_text() + "the end")
    refused(replace(request_of, text=other), finished, r"\(another calibration text\); repeat")
    changed = make_model(tmp_path / "m.gguf", kind=Type.F32, blocks=2, experts=4, noise=0.01)
    refused(replace(request_of, source=changed), finished, r"\(another model: file 1 of 1 has changed\)")
    copied = tmp_path / "copy.gguf"
    copied.write_bytes(request_of.source.read_bytes())
    assert quiet(replace(request_of, source=copied), finished).done == 0


@pytest.mark.parametrize(
    "files",
    [{"sums-0.bin": "mine"}, {"notes.txt": "mine"}, {"plan.json": '{"my": "plan"}'}, {"source.gguf": "mine"}],
)
def test_a_folder_with_other_files_is_refused(
    request_of: Request, tmp_path: Path, files: dict[str, str]
) -> None:
    folder = tmp_path / "o"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    refused(request_of, folder, "which no observation made; choose an empty folder")
    assert {path.name: path.read_text() for path in folder.iterdir()} == files


def test_an_observation_is_no_calibration(finished: Path, request_of: Request) -> None:
    with (
        pytest.raises(GgmlExtError, match=r"holds plan\.json, which no calibration made"),
        calibration_folder.held(finished, temporary=False),
    ):
        raise AssertionError
    assert quiet(request_of, finished).done == 0


def test_damaged_folders_are_refused(request_of: Request, tmp_path: Path) -> None:
    folder = tmp_path / "o"
    quiet(request_of, folder)
    os.truncate(folder / ABSMAX, 4)
    with pytest.raises(GgmlExtError, match=r"absmax\.bin: missing or damaged; delete"):
        Observation(folder)
    (folder / "state.json").write_text("{}]")
    refused(request_of, folder, r"state\.json: damaged .*; delete the folder")
    with pytest.raises(GgmlExtError, match="holds no observation; make one"):
        Observation(tmp_path)


def test_a_folder_that_convert_made_goes_with_it(request_of: Request, tmp_path: Path) -> None:
    folder = tmp_path / "o"
    observe(request_of, folder, temporary=True, warn=lambda _line: None)
    (folder / "notes").write_text("mine")
    run.discard(folder)
    assert [path.name for path in folder.iterdir()] == ["notes"]


def test_a_hugging_face_folder_is_converted_once(hf_folder: Path, tmp_path: Path, text: Path) -> None:
    request = Request(hf_folder, text, samples=4, ctx=CTX, threads=1)
    folder = tmp_path / "o"
    assert quiet(request, folder).done == 4
    made = (folder / "source.gguf").stat().st_ino
    assert quiet(request, folder).done == 0
    assert (folder / "source.gguf").stat().st_ino == made
    assert Observation(folder).site_of("blk.0.attn_q.weight") is not None


def test_a_split_model(tmp_path: Path, text: Path) -> None:
    """Fails if parts behind the first are not looked at."""
    request = Request(tiny_bpe.write_split(tmp_path / "split")[0], text, samples=4, ctx=CTX, threads=1)
    folder = tmp_path / "o"
    assert quiet(request, folder).done == 4
    plan = json.loads((folder / "plan.json").read_text())
    assert len(plan["model"]) > 1


def test_a_quantised_model(tmp_path: Path, text: Path) -> None:
    model = make_model(tmp_path / "m.gguf", kind=Type.Q8_0, blocks=1)
    assert quiet(Request(model, text, samples=4, ctx=CTX, threads=1), tmp_path / "o").done == 4


def test_nan_names_the_site(tmp_path: Path, text: Path) -> None:
    model = make_model(tmp_path / "m.gguf", kind=Type.F32, blocks=2)
    for tensor in gguf.GGUFReader(model, "r+").tensors:
        if tensor.name == "blk.1.attn_v.weight":
            tensor.data[3, 3] = np.nan
    request = Request(model, text, samples=4, ctx=CTX, threads=1)
    refused(request, tmp_path / "o", r"m\.gguf: blk\.1\.attn_output: reads NaN or Inf")


def test_matrices_that_are_never_read_are_named(
    request_of: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not vectors, such as the scales that few files have."""
    parts = {"others": {"blk.0.attn_norm.weight": "never", "token_embd.weight": "never"}}
    table = Observer.table
    monkeypatch.setattr(Observer, "table", lambda self: replace(table(self), **parts))
    lines: list[str] = []
    observe(request_of, tmp_path / "o", warn=lines.append)
    assert lines == [
        "no text makes llama.cpp read 1 tensor: token_embd.weight; there are no figures for them"
    ]


def with_one_row(table: Table) -> Table:
    return replace(table, sites=tuple(replace(site, rows=1) for site in table.sites))


def test_more_rows_than_there_is_room_for_are_an_error(
    request_of: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not figures that another site has written over."""
    table = Observer.table
    monkeypatch.setattr(Observer, "table", lambda self: with_one_row(table(self)))
    refused(request_of, tmp_path / "o", r"blk\.0\.ffn_down_exps: 64 rows of 32 tokens; please report")


def test_memory_bounds_the_batch(
    request_of: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "BATCH_TOKENS", 512)
    request = replace(request_of, samples=40)

    def batch(memory: int) -> prepare.Prepared:
        changed = replace(request, memory=memory)
        return prepare.prepare(changed, request.source, request.text.read_bytes(), lambda _line: None)

    free = batch(1 << 30)
    assert free.n_seq == 32
    bound = batch(free.memory // 2)
    assert 4 <= bound.n_seq < 32
    assert bound.memory <= free.memory // 2
    refused(replace(request, memory=1000), tmp_path / "o", r"a window of 16 tokens needs .*, --memory allows")
    assert not (tmp_path / "o").exists()


def test_a_full_disk_is_said(request_of: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(request_of, tmp_path / "o", r"no room for .* \(No space left on device\); make room")


def test_a_dry_run_writes_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    child = started(model, text, tmp_path / "o", 60, "--dry-run", "--json", str(tmp_path / "dry.json"))
    out, errors = child.communicate()
    assert child.returncode == 0, errors
    assert [path.name for path in tmp_path.iterdir()] == ["dry.json"]
    found = json.loads((tmp_path / "dry.json").read_text())
    assert out.splitlines()[-1] == f"{tmp_path / 'o'}: nothing was written"
    assert (found["windows"], found["ctx"], found["batch"]) == (WINDOWS, CTX, BATCH)
    assert 0 < found["forward"] < found["seconds"] < 60
    assert found["mapped"] == model.stat().st_size


def test_a_dry_run_knows_the_disk(
    request_of: Request, finished: Path, hf_folder: Path, tmp_path: Path
) -> None:
    """Of a Hugging Face folder too, which is converted into a file that does not stay."""
    found = estimates.estimate(request_of, tmp_path / "o", warn=lambda _line: None)
    sizes = {path.name: path.stat().st_size for path in finished.iterdir()}
    assert found.disk["two generations of sums"] == 2 * sizes["sums-0.bin"]
    assert found.disk["samples"] == sizes[SAMPLES] + sizes[ABSMAX]
    folder = replace(request_of, source=hf_folder, samples=4)
    assert estimates.estimate(folder, tmp_path / "o", warn=lambda _line: None).disk["source.gguf"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "n_bytes"), [("8G", 8 << 30), ("512m", 512 << 20), ("1.5 GiB", 3 << 29), ("1000", 1000)]
)
def test_sizes(value: str, n_bytes: int) -> None:
    assert cli_observe.size(value) == n_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"sites": [{"n": 0, "rows": 1, "anchor": "a", "experts": 0, "readers": [], "values": []}]}',
        '{"sites": [{"n": 4, "rows": 0, "anchor": "a", "experts": 0, "readers": [], "values": []}]}',
        '{"sites": [{"n": 4, "anchor": "a", "experts": 0, "readers": [], "values": []}]}',
        '{"sites": [{"n": 4, "rows": 1, "anchor": "a", "experts": 0, "readers": [{}], "values": []}]}',
        '{"sites": [{"n": 4}]}',
    ],
)
def test_tables_that_are_none(text: str) -> None:
    with pytest.raises(GgmlExtError, match="no table of sites"):
        parse(text)
