"""Calibration block by block: what it writes, that it resumes, and what it refuses."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import models
import transform_files
from ggml_ext.convert import ConvertResult, convert
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.header import read_header, value
from ggml_ext.gguf.source import open_gguf
from ggml_ext.methods.calibrate import block as blockwise
from ggml_ext.methods.calibrate import blocks, estimate
from ggml_ext.methods.calibrate import run as calibrate
from ggml_ext.methods.calibrate.block_file import block_path, load, outside_path
from ggml_ext.methods.calibrate.plan import Request
from ggml_ext.observe.reader import Observation
from ggml_ext.recipes import Method, Options

CTX, SAMPLES = 32, 6


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def use_converted(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's converter takes seconds; its result for the tiny models is there already."""

    made = {
        models.llama_dir(base): models.llama_gguf(base),
        models.mixtral_dir(base): models.mixtral_gguf(base),
    }

    def copy(folder: Path, out: Path, **_options: Any) -> None:
        shutil.copyfile(made[folder], out)

    monkeypatch.setattr(calibrate.hf, "to_gguf", copy)


@pytest.fixture(scope="module")
def text(base: Path) -> Path:
    path = base / "calibrate.txt"
    path.write_text(models.TEXT * 6)
    return path


@pytest.fixture
def converted(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_converted(base, monkeypatch)


@pytest.fixture(scope="module")
def finished(base: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of request_for(base, text), calibrated; not to be changed."""
    folder = tmp_path_factory.mktemp("calibrated") / "c"
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        use_converted(base, patch)
        result = run(request_for(base, text), folder)
    assert result.done == models.LAYERS
    assert result.error is not None
    assert 0 < result.error < 0.05
    assert "2 blocks" in result.summary()
    return folder


def request_for(base: Path, text: Path, **more: Any) -> Request:
    method = Method("fq4", "smoothquant", "gptq", samples=SAMPLES)
    return replace(Request(models.llama_dir(base), text, method, ctx=CTX, threads=1), **more)


def run(request: Request, folder: Path) -> calibrate.CalibrateResult:
    return calibrate.calibrate(request, folder, warn=lambda _line: None)


def refused(request: Request, folder: Path, message: str) -> None:
    with pytest.raises(GgmlExtError, match=message) as caught:
        run(request, folder)
    assert ";" in str(caught.value), "no remedy"


def block_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("block-*"))}


def keys(path: Path) -> dict[str, Any]:
    return {name: value(entry) for name, entry in read_header(path).keys.items() if "token" not in name}


def types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.type_name for tensor in open_gguf(path).tensors}


def test_a_folder_holds_the_plan_and_the_blocks(base: Path, text: Path, finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == [
        "block-000.safetensors",
        "block-001.safetensors",
        "lock",
        "observation",
        "outside.safetensors",
        "plan.json",
        "source.gguf",
    ]
    stored, findings = load(block_path(finished, 0))
    changed = {"blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"}
    assert {name for name, tensor in stored.items() if tensor.type_name == "f32"} == changed
    assert findings.errors.keys() == stored.keys() - changed
    assert run(request_for(base, text), finished).done == 0
    plan = json.loads((finished / "plan.json").read_text())
    assert plan["types"]["blk.0.attn_q.weight"] == "fq4"
    assert plan["types"]["output.weight"] == "q6_k"
    assert plan["samples"] == SAMPLES
    assert Observation(finished / "observation").description.windows == SAMPLES
    assert {"torch", "numpy", "library", "ggml-ext"} <= plan["versions"].keys()


@pytest.mark.usefixtures("converted")
def test_convert_resumes_beside_the_output_and_tidies_up(
    base: Path, text: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the first block: the blocks stay, the same command goes on with the second."""
    out = tmp_path / "m.gguf"
    lines: list[str] = []

    def go() -> ConvertResult:
        options = Options(transform="smoothquant", rounding="gptq", samples=SAMPLES)
        return convert(
            models.llama_dir(base),
            out,
            options=options,
            calibration=text,
            ctx=CTX,
            threads=1,
            warn=lines.append,
        )

    done: list[int] = []

    def interrupted(sites: Any, *arguments: Any) -> Any:
        done.append(int(next(iter(sites)).split(".")[1]))
        if len(done) == 2:
            raise KeyboardInterrupt
        return blockwise.encode_block(sites, *arguments)

    monkeypatch.setattr(blocks, "encode_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go()
    folder = tmp_path / "m.gguf.calibration"
    assert lines[-1] == f"{folder}: 1 of 2 blocks are done; the same command goes on there"
    assert not out.exists()
    kept = block_files(folder)
    result = go()
    assert done == [0, 1, 1]
    assert list(tmp_path.iterdir()) == [out]
    assert result.quantized_bits_per_weight is not None
    assert kept.items() <= block_files(finished).items()
    convert(models.llama_dir(base), tmp_path / "again.gguf", calibrated=finished)
    assert (tmp_path / "again.gguf").read_bytes() == out.read_bytes()


def killed_when(appears: Path, command: list[str]) -> None:
    """Starts the command and kills it as soon as the file is there."""
    child = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    while not appears.exists():
        assert child.poll() is None, child.stderr.read() if child.stderr else ""
        time.sleep(0.002)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL


def test_killed_once_observed_and_after_a_block_the_result_is_the_same(
    base: Path, text: Path, finished: Path, tmp_path: Path
) -> None:
    """Byte for byte: a state outside the files, or a file that is there before it is whole, would show. The
    file is also that of the Hugging Face folder which the GGUF file was made of."""
    out = tmp_path / "m.gguf"
    folder = tmp_path / "m.gguf.calibration"
    model = models.llama_gguf(base)
    command = [sys.executable, "-m", "ggml_ext.cli.entry", "convert", str(model), "-o", str(out)]
    command += ["--calibration", str(text), "--transform", "smoothquant", "--rounding", "gptq", "-t", "1"]
    command += ["--ctx", str(CTX), "--samples", str(SAMPLES)]
    state = folder / "observation" / "state.json"
    killed_when(state, command)
    assert not block_files(folder)
    observed = state.stat().st_mtime_ns
    killed_when(folder / "block-000.safetensors", command)
    assert state.stat().st_mtime_ns == observed, "what is observed stays"
    kept = block_files(folder)
    assert kept.items() <= block_files(finished).items()
    assert not out.exists()
    subprocess.run(command, check=True, capture_output=True)
    convert(models.llama_dir(base), tmp_path / "whole.gguf", calibrated=finished)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "whole.gguf"]


@pytest.mark.usefixtures("converted")
def test_the_users_files_in_the_folder_stay(base: Path, text: Path, tmp_path: Path) -> None:
    """Refused before anything is written: what is there, the folder included, stays as it was."""
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "source.gguf").write_text("my only float model")
    (folder / ".backup.part").write_text("mine")
    refused(request_for(base, text), folder, "which no calibration made")
    assert sorted(path.name for path in folder.iterdir()) == [".backup.part", "source.gguf"]
    options = Options(transform="none", rounding="gptq", samples=SAMPLES)
    mine = tmp_path / "m.gguf.calibration"
    mine.mkdir()
    shutil.copyfile(text, mine / "mytext.txt")
    for calibration in (text, mine / "mytext.txt"):
        with pytest.raises(GgmlExtError, match=r"holds (mytext\.txt, which no|the input)"):
            convert(
                models.llama_dir(base), tmp_path / "m.gguf", options=options, calibration=calibration, ctx=CTX
            )
    assert [path.name for path in mine.iterdir()] == ["mytext.txt"]


@pytest.mark.usefixtures("converted")
def test_a_text_that_can_be_read_once(base: Path, text: Path, finished: Path, tmp_path: Path) -> None:
    """A pipe, as of <(...)."""
    pipe = tmp_path / "calibrate.txt"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(text.read_bytes()))
    writer.start()
    try:
        assert run(request_for(base, pipe), finished).done == 0, "the same text, the same calibration"
    finally:
        writer.join()


