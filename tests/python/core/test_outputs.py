"""No output replaces an input or another output, whatever the command and however the file is spelt."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import pytest

import models
from command_paths import Parameter, parameters
from eval_models import make_model, text_of
from ggml_ext.cli import entry as cli
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.outputs import check_folder, check_outputs, parts
from ggml_ext.observe.prepare import Request
from ggml_ext.observe.run import observe

GGUFS = {
    "model.gguf": ["model.gguf"],
    "split/m-00001-of-00003.gguf": ["split/m-00001-of-00003.gguf", "split/m-00003-of-00003.gguf"],
}
HF = {"hf": ["hf/config.json", "hf/model.safetensors", "hf/tokenizer.model"]}
TEXTS = {"text.txt": ["text.txt"]}

INPUTS: dict[str, dict[str, list[str]]] = {
    "source": {**GGUFS, **HF},
    "model": GGUFS,
    "models": GGUFS,
    "base": GGUFS,
    "text": TEXTS,
    "calibration": TEXTS,
    "imatrix": {"importances.gguf": ["importances.gguf"]},
    "matrices": {"flat_matrices.pth": ["flat_matrices.pth"]},
    "observed": {"seen": ["seen/plan.json"]},
    "calibrated": {"cal": ["cal/source.gguf", "cal/plan.json"]},
}
"""What may be given for every parameter that is an input, and the files that are read then."""

SOURCES = {"llama.tar.gz": ["llama.tar.gz"]}  # of ggml-ext build

MODES = {"compare": ["", "--task retrieval"]}
"""Options that make another command of one; "" is the command itself."""

NEEDS = {"compare": ["text"], "compare --task retrieval": [], "build": ["source"]}
"""Parameters that are no required ones to typer, and are."""


class Case(NamedTuple):
    """A command line with OUT for an output, and the files that must not be given for it."""

    line: str
    files: list[str]
    folder: bool


def inputs_of(command: str, parameter: Parameter) -> dict[str, list[str]]:
    if command == "build":
        return SOURCES
    assert parameter.name in INPUTS, f"{command} {parameter.flag}: is it an output? if not, say what it reads"
    return INPUTS[parameter.name]


def line_of(command: str, mode: str, given: dict[str, str]) -> str:
    """The command line with what is needed, and ``given``: parameter -> value."""
    words = [command, mode]
    for its in parameters()[command]:
        if its.name in given:
            words += [its.flag, given[its.name]]
        elif its.is_output and its.required:
            words += [its.flag, "new"]
        elif its.is_path and (its.required or its.name in NEEDS.get(f"{command} {mode}".strip(), ())):
            words += [its.flag, next(iter(inputs_of(command, its)))]
    return " ".join(word for word in words if word)


def commands() -> Iterator[tuple[str, str, list[Parameter], list[Parameter]]]:
    """Command, mode, outputs, inputs."""
    for command, its in parameters().items():
        for mode in MODES.get(command, [""]):
            outputs = [p for p in its if p.is_output and not (mode and p.name == "report_out")]
            yield command, mode, outputs, [p for p in its if p.is_path and not p.is_output]


def cases() -> Iterator[Case]:
    for command, mode, outputs, inputs in commands():
        for out in outputs:
            for parameter in inputs:
                for value, files in inputs_of(command, parameter).items():
                    line = line_of(command, mode, {parameter.name: value, out.name: "OUT"})
                    yield Case(line, files, out.is_folder)


def pairs() -> Iterator[str]:
    """Command lines with the same file for two outputs."""
    for command, mode, outputs, _ in commands():
        files = [out for out in outputs if not out.is_folder]
        for one, other in combinations(files, 2):
            yield line_of(command, mode, {one.name: "both", other.name: "both"})


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of every kind of input."""
    folder = tmp_path_factory.mktemp("originals")
    make_model(folder / "model.gguf")
    make_model(folder / "other.gguf", noise=0.1)
    (folder / "text.txt").write_text(text_of(200))
    (folder / "flat_matrices.pth").write_bytes(b"no matrices, which is found out later")
    models.write_gguf(folder / "importances.gguf", {"a": np.ones(256, np.float32)})
    shutil.copytree(models.llama_dir(tmp_path_factory.getbasetemp()), folder / "hf")
    (folder / "cal").mkdir()
    (folder / "cal" / "plan.json").write_text("{}")
    shutil.copyfile(folder / "model.gguf", folder / "cal" / "source.gguf")
    request = Request(folder / "model.gguf", folder / "text.txt", samples=2, ctx=16, threads=1)
    observe(request, folder / "seen", warn=lambda _: None)
    (folder / "llama.tar.gz").write_bytes(b"no archive, which is found out later")
    (folder / "split").mkdir()
    _write_split(folder / "split" / "m.gguf")
    return folder


