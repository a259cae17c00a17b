"""convert and calibrate with --observed: what observing anew would give, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from eval_models import make_model, text_of
from ggml_ext.cli import entry as cli
from ggml_ext.convert import convert
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.source import open_gguf
from ggml_ext.hf import folder as hf
from ggml_ext.methods.calibrate import block as blockwise
from ggml_ext.methods.calibrate import blocks, estimate
from ggml_ext.methods.calibrate.plan import Request as Calibration
from ggml_ext.observe.prepare import Request
from ggml_ext.observe.reader import Observation
from ggml_ext.observe.run import observe
from ggml_ext.recipes import Method, Options

CTX, SAMPLES = 32, 80
"""2560 tokens: 1024 sample rows are fewer than all of them."""

GPTQ = Options("q4_0", "smoothquant", "gptq")
A4 = Options("q4_0", "hadamard", "gptq", "a4")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGML_EXT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def model(base: Path) -> Path:
    return make_model(base / "to-observe.gguf", blocks=2)


@pytest.fixture(scope="module")
def text(base: Path) -> Path:
    path = base / "observed.txt"
    path.write_text(text_of(2000))
    return path


def quiet(_line: str) -> None:
    pass


def request_for(model: Path, text: Path, **more: Any) -> Request:
    return replace(Request(model, text, samples=SAMPLES, ctx=CTX, threads=1, sample_rows=4096), **more)


@pytest.fixture(scope="module")
def observed(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An observation with the rows that 4-bit activations need."""
    folder = tmp_path_factory.mktemp("observed") / "o"
    assert observe(request_for(model, text), folder, warn=quiet).windows == SAMPLES
    return folder


def made(model: Path, out: Path, options: Options, **more: Any) -> bytes:
    convert(model, out, options=options, threads=1, warn=quiet, **more)
    return out.read_bytes()