def test_a_folder_with_another_plan_is_refused(base: Path, text: Path, finished: Path) -> None:
    request = request_for(base, text)
    before = block_files(finished)
    refused(replace(request, ctx=CTX * 2), finished, r"\(ctx 32 there, 64 here\); repeat its settings")
    refused(replace(request, seed=3), finished, r"\(seed 0 there, 3 here\); repeat its settings")
    rtn = replace(request, method=replace(request.method, rounding="rtn"))
    refused(rtn, finished, r"\(rounding gptq there, rtn here; outside \['output.weight'\] there")
    typed = replace(request, type_for=[("ffn_down", "q6_k")])
    refused(typed, finished, r"types: blk.0.ffn_down.weight fq4 there, q6_k here and 1 more")
    other = text.with_name("other.txt")
    other.write_text(models.TEXT * 7)
    refused(replace(request, text=other), finished, "another calibration text")
    assert block_files(finished) == before


@pytest.mark.usefixtures("converted")
def test_damaged_and_busy_folders(base: Path, text: Path, finished: Path, tmp_path: Path) -> None:
    request = request_for(base, text)
    folder = shutil.copytree(finished, tmp_path / "c")
    last = block_path(folder, 1)
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(GgmlExtError, match=r"block-001\.safetensors: not a complete checkpoint"):
        convert(request.source, tmp_path / "m.gguf", calibrated=folder)
    last.unlink()
    with pytest.raises(GgmlExtError, match="unfinished, 1 of 2 blocks are missing"):
        convert(request.source, tmp_path / "m.gguf", calibrated=folder)
    shutil.copy(block_path(finished, 1), last)
    outside_path(folder).unlink()
    with pytest.raises(GgmlExtError, match=r"unfinished, output\.weight is missing"):
        convert(request.source, tmp_path / "m.gguf", calibrated=folder)
    assert run(request, folder).done == 0
    assert outside_path(folder).read_bytes() == outside_path(finished).read_bytes()
    os.truncate(folder / "observation" / "absmax.bin", 4)
    refused(request, folder, r"absmax\.bin: missing or damaged")
    with pytest.raises(GgmlExtError, match="a calibration of another model"):
        convert(models.mixtral_dir(base), tmp_path / "m.gguf", calibrated=finished)
    with pytest.raises(GgmlExtError, match="holds no calibration"):
        convert(request.source, tmp_path / "m.gguf", calibrated=tmp_path / "none")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(request, folder, "another run is using it")


