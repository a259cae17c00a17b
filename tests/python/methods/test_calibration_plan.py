"""Which model a calibration is of: what counts as the same folder, and what is named when it is not."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

import models
from ggml_ext.core import paths
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.hf import model_files
from ggml_ext.methods.calibrate import plan as plans

_NAMES = re.compile(r"""["']([A-Za-z0-9][\w./-]*\.(?:json|txt|model|jinja|tiktoken|py|md|pt))["']""")
IN_FOLDERS = ["additional_chat_templates/tools.jinja", "1_Pooling/config.json", "2_Dense/model.safetensors"]
OF_TRANSFORMERS = ["special_tokens_map.json", "vocab.txt", "qwen.tiktoken", "tokenization_qwen.py"]


def read_by_the_converter() -> set[str]:
    """Names of files in the converter's code, but for its own templates and the weights."""
    converter = paths.converter_dir()
    code = [*(converter / "conversion").glob("*.py"), converter / "gguf-py" / "gguf" / "vocab.py"]
    return {name for path in code for name in _NAMES.findall(path.read_text(encoding="utf-8"))}


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    return shutil.copytree(models.llama_dir(tmp_path_factory.getbasetemp()), tmp_path / "model")


def plan_of(folder: Path) -> plans.Plan:
    return plans.Plan(
        source=model_files.of_folder(folder),
        text="0",
        samples=1,
        ctx=32,
        seed=0,
        parse_special=False,
        base="fq4",
        types={},
        fallbacks={},
        without_effect=[],
        transform="none",
        transform_bits=None,
        matrices=None,
        rounding="gptq",
        activation=None,
        blocks=1,
        device="cpu",
    )


def test_a_copy_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    (copy / "o.gguf").write_bytes(b"an output")
    (copy / "figures.json").write_text("{}")
    (copy / "log.txt").write_text("what a run said")
    (copy / "observation").mkdir()
    (copy / "observation" / "plan.json").write_text("{}")
    plans.require_model(plan_of(folder), copy, tmp_path)


def test_all_that_is_read_counts(folder: Path) -> None:
    """Whatever the pinned converter names: an update that reads one more file would go unnoticed."""
    names = read_by_the_converter()
    assert {"tekken.json", "rwkv_vocab_v20230424.txt", "hf_quant_config.json", "modules.json"} <= names
    names |= {*IN_FOLDERS, *OF_TRANSFORMERS}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    found = {path.relative_to(folder).as_posix() for path in model_files.small_files(folder)}
    assert names - found == set()


@pytest.mark.parametrize("name", ["tekken.json", "rwkv_vocab_v20230424.txt", "README.md", *IN_FOLDERS])
def test_changed_settings_are_named(folder: Path, tmp_path: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("one")
    plan = plan_of(folder)
    path.write_text("two")
    with pytest.raises(GgmlExtError, match=rf"another model than .*\({name} has changed\); give the one"):
        plans.require_model(plan, folder, tmp_path)
    path.unlink()
    with pytest.raises(GgmlExtError, match=rf"{name} has gone"):
        plans.require_model(plan, folder, tmp_path)


def test_a_settings_file_that_came_is_named(folder: Path, tmp_path: Path) -> None:
    plan = plan_of(folder)
    (folder / "chat_template.jinja").write_text("new")
    with pytest.raises(GgmlExtError, match=r"chat_template\.jinja came"):
        plans.require_model(plan, folder, tmp_path)


def test_weights_of_the_same_shapes_are_another_model(folder: Path, tmp_path: Path) -> None:
    """A fine-tune has its base's header and size."""
    plan = plan_of(folder)
    weights = models._weights(0)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] ^= 1
    models.write_safetensors(folder / "model.safetensors", weights)
    with pytest.raises(GgmlExtError, match=r"model\.safetensors has changed"):
        plans.require_model(plan, folder, tmp_path)


def test_another_plan_names_the_file(folder: Path, tmp_path: Path) -> None:
    found = plan_of(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "more": 1}))
    with pytest.raises(GgmlExtError, match=r"\(another model: config\.json has changed\); repeat"):
        plans.require_equal(found, plan_of(folder), tmp_path)


def test_the_library_counts_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "library.so"
    library.write_bytes(b"code")
    monkeypatch.setattr(plans.paths, "library", lambda _name: library)
    before = plans.versions()
    os.utime(library, (1, 1))
    assert plans.versions() == before
    library.write_bytes(b"edoc")
    assert plans.versions() != before


def test_plans_of_an_earlier_version_are_refused(folder: Path, tmp_path: Path) -> None:
    plan_of(folder).save(tmp_path)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "source": [["config.json", 5, 6]]}))
    with pytest.raises(GgmlExtError, match="not a plan of this version"):
        plans.load(tmp_path)
