"""Files with transforms in their weights as sources: types alone may change, and the record of the transforms
stays.

What would break these: a conversion block by block that goes on from them and writes its own table in the
place of theirs, or that leaves a folder behind when it refuses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import transform_files
from eval_models import make_model, text_of
from ggml_ext.cli.entry import app
from ggml_ext.convert import convert
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.source import open_gguf
from ggml_ext.methods.calibrate import result
from ggml_ext.recipes import Options
from ggml_ext.runtime.llama import Model

IN_WEIGHTS = ("ggml_ext.transform.", "ggml_ext.site.", "ggml_ext.fold.", "ggml_ext.version")
TRANSFORMS = ["folded", "hadamard"]


@pytest.fixture(autouse=True)
def _one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("GGML_EXT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(text_of(2000))
    return path


def quietly(source: Path, out: Path, options: Options, **more: Any) -> None:
    convert(source, out, options=options, ctx=32, threads=1, warn=lambda _line: None, **more)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("plain") / "m.gguf", blocks=2)


@pytest.fixture(scope="module", params=TRANSFORMS)
def source(request: pytest.FixtureRequest, plain: Path, text: Path) -> Path:
    """An online transform, or a fold alone; its matrices in q8_0, which convert takes as a source."""
    out = plain.with_name(f"{request.param}.gguf")
    quietly(plain, out, Options("q8_0", request.param, "rtn", samples=4), calibration=text)
    return out


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize(
    "line",
    [
        "convert SRC -o OUT --type q6_k --transform none --rounding gptq --calibration TEXT",
        "convert SRC -o OUT --recipe stock4 --calibration TEXT",
        "convert SRC -o OUT --transform smoothquant --rounding rtn --calibration TEXT",
        "convert SRC -o OUT --transform smoothquant --observed OBSERVED",
        "convert SRC -o OUT --rounding gptq --observed OBSERVED",
        "calibrate SRC -o OUT --recipe flat4 --calibration TEXT",
        "calibrate SRC -o OUT --rounding gptq --calibration TEXT --dry-run",
        "calibrate SRC -o OUT --rounding gptq --observed OBSERVED",
    ],
)
def test_block_by_block_is_refused_before_it_begins(
    source: Path, text: Path, tmp_path: Path, line: str
) -> None:
    places = {"SRC": source, "TEXT": text, "OUT": tmp_path / "o.gguf", "OBSERVED": tmp_path / "observed"}
    if "OBSERVED" in line:
        observe = ("observe", source, "-o", tmp_path / "observed", "--calibration", text)
        assert run(*observe, "--samples", "4", "--ctx", "32").exit_code == 0
    before = sorted(tmp_path.rglob("*"))
    done = run(*(places.get(word, word) for word in line.split()))
    assert done.exit_code == 1, done.output
    (error,) = (line for line in done.stderr.splitlines() if "error: " in line)
    assert f"{source}: has a transform in its weights already (ggml_ext." in error
    assert "; convert from the original float model, or change the type only" in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_finished_calibration_is_not_written_onto_it(
    source: Path, plain: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As versions without the check have made it."""
    calibration = tmp_path / "c"
    done = run(
        *("calibrate", plain, "-o", calibration, "--type", "q4_0", "--rounding", "gptq"),
        *("--calibration", text, "--ctx", "32", "--samples", "4", "-t", "1"),
    )
    assert done.exit_code == 0, done.output
    monkeypatch.setattr(result.plans, "require_model", lambda *_: None)
    with pytest.raises(GgmlExtError, match="has a transform in its weights already"):
        convert(source, tmp_path / "o.gguf", calibrated=calibration, warn=lambda _line: None)
    assert not (tmp_path / "o.gguf").exists()


@pytest.mark.parametrize("name", ["blk.0.attn_q.fq_l", "blk.0.attn_k.fq_h"])
def test_stored_factors_count_without_keys(plain: Path, text: Path, tmp_path: Path, name: str) -> None:
    model = transform_files.read(plain)
    transform_files.transform_heads(transform_files.transform(model), 32)
    model.ours.clear()
    model.tensors = {key: array for key, array in model.tensors.items() if ".fq_" not in key or key == name}
    path = model.write(tmp_path / "factors.gguf")
    with pytest.raises(GgmlExtError, match=rf"in its weights already \({name}\)"):
        quietly(path, tmp_path / "o.gguf", Options("q4_0", "none", "gptq"), calibration=text)


@pytest.mark.parametrize("options", [Options("q4_0", rounding="rtn"), Options("q4_0", rounding="imatrix")])
@pytest.mark.parametrize("type_name", ["q5_0", "q4_k_m"])
def test_types_alone_may_change(
    source: Path, text: Path, tmp_path: Path, options: Options, type_name: str
) -> None:
    """The keys stay, byte for byte, and the file loads."""
    out = tmp_path / "o.gguf"
    given = {"calibration": text} if options.rounding == "imatrix" else {}
    quietly(source, out, Options(type_name, rounding=options.rounding), **given)
    before, after = (open_gguf(path).keys for path in (source, out))
    kept = {name: entry for name, entry in before.items() if name.startswith(IN_WEIGHTS)}
    assert len(kept) > 3
    assert {name: after.get(name) for name in kept} == kept
    Model(out, threads=1).close()


def test_activations_of_few_bits_are_no_transform(plain: Path, text: Path, tmp_path: Path) -> None:
    """A float model's weights are its own whatever activations a file asks for."""
    model = transform_files.read(plain)
    model.ours = {"ggml_ext.version": 1, "ggml_ext.transform.name": "none", "ggml_ext.activation.bits": 4}
    path = model.write(tmp_path / "a4.gguf")
    quietly(path, tmp_path / "o.gguf", Options("q4_0", "none", "gptq", samples=4), calibration=text)
    assert (tmp_path / "o.gguf").exists()
