"""convert --kv-probe --kv-codebooks: one command, the file of three.

What would break these: a fit of the source's graph in the place of the file's, an output that appears before
it has everything, a second run that does not go on or goes on with something else, a folder that stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from eval_models import make_model
from ggml_ext.cli.entry import app
from ggml_ext.observe import kv_added
from ggml_ext.observe.kv_samples import SampleFile
from kv_paged import open_cache, read

SAMPLES, CTX = 5, {"PROBE_CTX": 64, "CODEBOOK_CTX": 256}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**CTX, "SAMPLES": SAMPLES}.items():
        monkeypatch.setattr(kv_added, name, value)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m.gguf", blocks=2)


def _run(*command: object) -> Result:
    return CliRunner().invoke(app, [*map(str, command), "-t", "1"])


def _convert(model: Path, out: Path, text: Path, *more: str) -> Result:
    method = ("--type", "q8_0", "--calibration", text)
    return _run("convert", model, "-o", out, *method, "--kv-probe", "--kv-codebooks", *more)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_command_is_three(model: Path, text: Path, tmp_path: Path) -> None:
    one, plain, probed, three = (tmp_path / f"{name}.gguf" for name in ("one", "plain", "probed", "three"))
    done = _convert(model, one, text)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{one}: ")
    assert lines[1].startswith("probes of 2 layers")
    assert lines[2].startswith("codebooks of 2 heads, 2 and 1 bits")
    assert _names(tmp_path) == ["one.gguf"]
    common = ("--calibration", text, "--samples", SAMPLES)
    for command in (
        ("convert", model, "-o", plain, "--type", "q8_0", "--calibration", text),
        ("kv-probe", plain, "-o", probed, *common, "--ctx", CTX["PROBE_CTX"]),
        ("kv-codebook", probed, "-o", three, *common, "--ctx", CTX["CODEBOOK_CTX"]),
    ):
        assert _run(*command).exit_code == 0
    tensors = [{t.name: t.data for t in gguf.GGUFReader(path).tensors} for path in (one, three)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, values in tensors[0].items():
        assert np.array_equal(values, tensors[1][name]), name
    with open_cache(one, "paged,cold=cq2,policy=probe", n_ctx=512) as context:
        assert np.isfinite(read(context, [5 + i % 100 for i in range(400)])).all()


def test_one_of_both(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = _run("convert", model, "-o", out, "--type", "q8_0", "--calibration", text, "--kv-codebooks")
    assert done.exit_code == 0, done.output
    names = [tensor.name for tensor in gguf.GGUFReader(out).tensors]
    assert [name for name in names if ".kv_" in name and ".kv_cq" not in name] == []
    assert sum(".kv_cq" in name for name in names) == 8


def test_a_recipe_with_transforms(model: Path, text: Path, tmp_path: Path) -> None:
    """Of the file's own graph: the source's has other keys where a fold has scaled them."""
    out = tmp_path / "out.gguf"
    done = _run(
        *("convert", model, "-o", out, "--type", "q8_0", "--transform", "smoothquant", "--rounding", "rtn"),
        *("--calibration", text, "--ctx", "64", "--kv-probe", "--kv-codebooks"),
    )
    assert done.exit_code == 0, done.output
    assert _names(tmp_path) == ["out.gguf"]
    with open_cache(out, "paged,cold=cq2,policy=probe", n_ctx=512) as context:
        assert np.isfinite(read(context, [5 + i % 100 for i in range(400)])).all()


def test_interrupted_it_goes_on(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.gguf", tmp_path / "out.gguf"
    assert _convert(model, whole, text).exit_code == 0
    add = SampleFile.add

    def stopping(self: SampleFile, *arguments: Any) -> None:
        if self.windows == 2:
            raise KeyboardInterrupt
        add(self, *arguments)

    monkeypatch.setattr(SampleFile, "add", stopping)
    done = _convert(model, out, text)
    assert (done.exit_code, out.exists()) == (130, False), done.output
    assert "2 of 5 windows are done; the same command goes on there" in done.stderr
    folder = tmp_path / "out.gguf.kv"
    made = (folder / "source.gguf").stat()
    other = _convert(model, out, text, "--seed", "3")
    assert (other.exit_code, "begun with another model, text or options" in other.stderr) == (1, True)
    windows = []
    monkeypatch.setattr(SampleFile, "add", lambda *arguments: (windows.append(1), add(*arguments)))
    monkeypatch.setattr(kv_added, "_converted", None)  # it is not made again
    done = _convert(model, out, text)
    assert (done.exit_code, len(windows)) == (0, 3), done.output
    assert done.stdout.startswith(f"{out}: ")
    assert out.read_bytes() == whole.read_bytes()
    assert made.st_size < out.stat().st_size
    assert _names(tmp_path) == ["out.gguf", "whole.gguf"]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--keep", "["), "--keep"),
        (("--type", "q9"), "q9"),
        (("--imatrix", "nowhere.gguf"), "two sources of importances"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing(
    model: Path, text: Path, tmp_path: Path, more: tuple[str, ...], line: str
) -> None:
    done = _convert(model, tmp_path / "out.gguf", text, *more)
    assert (done.exit_code, line in done.stderr) == (1, True), done.output
    assert _names(tmp_path) == []


def test_a_text_that_is_read_once(model: Path, tmp_path: Path) -> None:
    done = _convert(model, tmp_path / "out.gguf", Path("/dev/null"))
    assert (done.exit_code, "/dev/null: no regular file" in done.stderr) == (1, True), done.output
    assert _names(tmp_path) == []
