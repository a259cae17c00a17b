"""Models by their names on the Hugging Face Hub. The Hub is a folder here; nothing leaves the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import models
from ggml_ext.convert import convert
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.header import value
from ggml_ext.gguf.source import open_gguf
from ggml_ext.hf import hub
from ggml_ext.hf.hub import Name, parse

huggingface_hub = pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGML_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of org/tiny-llama at every revision; what is asked for lands in the folder "snapshots"."""
    files = tmp_path / "remote"

    def download(
        repo: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: str | None
    ) -> str:
        assert repo == "org/tiny-llama"
        folder = tmp_path / "snapshots" / (revision or COMMIT)
        names = [path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file()]
        for name in huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files / name, folder / name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return files


def got(tmp_path: Path) -> set[str]:
    root = tmp_path / "snapshots"
    return {"/".join(path.relative_to(root).parts[1:]) for path in root.rglob("*") if path.is_file()}


def test_a_model_is_converted_by_its_name(
    remote: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Which is its name in the file too; nothing is downloaded that conversion does not read."""
    folder = models.llama_dir(tmp_path_factory.getbasetemp())
    shutil.copytree(folder, remote)
    for extra in ("pytorch_model.bin", "flax_model.msgpack", "onnx/model.onnx", "original/model.safetensors"):
        (remote / extra).parent.mkdir(exist_ok=True)
        (remote / extra).write_bytes(bytes(8))
    lines: list[str] = []
    convert(Path("org/tiny-llama"), tmp_path / "a.gguf", type_name="f16", warn=lines.append)
    assert lines == []
    assert value(open_gguf(tmp_path / "a.gguf").keys["general.name"]) == "Tiny Llama"
    assert got(tmp_path) == {path.name for path in folder.iterdir()}


def test_pickled_weights_where_there_are_no_others(remote: Path, tmp_path: Path) -> None:
    remote.mkdir()
    for name in ("config.json", "pytorch_model.bin", "training_args.bin"):
        (remote / name).write_text("{}")
    assert hub.fetch(Path("org/tiny-llama@v1.0")).resolve() == tmp_path / "snapshots" / "v1.0"
    assert got(tmp_path) == {"config.json", "pytorch_model.bin"}


def test_what_the_converter_reads_in_folders_comes_along(remote: Path, tmp_path: Path) -> None:
    """Beside pickled weights too; other forms of the model do not."""
    wanted = {
        *("config.json", "modules.json", "rwkv_vocab_v20230424.txt", "tekken.json", "pytorch_model.bin"),
        *("1_Pooling/config.json", "2_Dense/model.safetensors", "additional_chat_templates/tools.jinja"),
    }
    for name in wanted | {
        "onnx/config.json",
        "onnx/model.onnx",
        "original/tokenizer.model",
        "eval.json",
        "0_Transformer/model.safetensors",
    }:
        (remote / name).parent.mkdir(parents=True, exist_ok=True)
        (remote / name).touch()
    hub.fetch(Path("org/tiny-llama@v1.0"))
    assert got(tmp_path) == wanted


def test_a_gguf_file_and_its_other_parts(remote: Path, tmp_path: Path) -> None:
    (remote / "f16").mkdir(parents=True)
    for name in (
        "f16/m-00001-of-00002.gguf",
        "f16/m-00002-of-00002.gguf",
        "f16/m-00001-of-00003.gguf",
        "o.gguf",
    ):
        (remote / name).touch()
    found = hub.fetch(Path("org/tiny-llama:f16/m-00001-of-00002.gguf"))
    assert found == tmp_path / "snapshots" / COMMIT / "f16" / "m-00001-of-00002.gguf"
    assert got(tmp_path) == {"f16/m-00001-of-00002.gguf", "f16/m-00002-of-00002.gguf"}
    with pytest.raises(GgmlExtError, match=r"^org/tiny-llama:p\.gguf: the model has no file p\.gguf; check"):
        hub.fetch(Path("org/tiny-llama:p.gguf"))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", Name("org/name", None, None)),
        ("org/name@refs/pr/1", Name("org/name", "refs/pr/1", None)),
        ("Org-1/na.me_2@main:a/b.gguf", Name("Org-1/na.me_2", "main", "a/b.gguf")),
        ("name", None),
        ("/org/name", None),
        ("../org/name", None),
        ("org/name/", Name("org/name", None, None)),
        ("org/name/file.gguf", None),
        ("org/name.gguf", None),
        ("here/name", None),
    ],
)
def test_what_is_a_name_and_what_a_path(tmp_path: Path, text: str, name: Name | None) -> None:
    """In a folder that exists everything is a path, so a slip of the pen there asks no server."""
    (tmp_path / "here").mkdir()
    assert parse(Path(text)) == name


def test_a_local_folder_wins(remote: Path, tmp_path: Path) -> None:
    (tmp_path / "org" / "tiny-llama").mkdir(parents=True)
    assert hub.fetch(Path("org/tiny-llama")) == Path("org/tiny-llama")
    assert not (tmp_path / "snapshots").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", r"gated; accept its terms at http.*/org/name and log in"),
        ("RevisionNotFoundError", r"no revision v2; check"),
        (
            "RepositoryNotFoundError",
            r"no such file or directory, and no such model at http.*; check the name",
        ),
    ],
)
def test_what_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, error: str, message: str) -> None:
    kind = getattr(huggingface_hub.errors, error)

    def refuse(*_: object, **__: object) -> str:
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(GgmlExtError, match=f"^org/name@v2: .*{message}"):
        hub.fetch(Path("org/name@v2"))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "the Hub's cache has not all that is needed; unset HF_HUB_OFFLINE"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be downloaded from http://127.0.0.1:9 ("),
    ],
)
def test_without_a_network(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    """With the Hub's own library: one line, and no output."""
    command = [sys.executable, "-m", "ggml_ext", "convert", "org/name", "-o", "out.gguf"]
    settings = {**os.environ, "HF_HOME": str(tmp_path / "hf"), **environment}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("ggml-ext: error: org/name: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out.gguf").exists()


def test_without_the_hubs_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(GgmlExtError, match=r"^org/name: no such file.*pip install 'ggml-ext\[hub\]'"):
        hub.fetch(Path("org/name"))