@pytest.mark.parametrize("options", [GPTQ, A4], ids=["gptq", "a4"])
def test_the_file_is_the_one_that_observing_anew_gives(
    model: Path, text: Path, observed: Path, tmp_path: Path, options: Options
) -> None:
    """To the last byte, keys of origin included: neither figures nor the rows of the sample are others."""
    settings = {"options": replace(options, samples=SAMPLES), "calibration": text, "ctx": CTX}
    expected = made(model, tmp_path / "anew.gguf", **settings)
    before = {path: path.stat().st_mtime_ns for path in observed.iterdir()}
    assert made(model, tmp_path / "m.gguf", options, observed=observed) == expected
    if options is GPTQ:
        assert made(model, tmp_path / "m.gguf", **settings, observed=observed) == expected
    assert {path: path.stat().st_mtime_ns for path in observed.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anew.gguf", "m.gguf"]


@pytest.mark.parametrize("type_name", ["q4_0", "q4_k_m"])
def test_importances_of_an_observation(model: Path, text: Path, tmp_path: Path, type_name: str) -> None:
    """Of the same windows they are those that convert computes itself. The folder does not know the text's
    name."""
    observe(request_for(model, text, samples=None, importances=True), tmp_path / "o", warn=quiet)
    options = Options(type_name, rounding="imatrix")
    expected = made(model, tmp_path / "anew.gguf", options, calibration=text, ctx=CTX)
    named = made(model, tmp_path / "m.gguf", options, calibration=text, observed=tmp_path / "o")
    assert named == expected
    alone = made(model, tmp_path / "m.gguf", options, observed=tmp_path / "o")
    assert f"{text.stem}-".encode() in expected
    assert f"{text.stem}-".encode() not in alone
    weights = open_gguf(tmp_path / "m.gguf").tensors[0].offset
    assert alone[weights:] == expected[open_gguf(tmp_path / "anew.gguf").tensors[0].offset :]


def test_moments_have_importances(model: Path, observed: Path, tmp_path: Path) -> None:
    plain = made(model, tmp_path / "m.gguf", Options("q4_0"))
    weighted = made(model, tmp_path / "m.gguf", Options("q4_0"), observed=observed)
    assert weighted[-10000:] != plain[-10000:]


def refused(model: Path, out: Path, match: str, options: Options = GPTQ, **more: Any) -> None:
    before = sorted(out.parent.iterdir())
    with pytest.raises(GgmlExtError, match=match) as caught:
        convert(model, out, options=options, threads=1, warn=quiet, **more)
    assert "; " in str(caught.value), "no remedy"
    assert sorted(out.parent.iterdir()) == before


def test_other_settings_are_refused(model: Path, text: Path, observed: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "m.gguf", tmp_path / "other.txt"
    other.write_text("another text")
    for options in (GPTQ, Options("q4_0")):
        settings = {"options": options, "observed": observed}
        refused(model, out, r"--calibration .*other.txt is another text", calibration=other, **settings)
        refused(model, out, r"other settings \(--ctx 32 there, 64 here\)", ctx=64, **settings)
        refused(model, out, r"\(--seed 0 there, 7 here\); leave", seed=7, **settings)
        refused(model, out, r"\(no --parse-special there\)", parse_special=True, **settings)
        few = {**settings, "options": replace(options, samples=4)}
        refused(model, out, r"\(--samples 80 there, 4 here, --ctx 32 there, 64 here\)", ctx=64, **few)


def test_other_models_are_refused(base: Path, model: Path, observed: Path, tmp_path: Path) -> None:
    out, changed = tmp_path / "m.gguf", make_model(tmp_path / "other.gguf", blocks=2, noise=0.01)
    copy = shutil.copyfile(model, tmp_path / "copy.gguf")
    assert made(copy, out, Options("q4_0"), observed=observed)
    out.unlink()
    for options in (GPTQ, Options("q4_0")):
        message = r"of another model than .*other\.gguf \(file 1 of 1 has changed\); give the one"
        refused(changed, out, message, options, observed=observed)
        refused(models.llama_dir(base), out, "of another model than", options, observed=observed)


def test_another_version_is_said(model: Path, observed: Path, tmp_path: Path) -> None:
    copy, lines = shutil.copytree(observed, tmp_path / "o"), list[str]()
    plan = json.loads((copy / "plan.json").read_text())
    plan["versions"]["llama"] = "0"
    (copy / "plan.json").write_text(json.dumps(plan))
    options = Options("q4_0", rounding="imatrix")
    convert(model, tmp_path / "m.gguf", options=options, observed=copy, warn=lines.append)
    assert lines[0].startswith(f"{copy}: observed by another build of ggml-ext or llama.cpp")
    lines.clear()
    convert(model, tmp_path / "m.gguf", options=options, observed=observed, warn=lines.append)
    assert not [line for line in lines if "another build" in line]


def test_what_is_no_finished_observation_is_refused(
    model: Path, text: Path, observed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.gguf"
    refused(model, out, r"nowhere: holds no observation; make one", observed=tmp_path / "nowhere")
    begun = shutil.copytree(observed, tmp_path / "begun")
    (begun / "state.json").write_text('{"windows": 12, "sums": "sums-0.bin"}')
    refused(model, out, r"begun: 12 of 80 windows are observed; go on", observed=begun)
    (begun / "plan.json").write_text("{}")
    refused(model, out, r"plan\.json: not a plan of this version", observed=begun)


def test_what_the_method_needs_must_be_there(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    folder = tmp_path / "o"
    observe(request_for(model, text, sample_rows=1024), folder, warn=quiet)
    assert made(model, out, GPTQ, observed=folder)
    out.unlink()
    refused(
        model,
        out,
        r"o: has fewer than the 4096 sample rows .* activations a4 .*rows 4096",
        A4,
        observed=folder,
    )
    shutil.rmtree(folder)
    observe(request_for(model, text, samples=None, importances=True), folder, warn=quiet)
    refused(model, out, r"o: holds importances alone, and .* needs second moments", observed=folder)


def test_options_without_a_use_are_refused(model: Path, observed: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    rtn = Options("q4_0", rounding="rtn")
    refused(model, out, "uses no calibration; leave out --calibration, --observed", rtn, observed=observed)
    refused(model, out, "give one of the two", Options("q4_0"), observed=observed, imatrix=model)


def test_it_goes_on_with_the_same_observation_only(
    model: Path, text: Path, observed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block files of two observations, even of one text, are never mixed."""
    out, done = tmp_path / "m.gguf", list[int]()

    def interrupted(sites: Any, *arguments: Any) -> Any:
        done.append(int(next(iter(sites)).split(".")[1]))
        if len(done) == 2:
            raise KeyboardInterrupt
        return blockwise.encode_block(sites, *arguments)

    monkeypatch.setattr(blocks, "encode_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(model, out, GPTQ, observed=observed)
    folder = tmp_path / "m.gguf.calibration"
    assert not (folder / "observation").exists()
    fewer = tmp_path / "fewer"
    observe(request_for(model, text, samples=SAMPLES - 1), fewer, warn=quiet)
    refused(model, out, r"holds a calibration with other settings \(samples 80 there, 79", observed=fewer)
    again = {"calibration": text, "ctx": CTX, "options": replace(GPTQ, samples=SAMPLES)}
    refused(model, out, r"with other settings \(observed .* there, None here\)", **again)
    made(model, out, GPTQ, observed=observed)
    assert done == [0, 1, 1]
    assert not folder.exists()


def test_calibrate_needs_the_observation_no_longer_when_it_is_done(
    model: Path,
    observed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the command line, which takes what the text is from the folder."""
    copy, folder = shutil.copytree(observed, tmp_path / "o"), tmp_path / "c"
    options = ["--type", "q4_0", "--transform", "smoothquant", "-t", "1", "--observed", str(copy)]

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["ggml-ext", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        return capsys.readouterr().out

    said = call("calibrate", str(model), "-o", str(folder), *options, "--dry-run")
    assert "observing" not in said
    assert not folder.exists()
    assert "on 80 windows of 32 tokens" in call("calibrate", str(model), "-o", str(folder), *options)
    call("convert", str(model), "-o", str(tmp_path / "a.gguf"), *options)
    shutil.rmtree(copy)
    call("convert", str(model), "-o", str(tmp_path / "b.gguf"), "--calibrated", str(folder))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_dry_run_with_an_observation_of_a_hugging_face_folder(
    base: Path, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts its float model, which is made again, and nothing for observing."""
    monkeypatch.setattr(hf, "to_gguf", lambda _folder, out, **_: shutil.copyfile(model, out))
    source = models.llama_dir(base)
    observe(request_for(source, text), tmp_path / "o", warn=quiet)
    method = Method("q4_0", "smoothquant", "gptq")
    request = Calibration(source, None, method, ctx=CTX, threads=1, observed=tmp_path / "o")
    found = estimate.estimate(request, tmp_path / "c")
    assert found.disk.keys() == {"source.gguf", "block files"}
    assert found.disk["source.gguf"] == model.stat().st_size
    assert found.seconds.keys() == {"transforms", "rounding"}


def test_a_larger_sample_holds_the_smaller_one(
    model: Path, text: Path, observed: Path, tmp_path: Path
) -> None:
    """Row for row where a token has one row; where it has several, as many rows or a little fewer."""
    observe(request_for(model, text, sample_rows=1024), tmp_path / "o", warn=quiet)
    large, small = Observation(observed), Observation(tmp_path / "o")
    for site in small.table.sites:
        assert len(small.sample(site)) < len(large.sample(site))
        np.testing.assert_array_equal(large.sample(site, 1024), small.sample(site))
        np.testing.assert_array_equal(small.sample(site, 1024), small.sample(site))


def test_a_sample_of_experts(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(text_of(900))
    mixture = make_model(tmp_path / "m.gguf", blocks=1, experts=4)
    request = Request(mixture, tmp_path / "text", samples=64, ctx=16, threads=1, sample_rows=400)
    observe(request, tmp_path / "o", warn=quiet)
    seen = Observation(tmp_path / "o")
    site = seen.site_of("blk.0.ffn_down_exps.weight")
    assert site is not None
    assert 50 < len(seen.sample(site, 100)) <= 100 < len(seen.sample(site)) <= 400
