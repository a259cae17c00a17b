"""Whatever goes wrong, the command line says one line and its exit status; no traceback, no signal."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import typer

import tiny_bpe
from ggml_ext import recipes
from ggml_ext.cli import entry as cli
from ggml_ext.cli import shared as cli_shared
from ggml_ext.convert import convert
from ggml_ext.core.errors import GgmlExtError, one_line
from ggml_ext.core.outputs import write_json
from ggml_ext.gguf.inspect import inspect
from ggml_ext.measure.evaluate import PerplexityResult, perplexity
from ggml_ext.methods.calibrate.device import require_device
from ggml_ext.runtime import llama, native

TEXT = "The quick brown fox jumps over the lazy dog. " * 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bpe.write(tmp_path_factory.mktemp("model") / "m.gguf")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run(
    *arguments: str | bytes | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "ggml_ext.cli.entry", *arguments],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        env={**os.environ, **(env or {})},
        cwd=cwd,
    )
    assert done.returncode >= 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


def fails(*arguments: str | bytes | Path, **options: object) -> str:
    done = run(*arguments, **options)  # type: ignore[arg-type]
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("ggml-ext: error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_device_that_is_not_there(text: Path, tmp_path: Path) -> None:
    """Refused before the model is looked at, which need not even exist."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(GgmlExtError, match=r"--device cuda: PyTorch .*; use --device cpu"):
        require_device("cuda")
    nowhere = tmp_path / "nowhere"
    for command in ("convert", "calibrate"):
        line = fails(
            command,
            nowhere,
            "-o",
            tmp_path / "o",
            "--calibration",
            text,
            "--recipe",
            "flat4",
            "--device",
            "cuda",
        )
        assert "--device cuda: PyTorch" in line
    assert list(tmp_path.iterdir()) == [text]


def test_python_calls_check_the_device_first(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    from ggml_ext.hf import folder as hf
    from ggml_ext.methods.calibrate import run as calibrate
    from ggml_ext.methods.calibrate.plan import Request

    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(hf, "check", lambda _path: pytest.fail("the model was looked at"))
    method = recipes.load("flat4").method
    request = Request(tmp_path, text, method, device="cuda", threads=1)
    with pytest.raises(GgmlExtError, match="--device cuda"):
        calibrate.calibrate(request, tmp_path / "out")


def test_threads_bound_torch() -> None:
    torch = pytest.importorskip("torch")
    from ggml_ext.methods.calibrate.device import bound_threads

    before = torch.get_num_threads()
    try:
        for n in (1, 2):
            bound_threads(n)
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(before)


def test_threads_bound_scoring(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ggml_ext.measure import scoring

    seen: list[int] = []
    pool = scoring.ThreadPoolExecutor

    def counted(n: int) -> object:
        seen.append(n)
        return pool(n)

    monkeypatch.setattr(scoring, "ThreadPoolExecutor", counted)
    perplexity(model, text, ctx=64, threads=1)
    assert set(seen) == {1}


def test_threads_bound_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    cli_shared.bound_threads(3)
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OPENBLAS_NUM_THREADS"]) == ("5", "3")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        del os.environ[name]


@pytest.mark.parametrize(
    "line",
    [
        "convert nowhere -o o",
        "calibrate nowhere -o o",
        "observe nowhere -o o",
        "kv-probe nowhere -o o",
        "kv-codebook nowhere -o o",
        "perplexity nowhere -f nowhere",
        "compare nowhere nowhere -f nowhere",
    ],
)
def test_commands_bound_numpy_before_it_is_loaded(line: str, tmp_path: Path) -> None:
    """Its libraries look once. bench runs no numpy: llama-bench gets the number."""
    code = (
        "import os, sys; from ggml_ext.cli import entry; loaded = 'numpy' in sys.modules\n"
        "try: entry.main()\nexcept SystemExit: print(loaded, os.environ.get('OPENBLAS_NUM_THREADS'))"
    )
    env = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    command = [sys.executable, "-c", code, *line.split(), "-t", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.stdout.split() == ["False", "1"], done.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory; "),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory of the device; "),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "out of memory; ",
        ),
        (np.linalg.LinAlgError("Singular matrix"), "unexpected LinAlgError: Singular matrix at "),
        (RecursionError("maximum recursion depth exceeded"), "unexpected RecursionError: "),
        (KeyError("x"), "unexpected KeyError: 'x' at "),
        (RuntimeError("two\nlines"), "unexpected RuntimeError: two lines at "),
    ],
)
def test_any_exception_is_one_line(error: Exception, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, cli._one_line_errors():
        raise error
    assert caught.value.exit_code == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"ggml-ext: error: {said}")
    assert printed.count("\n") == 1
    assert ";" in printed


def test_the_place_of_a_mistake_is_named() -> None:
    with pytest.raises(Exception, match="nothing_of_the_kind") as caught:
        native.new("struct nothing_of_the_kind")
    assert " at native.py:" in one_line(caught.value)


def test_wrong_usage_is_still_reported_as_such() -> None:
    done = run("convert")
    assert done.returncode == 2
    assert "Usage" in done.stderr
    assert run("--help").returncode == 0


