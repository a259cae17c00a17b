"""The command that fits codebooks of a KV cache: its file, its state, what it refuses.

What would break these: a state that is not the one that was left, a file that stock llama.cpp would run,
tensors that another command drops.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import Result
from numpy.typing import NDArray
from typer.testing import CliRunner

import eval_models
import transform_files
from eval_models import make_model, make_plamo2, text_of
from ggml_ext.cli.entry import app
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.added import write_with
from ggml_ext.gguf.inspect import inspect, print_result
from ggml_ext.gguf.source import open_gguf
from ggml_ext.measure.compare import file_facts
from ggml_ext.observe import kv_codebook as fitting
from ggml_ext.observe.kv_samples import Heads, SampleFile
from rewritten import Arrays, rewritten


def _run(model: Path, text: Path, out: Path, *more: str) -> Result:
    command = ["kv-codebook", model, "-o", out, "--calibration", text, "--ctx", 256, "-t", 1, *more]
    return CliRunner().invoke(app, list(map(str, command)))


def _tensors(path: Path) -> Arrays:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """m.gguf of two layers with codebooks, beside it plain.gguf without."""
    folder = tmp_path_factory.mktemp("coded")
    done = _run(make_model(folder / "plain.gguf", blocks=2), text, folder / "m.gguf", "--samples", "3")
    assert done.exit_code == 0, done.output
    return folder / "m.gguf"


def test_the_command(tmp_path: Path, text: Path) -> None:
    model, out = make_model(tmp_path / "m.gguf", blocks=2), tmp_path / "coded.gguf"
    probe = {"blk.0.attn_k.kv_probe": np.ones((1, 64), np.float32), "blk.0.attn_k.kv_probe_b": np.ones(1)}
    write_with(
        model, {name: values.astype(np.float32) for name, values in probe.items()}, tmp_path / "p.gguf"
    )
    done = _run(tmp_path / "p.gguf", text, out, "--samples", "9", "--json", str(tmp_path / "out.json"))
    assert done.exit_code == 0, done.output
    said = (
        "codebooks of 2 heads, 2 and 1 bits, 0.1 MB, fitted to 888 tokens; relative squared error in windows"
    )
    assert said in done.stdout
    before, after = _tensors(tmp_path / "p.gguf"), _tensors(out)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    added = {name: after[name] for name in set(after) - set(before)}
    names = {f"blk.{il}.attn_{which}.kv_cq{bits}" for il in (0, 1) for which in "kv" for bits in (1, 2)}
    assert added.keys() == names
    for name, words in added.items():
        channels = 4 if name.endswith("2") else 8
        assert (words.dtype, words.shape) == (np.float16, (1, 32 // channels, 256, channels))
        assert np.isfinite(words).all()
    figures = json.loads((tmp_path / "out.json").read_text())
    size = sum(words.nbytes for words in added.values())
    assert (figures["heads"], figures["tokens"], figures["bytes"]) == (2, 888, size)
    for which in "kv":
        two, one = (figures["error"][f"cq{bits}"][which] for bits in (2, 1))
        assert 0 < two < one < 1
        of_layers = [figures["layers"][il][f"{which}_cq2"] for il in "01"]
        assert two == pytest.approx(np.mean(of_layers))
    one_bit = _run(model, text, tmp_path / "one.gguf", "--samples", "9", "--bits", "1")
    assert (one_bit.exit_code, "2 heads, 1 bit, " in one_bit.stdout) == (0, True), one_bit.output
    of_one = _tensors(tmp_path / "one.gguf")
    assert of_one.keys() == {*_tensors(model), *(name for name in names if name.endswith("1"))}
    assert all(np.array_equal(of_one[name], after[name]) for name in of_one)


def test_what_is_added_later_leaves_them(coded: Path, tmp_path: Path) -> None:
    """As kv-probe adds its tensors."""
    write_with(coded, {"blk.0.attn_k.kv_probe": np.ones((1, 64), np.float32)}, tmp_path / "both.gguf")
    before, after = _tensors(coded), _tensors(tmp_path / "both.gguf")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert [tensor.type_name for tensor in open_gguf(tmp_path / "both.gguf").tensors[-2:]] == ["f16", "f32"]


def test_commands_on_a_coded_model(coded: Path, text: Path, tmp_path: Path) -> None:
    """kv-probe keeps codebooks, kv-codebook makes those that it is asked for anew and keeps the others."""
    probed, again = tmp_path / "probed.gguf", tmp_path / "again.gguf"
    command = ["kv-probe", str(coded), "-o", str(probed), "--calibration", str(text)]
    done = CliRunner().invoke(app, [*command, "--samples", "9", "--ctx", "64"])
    assert done.exit_code == 0, done.output
    before, after = _tensors(coded), _tensors(probed)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert "blk.1.attn_k.kv_probe" in after
    done = _run(probed, text, again, "--samples", "7", "--bits", "2")
    assert done.exit_code == 0, done.output
    anew = _tensors(again)
    assert anew.keys() == after.keys()
    for name, values in after.items():
        assert np.array_equal(values, anew[name]) == (not name.endswith("kv_cq2")), name


def test_inspect_shows_them(coded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, its = inspect(coded.with_name("plain.gguf")), inspect(coded)
    print_result(its)
    assert "KV codebooks      2 heads in 2 layers, 2 and 1 bits" in capsys.readouterr().out
    assert its.parameters == plain.parameters
    facts = file_facts(coded)
    assert facts.bits_per_layer_weight is not None
    assert facts.bits_per_layer_weight > 16  # of the same weights more bytes


def test_stock_llama_refuses_them(coded: Path, stock_build: Path, tmp_path: Path) -> None:
    result = transform_files.run(stock_build, coded, tmp_path / "logits.npy")
    assert result.returncode != 0
    assert "wrong number of tensors" in result.stderr


def test_a_transform_would_change_what_they_are_of(coded: Path, tmp_path: Path, text: Path) -> None:
    """Types alone do not: codebooks pass through as they are."""
    convert = ["convert", str(coded), "-o", str(tmp_path / "x.gguf")]
    refused = CliRunner().invoke(app, [*convert, "--recipe", "flat4", "--calibration", str(text)])
    assert (refused.exit_code, "m.gguf: has codebooks of a KV cache" in refused.stderr) == (1, True)
    done = CliRunner().invoke(app, [*convert, "--type", "q8_0"])
    assert done.exit_code == 0, done.output
    before, after = _tensors(coded), _tensors(tmp_path / "x.gguf")
    for name in before:
        if ".kv_cq" in name:  # llama-quantize drops dimensions of 1
            assert after[name].dtype == np.float16
            assert np.array_equal(before[name].ravel(), after[name].ravel())


def test_interrupted_it_goes_on(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bytes of a run that was not, also where it was killed within a window or a fit."""
    model = make_model(tmp_path / "m.gguf", blocks=2)
    whole, parts, state = (tmp_path / name for name in ("whole.gguf", "parts.gguf", "parts.gguf.codebooks"))
    assert _run(model, text, whole, "--samples", "9").exit_code == 0
    add, fit_head = SampleFile.add, SampleFile.head
    for stops in (3, 2):
        counts = iter(range(stops))

        def stopping(*arguments: Any, left: Iterator[int] = counts) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            add(*arguments)

        monkeypatch.setattr(SampleFile, "add", stopping)
        done = _run(model, text, parts, "--samples", "9")
        assert (done.exit_code, parts.exists(), state.exists()) == (130, False, True), done.output
    assert "5 of 9 windows are done; the same command goes on there" in done.stderr
    content = state.read_bytes()
    state.write_bytes(content[:-100])  # within the fifth window
    windows = []

    def counted(*arguments: Any) -> None:
        windows.append(arguments)
        add(*arguments)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SampleFile, "add", counted)
    monkeypatch.setattr(SampleFile, "head", stopped)
    done = _run(model, text, parts, "--samples", "9")
    assert (done.exit_code, "9 of 9 windows are done" in done.stderr) == (130, True), done.output
    monkeypatch.setattr(SampleFile, "head", fit_head)
    done = _run(model, text, parts, "--samples", "9")
    assert (done.exit_code, len(windows), state.exists()) == (0, 5, False), done.output
    assert parts.read_bytes() == whole.read_bytes()
    for damaged, line in [
        (content, "begun with another model, text or options"),
        (b"a user's own", "no state of codebooks, or damaged"),
        (b'{"ggml-ext": "codebooks"}\n', "no state of codebooks, or damaged"),
    ]:
        state.write_bytes(damaged)
        refused = _run(model, text, parts, "--samples", "8")
        assert (refused.exit_code, line in refused.stderr) == (1, True), refused.output
        assert state.read_bytes() == damaged