def _write_split(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=1)
    for i in range(3):
        writer.add_tensor(f"blk.{i}.attn_q.weight", np.ones((32, 256), np.float32))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def place(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = shutil.copytree(originals, tmp_path / "place")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GGML_EXT_CACHE", str(tmp_path / "cache"))
    return folder


def _relative(path: Path) -> Path:
    return Path("split", "..", path)


def _hard(path: Path) -> Path:
    os.link(path, "hard.link")
    return Path("hard.link")


def _symbolic(path: Path) -> Path:
    Path("symbolic.link").symlink_to(path)
    return Path("symbolic.link")


SPELLINGS = [Path, _relative, _hard, _symbolic]


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


def run(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str]:
    """Exit status and standard error of the command line."""
    monkeypatch.setattr(sys, "argv", ["ggml-ext", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0), capsys.readouterr().err


def refused(
    line: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> str:
    """The one line of a command that changes nothing."""
    before = content(place)
    status, error = run(line.split(), capsys, monkeypatch)
    assert content(place) == before, line
    assert status == 1, f"{line}: {error}"
    errors = [line for line in error.splitlines() if line.startswith("ggml-ext: error: ")]
    assert len(errors) == 1, error
    return errors[0]


@pytest.mark.parametrize(
    "case", list(cases()), ids=lambda case: case.line.replace(" ", "_").replace("/", ".")
)
def test_no_output_is_an_input(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    for name in case.files:
        if case.folder:
            line = case.line.replace("OUT", str(Path(name).parent))
            error = refused(line, place, capsys, monkeypatch)
            assert "holds " in error or "which ggml-ext fills" in error, line
            continue
        for spelt in SPELLINGS:
            line = case.line.replace("OUT", str(spelt(Path(name))))
            error = refused(line, place, capsys, monkeypatch)
            assert "same file" in error or "which ggml-ext fills" in error, line
            for link in place.glob("*.link"):
                link.unlink()


@pytest.mark.parametrize(
    "line",
    [
        *pairs(),
        "kv-probe model.gguf -o new --calibration text.txt --json new.probes",
        "kv-codebook model.gguf -o new --calibration text.txt --json new.codebooks",
    ],
)
def test_no_two_outputs_are_one_file(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    assert "two outputs" in refused(line, place, capsys, monkeypatch)


def test_every_command_with_outputs_is_among_them() -> None:
    """What is derived from the signatures: not nothing."""
    lines = " ".join(case.line.split()[0] for case in cases())
    fitted = ("calibrate", "observe", "kv-probe", "kv-codebook")
    for command in ("convert", *fitted, "perplexity", "compare", "bench", "build"):
        assert command in lines


@pytest.mark.parametrize("folder", ["hf", "."])
def test_a_calibration_does_not_take_its_inputs_folder(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    before = content(place)
    status, error = run(
        ["calibrate", "hf", "--calibration", "text.txt", "--recipe", "flat4", "-o", folder],
        capsys,
        monkeypatch,
    )
    assert status == 1
    assert "holds the input" in error
    assert content(place) == before


@pytest.mark.parametrize(
    "line",
    [
        "observe model.gguf -o new --calibration text.txt --json OUT",
        "observe model.gguf -o new --calibration text.txt --dry-run --json OUT",
        "convert model.gguf -o OUT --rounding gptq --observed new",
        "convert model.gguf -o OUT --type q4_0 --observed new",
        "convert model.gguf -o OUT --calibrated new",
        "calibrate model.gguf -o OUT --rounding gptq --observed new",
    ],
)
@pytest.mark.parametrize("out", ["new", "new/state.json", "new/more", "split/../new/more", "link/more"])
@pytest.mark.parametrize("there", [False, True])
def test_nothing_comes_into_a_folder_of_ours(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    out: str,
    there: bool,
) -> None:
    """Neither in the place of its files nor beside them, whether the folder is there yet or not."""
    (place / "link").symlink_to("new")
    if there:
        (place / "new").mkdir()
        (place / "new" / "state.json").write_text("{}")
    before = content(place)
    arguments = [out if word == "OUT" else word for word in line.split()]
    status, error = run(arguments, capsys, monkeypatch)
    assert (status, error.count("\n")) == (1, 1), error
    assert f"{out}: in new, which ggml-ext fills; choose" in error
    assert content(place) == before


@pytest.mark.parametrize("source", [".", "llama.tar.gz"])
def test_a_build_does_not_take_its_sources_folder(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    (place / "llama.tar.gz").write_bytes(b"an archive")
    before = content(place)
    status, error = run(["build", "--source", source, "-o", "."], capsys, monkeypatch)
    assert status == 1
    assert "holds the input" in error
    status, error = run(["build", "-o", "split"], capsys, monkeypatch)
    assert status == 1
    assert "holds other files" in error
    assert content(place) == before


def test_outputs_that_are_allowed(place: Path) -> None:
    """New files anywhere, old files that are no input, and earlier GGUF files in the model's folder."""
    model, hf = place / "model.gguf", place / "hf"
    check_outputs(place / "new.gguf", place / "other.json", None, inputs=[model, None, hf])
    check_outputs(place / "other.gguf", inputs=[model, place / "text.txt"])
    shutil.copyfile(model, hf / "earlier.gguf")
    check_outputs(hf / "earlier.gguf", hf / "new.gguf", inputs=[hf])
    check_outputs(place / "o.json", place / "new.json", inputs=[place / "hf"], folders=[place / "o"])
    check_folder(place / "new", [hf, place / "text.txt"])
    (place / "folder.link").symlink_to("split")
    with pytest.raises(GgmlExtError, match="same file"):
        check_outputs(
            place / "folder.link" / "m-00002-of-00003.gguf", inputs=[Path("split/m-00001-of-00003.gguf")]
        )
    with pytest.raises(GgmlExtError, match="two outputs"):
        check_outputs(place / "a", place / "hf" / ".." / "a")
    (place / "dangling").symlink_to(place / "none" / "x")
    with pytest.raises(GgmlExtError, match=r"dangling: the folder .*none does not exist"):
        check_outputs(place / "dangling")


def test_parts_of_a_split_model(place: Path) -> None:
    split = place / "split"
    for name in ("m-00001-of-00002.gguf", "other-00001-of-00003.gguf", "m-00001-of-00003.gguf.bak"):
        (split / name).touch()
    found = [path.name for path in parts(split / "m-00002-of-00003.gguf")]
    assert found == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert parts(place / "model.gguf") == [place / "model.gguf"]
    upper = place / "M-00001-of-00001.GGUF"
    upper.touch()
    assert parts(upper) == [upper]
