"""Policy probe of a paged KV cache, and the probes that it reads.

numpy says what probes score, what is evicted by the rule of docs/kv-cache.md, and what probes are fitted to.
What would break these: a score of transformed activations, one layer's probe at another, a floor that is not
kept, attention of the first reading taken for that of the second, a file that stock llama.cpp would run.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import Result
from numpy.typing import NDArray
from typer.testing import CliRunner

import transform_files
from eval_models import make_model, text_of
from ggml_ext.cli.entry import app
from ggml_ext.core import outputs
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.added import write_with
from ggml_ext.gguf.inspect import inspect, print_result
from ggml_ext.gguf.source import open_gguf
from ggml_ext.observe import kv_probe as fitting
from ggml_ext.observe.kv_probe import _Layer, _read, _Reader, _solve, _Sums
from ggml_ext.runtime.llama import Model
from kv_evicted import HEADS, KV_HEADS, WIDTH, OneLayer, different_tokens, kept, simulate
from kv_paged import open_cache, read
from rewritten import rewritten

LAYER = OneLayer()
PROBE = "paged,budget=256,policy=probe"
NAME = "blk.0.attn_k.kv_probe"
FLOOR = 0.25

Arrays = dict[str, NDArray[np.float32]]


def probes() -> Arrays:
    """Of the layer; the second head's tokens are worth less."""
    random = np.random.default_rng(7)
    return {
        NAME: random.standard_normal((KV_HEADS, WIDTH)).astype(np.float32),
        f"{NAME}_b": np.array([1.0, -6.0], np.float32),
    }


def scores_of(tokens: list[int]) -> NDArray[np.float64]:
    made = probes()
    return LAYER.inputs(tokens) @ made[NAME].astype(np.float64).T + made[f"{NAME}_b"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return LAYER.write(tmp_path_factory.mktemp("probe") / "plain.gguf")


@pytest.fixture(scope="module")
def path(plain: Path) -> Path:
    write_with(plain, probes(), plain.with_name("probed.gguf"))
    return plain.with_name("probed.gguf")


def _ubatches(total: int, size: int) -> list[int]:
    return [min(size, total - at) for at in range(0, total, size)]


@pytest.mark.parametrize(("ubatch", "n"), [(64, 700), (1, 400), (50, 430)])
def test_lowest_scores_of_all_heads_go(path: Path, ubatch: int, n: int) -> None:
    tokens = different_tokens(n)
    scores = scores_of(tokens)
    with open_cache(path, PROBE, n_ctx=1024, ubatch=ubatch, batch=ubatch) as context:
        logits = read(context, tokens)
        found = kept(context.save())
        expected = simulate(scores, _ubatches(n, ubatch), blocks=4, floor=FLOOR)
        assert found.positions == expected
        assert len(expected[0]) > 1.5 * len(expected[1])
        for head, some in enumerate(found.positions):
            assert np.allclose(found.scores[head], scores[some, head], rtol=1e-4, atol=1e-4)
        truth = LAYER.logits(tokens, found.positions)
        assert np.abs(logits - truth).max() < 0.05 * np.abs(truth).max()


def test_what_a_transform_does_is_not_seen(plain: Path, tmp_path: Path) -> None:
    """A probe reads the model's own activations, whatever attn_k is multiplied with at run time."""
    model = transform_files.transform(transform_files.read(plain))
    model.write(tmp_path / "transformed.gguf")
    write_with(tmp_path / "transformed.gguf", probes(), tmp_path / "both.gguf")
    tokens = different_tokens(300)
    with open_cache(tmp_path / "both.gguf", PROBE, n_ctx=1024) as context:
        read(context, tokens)
        found = kept(context.save())
        scores = scores_of(tokens)
        for head, some in enumerate(found.positions):
            assert np.allclose(found.scores[head], scores[some, head], rtol=1e-3, atol=1e-3)


def test_other_caches_are_as_without_probes(plain: Path, path: Path) -> None:
    """Also saved states, which a model with transforms marks."""
    tokens = different_tokens(200)
    for kv in ("off", "paged"):
        with open_cache(plain, kv) as one, open_cache(path, kv) as other:
            assert np.array_equal(read(one, tokens), read(other, tokens))
            assert one.save() == other.save()


def _value(shape: tuple[int, ...], value: float = 0.0, kind: type = np.float32) -> NDArray[np.floating]:
    return np.full(shape, value, kind)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({NAME: _value((KV_HEADS, WIDTH), kind=np.float16)}, f"tensor '{NAME}' is of type f16, not f32"),
        ({NAME: _value((KV_HEADS + 1, WIDTH))}, f"tensor '{NAME}' has shape"),
        ({NAME: _value((KV_HEADS, WIDTH - 1))}, f"tensor '{NAME}' has shape"),
        ({NAME: _value((KV_HEADS, WIDTH), np.nan)}, f"tensor '{NAME}' holds a value that is not finite"),
        ({f"{NAME}_b": _value((KV_HEADS,), np.inf)}, f"tensor '{NAME}_b' holds a value that is not finite"),
        ({f"{NAME}_b": _value((KV_HEADS + 2,))}, f"tensor '{NAME}_b' has shape"),
        ({f"{NAME}_b": _value((0,))}, f"{NAME}_b"),
        ({NAME: _value((0,))}, NAME),
        (
            {"blk.1.attn_k.kv_probe": _value((KV_HEADS, WIDTH))},
            "'blk.1.attn_k.kv_probe' is a probe of no layer",
        ),
        (
            {"blk.0.attn_v.kv_probe": _value((KV_HEADS, WIDTH))},
            "'blk.0.attn_v.kv_probe' is a probe of no layer",
        ),
    ],
)
def test_malformed_probes_are_refused(
    plain: Path, tmp_path: Path, changed: Mapping[str, NDArray[np.floating]], line: str
) -> None:
    bad = rewritten(plain, tmp_path / "bad.gguf", "llama", {}, {**probes(), **changed})
    with pytest.raises(GgmlExtError) as error:
        Model(bad, threads=1)
    assert line in str(error.value)


