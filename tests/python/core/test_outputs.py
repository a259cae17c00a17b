"""No output replaces an input or another output, whatever the command and however the file is spelt."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

import models
from eval_models import make_model, text_of
from ggml_ext.cli import entry as cli
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.outputs import check_folder, check_outputs, parts

COMMANDS = [
    ("convert model.gguf -o OUT", "model.gguf"),
    ("convert model.gguf -o OUT --type q4_0 --imatrix importances.gguf", "model.gguf importances.gguf"),
    ("convert model.gguf -o OUT --calibration text.txt", "model.gguf text.txt"),
    ("convert split/m-00001-of-00003.gguf -o OUT", "split/m-00001-of-00003.gguf split/m-00003-of-00003.gguf"),
    ("convert hf -o OUT", "hf/config.json hf/model.safetensors hf/tokenizer.model"),
    ("convert hf -o OUT --calibrated cal", "hf/config.json cal/source.gguf cal/plan.json"),
    (
        "convert hf -o OUT --recipe flat4 --calibration text.txt --matrices flat_matrices.pth",
        "hf/model.safetensors text.txt flat_matrices.pth",
    ),
    ("perplexity model.gguf -f text.txt --ctx 64 --json OUT", "model.gguf text.txt"),
    ("perplexity split/m-00001-of-00003.gguf -f text.txt --ctx 64 --json OUT", "split/m-00002-of-00003.gguf"),
    *(
        (f"compare model.gguf other.gguf -f text.txt --ctx 64 --rounds 0 --layers 0 {option} OUT", inputs)
        for option in ("--json", "--report", "--plot")
        for inputs in ("model.gguf other.gguf text.txt",)
    ),
    ("compare model.gguf other.gguf -f text.txt --ctx 64 --rounds 0 --json new --report OUT", "new"),
    ("bench other.gguf model.gguf -p 8 -n 1 --rounds 1 --json OUT", "model.gguf other.gguf"),
    ("kv-probe model.gguf -o OUT --calibration text.txt --ctx 16", "model.gguf text.txt"),
    ("kv-probe model.gguf -o new --calibration text.txt --ctx 16 --json OUT", "model.gguf text.txt new"),
    ("kv-probe model.gguf -o new --calibration text.txt --json OUT", "new.probes"),
    ("inspect model.gguf --json OUT", "model.gguf"),
    (
        "inspect split/m-00001-of-00003.gguf --json OUT",
        "split/m-00001-of-00003.gguf split/m-00002-of-00003.gguf",
    ),
]


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


@pytest.mark.parametrize("spelt", SPELLINGS, ids=lambda spelt: spelt.__name__.strip("_"))
@pytest.mark.parametrize(
    "command", COMMANDS, ids=[f"{c.split()[0]}-{i}" for i, (c, _) in enumerate(COMMANDS)]
)
def test_no_output_is_an_input(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, str],
    spelt: Callable[[Path], Path],
) -> None:
    line, inputs = command
    for name in inputs.split():
        if name.startswith("new"):
            if spelt not in (Path, _relative):
                continue  # there is nothing to link to yet
            out = spelt(Path(name))
        else:
            out = spelt(Path(name))
        before = content(place)
        arguments = [str(out) if word == "OUT" else word for word in line.split()]
        status, error = run(arguments, capsys, monkeypatch)
        assert content(place) == before, line
        assert status == 1, line
        assert error.startswith("ggml-ext: error: "), error
        assert error.count("\n") == 1, error
        said = ("same file", "two outputs", "which ggml-ext fills")
        assert any(words in error for words in said), error
        for link in place.glob("*.link"):
            link.unlink()


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