@pytest.mark.usefixtures("converted")
def test_types_that_the_rounding_does_not_know_are_refused_at_once(
    base: Path, text: Path, tmp_path: Path
) -> None:
    request = request_for(base, text)
    other = replace(request, method=replace(request.method, type_name="iq3_s"))
    refused(other, tmp_path / "c", "--rounding gptq: knows no levels of type iq3_s; it knows fq4")
    assert not (tmp_path / "c").exists()


@pytest.mark.usefixtures("converted")
def test_other_types_are_rounded_by_importance(base: Path, text: Path, tmp_path: Path) -> None:
    """Q8_0, which Q4_K_M gives mixtures of eight experts, and types for rows that do not fit."""
    lines: list[str] = []
    request = request_for(base, text, type_for=[("0.attn_v", "q8_0")])
    calibrate.calibrate(request, tmp_path / "c", warn=lines.append)
    assert "gptq knows no levels of q8_0: imatrix for 1 tensor: blk.0.attn_v.weight" in lines
    few = "only 0.38 calibration tokens per channel of the widest matrix (512 channels)"
    assert [line for line in lines if line.startswith(few)]
    stored, findings = load(block_path(tmp_path / "c", 0))
    assert stored["blk.0.attn_v.weight"].type_name == "q8_0"
    assert findings.errors["blk.0.attn_v.weight"] < 1e-4