def test_a_model_without_probes(plain: Path) -> None:
    with open_cache(plain, PROBE) as context:
        assert not context.context
        assert any("the model has no probe of layer 0; make probes with" in line for line in context.log)


def test_stock_llama_refuses_probes(path: Path, stock_build: Path, tmp_path: Path) -> None:
    result = transform_files.run(stock_build, path, tmp_path / "logits.npy")
    assert result.returncode != 0
    assert "wrong number of tensors" in result.stderr


def test_what_a_fit_reads(plain: Path) -> None:
    """Inputs of the first reading, and the most that the second one looked at each of its tokens."""
    tokens = np.array(different_tokens(60))
    reader = _Reader(open_gguf(plain), len(tokens) - 1)
    with Model(plain, threads=1) as model:
        model.start(n_ctx=120, n_seq=1, n_batch=119, exact=True, observer=(reader.address, 0))
        _read(model, reader, tokens)
    twice = [*tokens.tolist(), *tokens[1:].tolist()]
    assert np.allclose(reader.inputs[0], LAYER.inputs(twice)[1:60], atol=1e-5)
    seen = LAYER.probabilities(twice)[:, 60:, 1:60].max(1)
    by_head = seen.reshape(KV_HEADS, HEADS // KV_HEADS, -1).max(1).T
    assert np.allclose(reader.worth[0], by_head, rtol=1e-3, atol=1e-6)


def test_a_linear_law_is_found() -> None:
    random = np.random.default_rng(1)
    law = random.standard_normal((21, 3))
    layer = _Layer(_Sums.zeros(21, 3), _Sums.zeros(21, 3))
    for index in range(8):
        x = np.concatenate([random.standard_normal((100, 20)), np.ones((100, 1))], 1)
        y = x @ law + 0.1 * random.standard_normal((100, 3))
        (layer.held_out if index == 7 else layer.fitted).add(x, y)
        rows = x, y
    probe = _solve(layer)
    assert np.allclose(probe.weight.T, law[:-1], atol=0.02)
    assert np.allclose(probe.bias, law[-1], atol=0.02)
    predicted = rows[0][:, :-1] @ probe.weight.T + probe.bias
    expected = [np.corrcoef(predicted[:, head], rows[1][:, head])[0, 1] for head in range(3)]
    assert probe.correlation == pytest.approx(np.mean(expected), abs=1e-4)


def _run(model: Path, text: Path, out: Path, *more: str) -> Result:
    command = ["kv-probe", model, "-o", out, "--calibration", text, "--ctx", 64, *more]
    return CliRunner().invoke(app, list(map(str, command)))


def _tensors(path: Path) -> dict[str, NDArray[np.generic]]:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def test_the_command(tmp_path: Path) -> None:
    model, text, out = make_model(tmp_path / "m.gguf", blocks=2), tmp_path / "t.txt", tmp_path / "probed.gguf"
    text.write_text(text_of(3000))
    done = _run(model, text, out, "--samples", "9", "--json", str(tmp_path / "out.json"))
    assert done.exit_code == 0, done.output
    assert "probes of 2 layers, fitted on 567 tokens; correlation with what later tokens" in done.stdout
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["tokens"] == 567
    assert set(figures["layers"]) == {"0", "1"}
    assert all(-1 <= value <= 1 for value in figures["layers"].values())
    before, after = _tensors(model), _tensors(out)
    added = {f"blk.{i}.attn_k.kv_probe{suffix}" for i in (0, 1) for suffix in ("", "_b")}
    assert set(after) - set(before) == added
    assert all(np.array_equal(before[name], after[name]) for name in before)
    with open_cache(out, "paged,budget=192,policy=probe,sink=4,recent=16", n_ctx=512) as context:
        assert np.isfinite(read(context, [5 + i % 300 for i in range(500)])).all()
    again = _run(out, text, tmp_path / "again.gguf")  # probes are replaced
    assert again.exit_code == 0, again.output
    assert set(_tensors(tmp_path / "again.gguf")) == set(after)


def test_a_transform_would_change_what_they_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Types alone do not: probes pass through as they are."""
    model, text = make_model(tmp_path / "m.gguf"), tmp_path / "t.txt"
    text.write_text(text_of(3000))
    assert _run(model, text, tmp_path / "p.gguf", "--samples", "2").exit_code == 0
    convert = ["convert", str(tmp_path / "p.gguf"), "-o", str(tmp_path / "x.gguf")]
    refused = CliRunner().invoke(app, [*convert, "--recipe", "flat4", "--calibration", str(text)])
    assert (refused.exit_code, "p.gguf: has probes of a KV cache" in refused.stderr) == (1, True)
    done = CliRunner().invoke(app, [*convert, "--type", "q8_0"])
    assert done.exit_code == 0, done.output
    probed, converted = _tensors(tmp_path / "p.gguf"), _tensors(tmp_path / "x.gguf")
    for name in probed:
        if ".kv_probe" in name:  # llama-quantize drops dimensions of 1
            assert np.array_equal(probed[name].ravel(), converted[name].ravel())
    print_result(inspect(tmp_path / "x.gguf"))
    assert "1 heads in 1 layers" in capsys.readouterr().out
    Model(tmp_path / "x.gguf", threads=1).close()


def test_inspect_shows_them(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_result(inspect(path))
    assert "2 heads in 1 layers" in capsys.readouterr().out


def test_interrupted_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bytes of a run that was not; another model's sums, and what is no state, are refused."""
    model, text = make_model(tmp_path / "m.gguf", blocks=2), tmp_path / "t.txt"
    text.write_text(text_of(3000))
    whole, parts, state = (tmp_path / name for name in ("whole.gguf", "parts.gguf", "parts.gguf.probes"))
    assert _run(model, text, whole, "--samples", "9").exit_code == 0
    monkeypatch.setattr(fitting, "_SAVE_SECONDS", 0.0)
    read_window = fitting._read
    for stops in (3, 2, 0):
        counts = iter(range(stops))

        def stopping(*arguments: Any, left: Iterator[int] = counts, stops: int = stops) -> None:
            if stops and next(left, None) is None:
                raise KeyboardInterrupt
            read_window(*arguments)

        monkeypatch.setattr(fitting, "_read", stopping)
        done = _run(model, text, parts, "--samples", "9")
        assert done.exit_code == (130 if stops else 0), done.output
        assert parts.exists() == (stops == 0)
        assert state.exists() == (stops > 0)
        if stops == 2:
            assert "5 of 9 windows are done; the same command goes on there" in done.stderr
            kept_state = state.read_bytes()
    assert parts.read_bytes() == whole.read_bytes()
    for content, line in [
        (kept_state, "begun with another model, text or options"),
        (kept_state[:-100], "no state of probes, or damaged"),
        (b"a user's own", "no state of probes, or damaged"),
    ]:
        state.write_bytes(content)
        refused = _run(model, text, parts, "--samples", "8")
        assert (refused.exit_code, line in refused.stderr) == (1, True), refused.output
        assert state.read_bytes() == content


def test_any_damage_to_a_state_is_one_line(tmp_path: Path) -> None:
    """Of the file's bytes, and of what it holds; a state that is not used stays for who can read it."""
    state = tmp_path / "o.gguf.probes"
    sums = {
        f"0.{part}.{name}": array
        for part in fitting._PARTS
        for name, array in (("xx", np.eye(3)), ("xy", np.ones((3, 2))), ("yy", np.ones(2)))
    }
    whole: dict[str, Any] = {"of": "model", "windows": 2, **sums}

    def saved(**changed: Any) -> bytes:
        with state.open("wb") as file:
            np.savez(
                file, **{name: value for name, value in {**whole, **changed}.items() if value is not None}
            )
        return state.read_bytes()

    good = saved()
    assert fitting._State(state, "model").windows == 2
    random = np.random.default_rng(3)
    array = io.BytesIO()
    np.save(array, np.ones(3))
    damaged = [array.getvalue(), b"", good[:-30], good.replace(b"model", b"other")]
    damaged += [
        saved(of=None),
        saved(windows="two"),
        saved(windows=np.ones(3)),
        saved(**{"0.fitted.xx": None}),
    ]
    damaged += [saved(**{"0.fitted.xx": np.ones(3)}), saved(**{"0.fitted.xy": np.ones(3)})]
    damaged += [saved(**{"0.held_out.yy": np.ones(3)}), saved(**{"0.fitted.xx": np.eye(3, dtype=np.int8)})]
    damaged += [saved(x=np.ones(3)), saved(**{"x.fitted.xx": np.eye(3)})]
    for _ in range(60):
        content = bytearray(good)
        for at in random.integers(0, len(good), 4):
            content[at] = random.integers(256)
        damaged.append(bytes(content))
    said = []
    for content in damaged:
        state.write_bytes(content)
        try:
            fitting._State(state, "model")
        except GgmlExtError as error:
            said.append(str(error))
        assert state.read_bytes() == content
    assert len(said) > 40
    assert all(line.startswith(f"{state}: ") and "; delete it" in line for line in said)


def test_figures_that_cannot_be_written_cost_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are written first: the same command has them from the state."""
    model, text = make_model(tmp_path / "m.gguf"), tmp_path / "t.txt"
    text.write_text(text_of(3000))
    state = tmp_path / "p.gguf.probes"
    monkeypatch.setattr(fitting, "_SAVE_SECONDS", 0.0)

    def full(*_: object) -> None:
        raise GgmlExtError("the disk is full; make room")

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "write_json", full)
        done = _run(model, text, tmp_path / "p.gguf", "--samples", "2", "--json", str(tmp_path / "j"))
    assert (done.exit_code, state.exists()) == (1, True), done.output
    monkeypatch.setattr(fitting, "_read", lambda *_: pytest.fail("a window was read again"))
    done = _run(model, text, tmp_path / "p.gguf", "--samples", "2", "--json", str(tmp_path / "j"))
    assert (done.exit_code, state.exists()) == (0, False), done.output
    assert json.loads((tmp_path / "j").read_text())["tokens"] == 126


def test_the_command_refuses(tmp_path: Path) -> None:
    model, text = make_model(tmp_path / "m.gguf"), tmp_path / "t.txt"
    text.write_text(text_of(60))
    short = _run(model, text, tmp_path / "x.gguf")
    assert (short.exit_code, "probes need two or more" in short.stderr) == (1, True), short.output
    same = _run(model, text, model)
    assert (same.exit_code, "the same file as the input" in same.stderr) == (1, True), same.output
    assert not (tmp_path / "x.gguf").exists()
