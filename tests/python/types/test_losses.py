"""The loss of single tensors, measured on the model.

What would break these: weights that are not put back, or into another tensor; a divergence of other positions
than the scored ones; a resumed measurement that differs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import models
from ggml_ext.convert import convert
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.source import Source, Tensor, open_gguf
from ggml_ext.recipes import Options
from ggml_ext.runtime import native
from ggml_ext.runtime.llama import Model
from ggml_ext.runtime.native import llama_library
from ggml_ext.runtime.writable import WritableModel
from ggml_ext.types import losses

CTX, N = 48, 2
NAMES = ("blk.0.attn_v.weight", "blk.1.ffn_down.weight", "output.weight")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_gguf(models.llama_gguf(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def tokens() -> NDArray[np.int32]:
    return np.random.default_rng(3).integers(3, 200, (N, CTX)).astype(np.int32)


class Nearest:
    """Rounds to nearest. What it says of errors is taken as it is."""

    def errors(self, tensor: Tensor) -> dict[str, float]:
        return {"q4_0": 0.5, "q8_0": 0.125}

    def probe(self, tensor: Tensor, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return native.dequantize(losses.PROBE, native.quantize(losses.PROBE, rows), tensor.row_length)


def measured(source: Source, tokens: NDArray[np.int32], path: Path) -> losses.Losses:
    tensors = [tensor for tensor in source.tensors if tensor.name in NAMES]
    return losses.measure(source.path, tensors, Nearest(), tokens, path, threads=1, warn=lambda _line: None)


def all_logits(path: Path, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
    """Logits [windows, ctx, vocabulary], in one batch as losses does."""
    with Model(path, threads=1) as model:
        model.start(n_ctx=CTX, n_seq=N, n_batch=N * CTX)
        windows = tokens.copy()
        assert model.bos is not None
        windows[:, 0] = model.bos
        positions = np.tile(np.arange(CTX, dtype=np.int32), N)
        sequences = np.repeat(np.arange(N, dtype=np.int32), CTX)
        found = model.decode(windows.ravel(), positions, sequences, np.ones(N * CTX, np.bool_))
        return found.astype(np.float64).reshape(N, CTX, -1)


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_the_loss_is_that_of_a_file_with_the_probe(
    source: Source, tokens: NDArray[np.int32], tmp_path: Path
) -> None:
    """A file with this one tensor in Q4_0 has the divergence, of all words at the scored positions; and all
    three together theirs, so every tensor was put back as it was."""
    found = measured(source, tokens, tmp_path / "losses.json")
    base = log_softmax(all_logits(source.path, tokens))[:, 12::2]

    def divergence(*names: str) -> float:
        out = tmp_path / "one.gguf"
        rules = [(name.replace(".", r"\."), losses.PROBE) for name in names]
        keep = [rf"^(?!({'|'.join(pattern for pattern, _ in rules)})$)"]
        convert(
            source.path, out, options=Options("q4_0", rounding="rtn"), type_for=rules, keep=keep, threads=1
        )
        other = log_softmax(all_logits(out, tokens))[:, 12::2]
        return float((np.exp(base) * (base - other)).sum(-1).mean())

    for name in NAMES:
        assert found.kld[name] == pytest.approx(divergence(name), rel=0.02), name
    together = divergence(*NAMES) / sum(found.kld[name] for name in NAMES)
    assert found.together == pytest.approx(together, rel=0.02)
    assert found.of(NAMES[0], "q8_0") == found.kld[NAMES[0]] / 4


def test_an_interrupted_measurement_goes_on(
    source: Source, tokens: NDArray[np.int32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured(source, tokens, tmp_path / "whole.json")
    calls: list[str] = []
    restore = losses._restore

    def interrupt(model: WritableModel, tensor: Tensor) -> None:
        calls.append(tensor.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        restore(model, tensor)

    monkeypatch.setattr(losses, "_restore", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measured(source, tokens, tmp_path / "part.json")
    assert len(losses.load(tmp_path / "part.json").kld) == 1
    resumed = measured(source, tokens, tmp_path / "part.json")
    assert (tmp_path / "part.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert resumed == whole
    assert len(calls) == 4, "what was known was measured again"
    other = measured(source, tokens[:, ::-1].copy(), tmp_path / "part.json")
    assert other.windows != whole.windows
    assert len(calls) == 7, "losses of other windows were kept"


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"kld": 3, "error": {}, "together": 1}'])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "losses.json"
    path.write_text(text)
    with pytest.raises(GgmlExtError, match="no losses of this version"):
        losses.load(path)
    assert math.isnan(losses.load(tmp_path / "none").together)


def test_what_cannot_be_written_is_refused(source: Source) -> None:
    data = np.zeros(64, np.uint8)
    n_bytes = next(tensor.n_bytes for tensor in source.tensors if tensor.name == NAMES[0])
    with WritableModel(source.path, threads=1) as model:
        model.put(NAMES[0], n_bytes - 64, data)
        for name, offset in (("blk.9.attn_v.weight", 0), (NAMES[0], n_bytes - 63), (NAMES[0], -1)):
            with pytest.raises(GgmlExtError, match="that can be written to"):
                model.put(name, offset, data)
    ffi, library = llama_library()
    with Model(source.path, threads=1) as mapped:
        its = ffi.cast("struct llama_model *", mapped._model)
        status = library.ggml_ext_model_set_tensor(
            its, NAMES[0].encode(), ffi.from_buffer("char[]", data), 0, 64
        )
    assert status == library.GGML_EXT_E_TYPE