@pytest.mark.usefixtures("converted")
def test_the_file_says_how_it_was_made(base: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    options = Options("fq4", "hadamard", "gptq", "a4", SAMPLES)
    convert(models.llama_dir(base), out, options=options, calibration=text, ctx=CTX, warn=lambda _line: None)
    meta = keys(out)
    assert meta["ggml_ext.transform.name"] == "hadamard"
    assert meta["ggml_ext.rounding"] == "gptq"
    assert (meta["ggml_ext.activation.bits"], meta["ggml_ext.activation.group"]) == (4, 0)
    assert meta["ggml_ext.calibration.samples"] == SAMPLES
    assert meta["ggml_ext.calibration.length"] == CTX
    assert meta["ggml_ext.version"] == 2
    assert len(meta["ggml_ext.transform.hadamard"]) == len(meta["ggml_ext.site.online"]) == 4 * models.LAYERS
    assert meta["ggml_ext.error.kind"] == "output"
    errors = dict(zip(meta["ggml_ext.error.tensors"], meta["ggml_ext.error.values"], strict=True))
    rounded = {name for name, kind in types(out).items() if name[:4] == "blk." and kind == "fq4"}
    assert errors.keys() == {*rounded, "output.weight"}
    assert all(0 < error < 0.1 for error in errors.values())
    assert meta["general.file_type"] == 200


@pytest.mark.usefixtures("converted")
def test_folded_transforms_and_stock_types_make_a_stock_file(
    base: Path, text: Path, stock_build: Path, tmp_path: Path
) -> None:
    """Unpatched llama.cpp runs it, and to f32 it is the same function."""
    logits = []
    source, f32, mixed = (tmp_path / f"{name}.gguf" for name in ("source", "f32", "mixed"))
    convert(models.llama_gguf(base), source, type_name="f32")
    for out, type_name, rounding in ((f32, "f32", "rtn"), (mixed, "q4_k_m", "gptq")):
        options = Options(type_name, "smoothquant", rounding, None, SAMPLES)
        convert(models.llama_dir(base), out, options=options, calibration=text, ctx=CTX)
    assert keys(mixed)["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_M
    for path in (source, f32, mixed):
        result = transform_files.run(stock_build, path, tmp_path / "out.npy")
        assert result.returncode == 0, result.stderr[-2000:]
        logits.append(np.load(tmp_path / "out.npy"))
    largest = np.abs(logits[0]).max()
    assert 0 < np.abs(logits[0] - logits[1]).max() <= 1e-3 * largest
    assert 1e-3 * largest < np.abs(logits[0] - logits[2]).max() < 0.5 * largest


@pytest.mark.usefixtures("converted")
def test_experts_are_rounded_by_what_reached_them(base: Path, text: Path, tmp_path: Path) -> None:
    request = request_for(base, text, source=models.mixtral_dir(base))
    run(request, tmp_path / "c")
    stored, findings = load(block_path(tmp_path / "c", 0))
    down = stored["blk.0.ffn_down_exps.weight"]
    assert down.dims == (models.FFN, models.HIDDEN, models.EXPERTS)
    assert down.read().shape[0] == models.HIDDEN * models.EXPERTS
    assert stored["blk.0.ffn_gate_inp.weight"].type_name == "f32"
    assert findings.errors["blk.0.ffn_down_exps.weight"] < 0.02


def test_a_dry_run_knows_the_disk(base: Path, text: Path, finished: Path, tmp_path: Path) -> None:
    """And leaves nothing there."""
    found = estimate.estimate(request_for(base, text, source=models.llama_gguf(base)), tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
    files = sum(map(len, block_files(finished).values()))
    assert files < found.disk["block files"] < 2 * files
    observed = {path.name: path.stat().st_size for path in (finished / "observation").iterdir()}
    assert found.disk["samples"] == observed["samples.bin"] + observed["absmax.bin"]
    assert found.seconds.keys() == {"observing", "transforms", "rounding"}
    assert min(found.seconds.values()) > 0
    assert found.memory > 9 * 8 * models.FFN**2