class _Written:
    """Stands for a reader, of windows of random values."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(1)
        self._heads = [Heads(0, 2, 32, 64), Heads(3, 1, 64, 32)]

    def heads(self) -> list[Heads]:
        return self._heads

    def sample(self, heads: Heads) -> NDArray[np.float16]:
        return self._random.standard_normal((heads.n, 5, heads.k + heads.v + 1)).astype(np.float16)


def test_damage_to_a_state(tmp_path: Path) -> None:
    """Windows from a damaged one on are read again; a damaged header is refused, or all begins anew."""
    path = tmp_path / "o.gguf.codebooks"
    state, reader = SampleFile(path, "model", 5), _Written()
    for _ in range(4):
        state.add(reader)  # type: ignore[arg-type]
    content = path.read_bytes()
    again = SampleFile(path, "model", 5)
    assert (again.windows, again.layers) == (4, reader.heads())
    sample = again.head(again.layers[1], 0, [1, 3])
    assert (sample.k.shape, sample.v.shape, sample.weight.shape) == ((10, 64), (10, 32), (10,))
    header = content.index(b"\n") + 1
    record = (len(content) - header) // 4
    random = np.random.default_rng(2)
    said = []
    for index in range(200):
        damaged = bytearray(content)
        at = int(random.integers(len(content)) if index % 2 else random.integers(256))
        damaged[at] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        try:
            windows = SampleFile(path, "model", 5).windows
        except GgmlExtError as error:
            said.append(str(error))
        else:
            assert windows == max(0, at - header) // record
        assert path.read_bytes() == damaged
    assert len(said) > 20
    assert all(line.startswith(f"{path}: ") and "; delete it" in line for line in said)
    path.write_bytes(content)
    with pytest.raises(GgmlExtError, match="begun with another model"):
        SampleFile(path, "model", 6)


def test_layers_without_keys_of_their_own(tmp_path: Path, text: Path) -> None:
    """A Mamba block and one of attention, whose K is turned half a head apart."""
    out = tmp_path / "o.gguf"
    done = _run(make_plamo2(tmp_path / "m.gguf"), text, out, "--samples", "2", "--bits", "2")
    assert done.exit_code == 0, done.output
    assert "no codebooks of layers 0: the graph shows no keys and values" in done.stderr
    assert {name for name in _tensors(out) if ".kv_cq" in name} == {
        "blk.1.attn_k.kv_cq2",
        "blk.1.attn_v.kv_cq2",
    }


def test_the_command_refuses(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, short, out = make_model(tmp_path / "m.gguf"), tmp_path / "short.txt", tmp_path / "x.gguf"
    short.write_text(text_of(250))
    latent = rewritten(model, tmp_path / "l.gguf", "llama", {"attention.kv_lora_rank": 16}, {})
    monkeypatch.setattr(eval_models, "HEADS", 4)
    small = make_model(tmp_path / "small.gguf")
    for done, line in [
        (_run(model, short, out), "codebooks need two or more"),
        (_run(model, text, model), "the same file as the input"),
        (_run(latent, text, out), "latent attention has no heads of keys"),
        (
            _run(small, text, out),
            "shows no keys and values (Kcur, Vcur, kq_soft_max) in heads of a multiple of 32",
        ),
    ]:
        assert (done.exit_code, line in done.stderr) == (1, True), done.output
    assert _run(model, text, out, "--bits", "3").exit_code == 2
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.name.startswith("x")) == []
    with pytest.raises(GgmlExtError, match="windows of 129 tokens"):
        fitting.fit(model, text, out, bits=[2], samples=2, ctx=129, seed=0, threads=1, warn=print)


def test_a_window_that_cannot_be_written(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written before is not lost."""
    model, state = make_model(tmp_path / "m.gguf"), tmp_path / "x.gguf.codebooks"
    real = Path.open

    def full(path: Path, mode: str = "r", **more: Any) -> Any:
        if path == state and mode == "r+b":
            raise OSError(28, "No space left on device")
        return real(path, mode, **more)

    monkeypatch.setattr(Path, "open", full)
    done = _run(model, text, tmp_path / "x.gguf", "--samples", "3")
    assert (done.exit_code, f"cannot write: {state} (No space left" in done.stderr) == (1, True), done.output
    monkeypatch.undo()
    assert _run(model, text, tmp_path / "x.gguf", "--samples", "3").exit_code == 0
