"""Conversions to a size: types by what they cost.

What would break these: a file larger than asked for, bytes left unused, types that somebody prescribed
changed, own types with --stock, losses that the file does not tell, a folder that cannot be gone on with."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from ggml_ext.convert import ConvertResult, convert
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.registry import OWN_TYPES
from ggml_ext.gguf.inspect import InspectResult, inspect
from ggml_ext.gguf.source import open_gguf
from ggml_ext.methods.calibrate import blocks
from ggml_ext.recipes import Options
from ggml_ext.types import losses


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("GGML_EXT_CACHE", str(tmp_path_factory.mktemp("cache")))
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama_gguf(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(models.TEXT * 8)
    return path


def made(source: Path, out: Path, text: Path, recipe: str | None = None, **more: Any) -> ConvertResult:
    rules = more.pop("type_for", ())
    options = Options(samples=4, transform=more.pop("transform", "none"), **more)
    return convert(
        source,
        out,
        recipe=recipe,
        options=options,
        calibration=text,
        ctx=48,
        threads=1,
        type_for=rules,
        warn=lambda _line: None,
    )


def chosen(result: InspectResult) -> dict[str, str]:
    assert result.ext is not None
    assert result.ext.losses is not None
    types = {tensor.name: tensor.type.lower() for tensor in result.tensors}
    return {name: types[name] for name in result.ext.losses.tensors}


def table(result: InspectResult) -> dict[str, dict[str, float]]:
    assert result.ext is not None
    assert result.ext.losses is not None
    its = result.ext.losses
    values = iter(its.values)
    return {name: {kind: next(values) for kind in its.types} for name in its.tensors}


def test_a_file_of_the_size_asked_for(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are measured once for all sizes."""
    divergence, calls = losses._Judge.divergence, [0]

    def counted(judge: losses._Judge) -> float:
        calls[0] += 1
        return divergence(judge)

    monkeypatch.setattr(losses._Judge, "divergence", counted)
    sizes = [int(source.stat().st_size * share) for share in (0.32, 0.4, 0.5)]
    found = [
        inspect(made(source, tmp_path / f"{i}.gguf", text, size=size).path) for i, size in enumerate(sizes)
    ]
    for size, its in zip(sizes, found, strict=True):
        assert 0.95 * size < its.bytes <= size
        types, costs = chosen(its), table(its)
        assert len(set(types.values())) > 1
        assert all(costs[name][kind] >= 0 for name, kind in types.items())
        assert set(types) >= {"output.weight", "token_embd.weight", "blk.0.attn_q.weight"}
    assert calls[0] == len(chosen(found[0])) + 1
    totals = [sum(table(its)[name][kind] for name, kind in chosen(its).items()) for its in found]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < totals[0] / 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.gguf", "1.gguf", "2.gguf"]


def test_bits_per_weight(source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TransformRequest", partial(blocks.TransformRequest, steps=2))
    result = made(source, tmp_path / "m.gguf", text, bpw=6.0, transform="flatquant")
    assert 5.85 < result.bits_per_weight <= 6.0


def test_types_of_stock_llama_cpp(source: Path, text: Path, tmp_path: Path) -> None:
    result = made(source, tmp_path / "m.gguf", text, bpw=5.5, stock=True)
    assert not {name.lower() for name in result.weights} & set(OWN_TYPES)
    assert result.bits_per_weight <= 5.5


def test_a_mix_of_stock_types_by_importances(source: Path, text: Path, tmp_path: Path) -> None:
    """Without gptq more types are to be had, and the file is a plain one."""
    result = made(source, tmp_path / "m.gguf", text, bpw=4.0, stock=True, rounding="imatrix")
    assert 3.8 < result.bits_per_weight <= 4.0
    assert {name.lower() for name in result.weights} & {"q2_k", "iq2_s", "iq3_xxs", "iq3_s", "q3_k"}
    assert not {name.lower() for name in result.weights} & set(OWN_TYPES)


def test_prescribed_types_stay(source: Path, text: Path, tmp_path: Path) -> None:
    rules = [("attn_v", "q8_0"), (r"blk\.1\.ffn_down", "q4_0")]
    its = inspect(made(source, tmp_path / "m.gguf", text, bpw=6.0, type_for=rules).path)
    kinds = {tensor.name: tensor.type for tensor in its.tensors}
    assert kinds["blk.0.attn_v.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_down.weight"] == "Q4_0"
    assert not {name for name in chosen(its) if "attn_v" in name or name == "blk.1.ffn_down.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 100_000}, r"--size 100000: the smallest types make \d+ bytes of this model; ask for that"),
        ({"bpw": 3.0}, r"--bpw 3\.0: the smallest types make [345]\.\d+ bits of this model; ask for that"),
    ],
)
def test_too_small_a_size_is_refused_before_any_work(
    source: Path, text: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(GgmlExtError, match=message) as caught:
        made(source, tmp_path / "m.gguf", text, **options)
    assert not list(tmp_path.iterdir())
    if "size" in options:
        least = int("".join(filter(str.isdigit, str(caught.value).split("make ")[1])))
        assert inspect(made(source, tmp_path / "m.gguf", text, size=least).path).bytes <= least


def test_an_interrupted_conversion_goes_on(
    source: Path,
    text: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once while losses are measured, once while blocks are rounded: the same bytes."""
    whole = made(source, tmp_path / "whole.gguf", text, bpw=6.0)
    monkeypatch.setenv("GGML_EXT_CACHE", str(tmp_path_factory.mktemp("other")))
    divergence, encode, calls = losses._Judge.divergence, blocks.encode_block, [0]

    def stopped(judge: losses._Judge) -> float:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt
        return divergence(judge)

    def killed(*_args: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "m.gguf"
    monkeypatch.setattr(losses._Judge, "divergence", stopped)
    with pytest.raises(KeyboardInterrupt):
        made(source, out, text, bpw=6.0)
    monkeypatch.setattr(blocks, "encode_block", killed)
    with pytest.raises(KeyboardInterrupt):
        made(source, out, text, bpw=6.0)
    n_tensors = len(chosen(inspect(whole.path)))
    assert calls[0] == n_tensors + 2, "losses were measured twice"
    monkeypatch.setattr(blocks, "encode_block", encode)
    made(source, out, text, bpw=6.0)
    assert calls[0] == n_tensors + 2
    assert out.read_bytes() == whole.path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "whole.gguf"]


def test_a_mixture(tmp_path_factory: pytest.TempPathFactory, text: Path, tmp_path: Path) -> None:
    """Experts are one tensor with one type; every one of them has importances of its own."""
    source = models.mixtral_gguf(tmp_path_factory.getbasetemp())
    result = made(source, tmp_path / "m.gguf", text, bpw=5.5, rounding="imatrix")
    assert result.bits_per_weight <= 5.5
    costs = table(inspect(result.path))
    assert {name for name in costs if "_exps" in name}
    assert all(costs[name]["q8_0"] < costs[name]["q5_0"] for name in costs if "_exps" in name)
    assert {t.name for t in open_gguf(source).tensors if "ffn_gate_inp" in t.name}.isdisjoint(costs)