@pytest.mark.parametrize(
    "encoding",
    [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "utf-8:strict"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}],
)
def test_names_and_signs_beyond_the_terminals_encoding(
    encoding: dict[str, str], model: Path, text: Path, tmp_path: Path
) -> None:
    named = tmp_path / os.fsdecode(b"b\xe9.gguf")
    named.symlink_to(model)
    name = os.fsencode(named)
    assert "b" in run("inspect", name, env=encoding).stdout
    done = run("perplexity", name, "-f", text, "--ctx", "64", "-t", "1", env=encoding)
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    if "PYTHONUTF8" in encoding:
        return
    report, rows = tmp_path / "r.md", tmp_path / "r.json"
    done = run(
        *("compare", name, model, "-f", text, "--ctx", "64", "-t", "1", "--rounds", "0", "--layers", "0"),
        *("--report", report, "--json", rows),
        env=encoding,
    )
    assert done.returncode == 0, done.stderr
    assert report.read_text(encoding="utf-8")
    assert json.loads(rows.read_text())[0]["model"].endswith(".gguf")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_and_full_outputs(model: Path, unbuffered: str) -> None:
    """Also what Python has in its buffer at its exit ends in status 1 and no line of Python's own."""
    command = [sys.executable, "-m", "ggml_ext.cli.entry", "inspect", str(model)]
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=env)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == ""


def test_no_home_folder(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("HOME", "XDG_CACHE_HOME", "GGML_EXT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert perplexity(model, text, ctx=64, threads=1).windows > 1
    convert(model, tmp_path / "o.gguf", type_name="fq4", calibration=text, ctx=64, threads=1)
    assert inspect(tmp_path / "o.gguf").ext is not None


def test_relative_folders_of_another_build(
    model: Path, text: Path, tmp_path: Path, patched_lib_dir: Path, patched_bin_dir: Path
) -> None:
    env = {
        "GGML_EXT_LIB_DIR": os.path.relpath(patched_lib_dir, tmp_path),
        "GGML_EXT_BIN_DIR": os.path.relpath(patched_bin_dir, tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    done = run(
        *("convert", model, "-o", "o.gguf", "--type", "fq4", "--calibration", text, "--ctx", "64", "-t", "1"),
        env=env,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_pipes_as_texts_and_models(model: Path, text: Path, tmp_path: Path) -> None:
    """A text is read once; a model is not."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(GgmlExtError, match=r"fifo: no regular file; give a GGUF file"):
        inspect(fifo)
    feed = subprocess.Popen(["/bin/sh", "-c", 'cat "$0" > "$1"', str(text), str(fifo)])
    assert (
        perplexity(model, fifo, ctx=64, threads=1).windows
        == perplexity(model, text, ctx=64, threads=1).windows
    )
    assert feed.wait() == 0


def test_an_infinite_figure_loses_no_run(tmp_path: Path) -> None:
    write_json(tmp_path / "j", {"ppl": float("inf"), "rows": [{"kld": float("nan")}, 1.5], "same": True})
    assert json.loads((tmp_path / "j").read_text()) == {
        "ppl": None,
        "rows": [{"kld": None}, 1.5],
        "same": True,
    }


def test_scores_are_kept_until_they_are_delivered(
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GGML_EXT_CACHE", raising=False)
    results: list[PerplexityResult] = []

    def full(_result: PerplexityResult) -> None:
        raise GgmlExtError("no space")

    with pytest.raises(GgmlExtError, match="no space"):
        perplexity(model, text, ctx=64, threads=1, deliver=full)
    capsys.readouterr()
    perplexity(model, text, ctx=64, threads=1, deliver=results.append)
    n = results[0].windows
    assert f"resuming: {n} of {n} windows are scored" in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("*.scores"))


def test_a_context_beyond_training_is_said_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llama, "_warned", set())
    text = tmp_path / "long.txt"
    text.write_text(TEXT * 2)
    perplexity(model, text, ctx=tiny_bpe.CTX_TRAIN, threads=1)
    assert "trained on" not in capsys.readouterr().err
    for _ in range(2):
        perplexity(model, text, ctx=tiny_bpe.CTX_TRAIN + 1, threads=1)
    said = capsys.readouterr().err
    assert said.count(f"--ctx {tiny_bpe.CTX_TRAIN + 1} is beyond the {tiny_bpe.CTX_TRAIN} tokens") == 1


def test_types_that_the_gguf_package_does_not_know(model: Path, tmp_path: Path) -> None:
    """Whatever the library can write, inspect can read."""
    for type_name in ("q2_0", "q1_0"):
        out = tmp_path / f"{type_name}.gguf"
        convert(model, out, type_name=type_name, threads=1)
        assert type_name.upper() in {kind.type for kind in inspect(out).types}


def test_a_model_without_a_tokenizer(text: Path, tmp_path: Path) -> None:
    data = tiny_bpe.write(tmp_path / "m.gguf").read_bytes()
    old, new = (struct.pack("<IQ", 8, 4) + name for name in (b"gpt2", b"none"))
    assert data.count(old) == 1
    (tmp_path / "m.gguf").write_bytes(data.replace(old, new))
    assert "holds no tokenizer" in fails("perplexity", tmp_path / "m.gguf", "-f", text, "--ctx", "64")
