"""What a type costs in this model: the KL divergence that each tensor's rounding adds, measured on the model.

One tensor at a time is rounded to the probe's type in a loaded model, coarse enough to be seen, and the
logits of some windows are held against those of the model as it was:

    loss[tensor, type] = KLD(probe) * error(type) / error(probe)

error: of the tensor's outputs, tr(D H D^T) with H the second moments of what the tensor reads. A divergence
is quadratic in a small change of the logits, so losses are proportional to the squared error and those of
several tensors add up; docs/allocation.md has both checked. Both are rounded as the conversion rounds: plain
rounding errs in other directions, along what all tokens have in common above all, and a model minds these
less or more.

The model is in memory as a whole; a tensor costs its rounding and a pass over the windows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.atomic import write_text
from ggml_ext.core.errors import GgmlExtError, Warn
from ggml_ext.core.progress import track
from ggml_ext.gguf.source import Tensor, float_slabs, read_bytes, reading
from ggml_ext.runtime import native
from ggml_ext.runtime.writable import WritableModel

Floats = NDArray[np.float32]

PROBE = "q4_0"
"""The type whose loss is measured: every row of a multiple of 32 can have it."""

WINDOWS, CTX = 4, 256
"""Windows of the text and their length, at most. Every second position from _FIRST on is scored, of short
windows from a quarter on."""

_FIRST, _STEP = 32, 2
_WORDS = 1024  # the base's likeliest tokens, between which divergences are taken
_SLAB_WEIGHTS = 1 << 20

_TOGETHER_WEIGHTS = 1 << 24  # of the tensors whose losses together are held against their sum


class Rounder(Protocol):
    """How the conversion rounds."""

    def errors(self, tensor: Tensor) -> dict[str, float]:
        """Type -> relative squared error of the tensor's outputs, the probe's among them."""

    def probe(self, tensor: Tensor, rows: Floats) -> Floats:
        """Rows of the tensor, float32 [rows, row length], rounded to the probe's type."""


@dataclass
class Losses:
    """``kld``: tensor -> divergence in nats per token with the probe alone. ``error``: tensor -> type ->
    relative squared error of its outputs, the probe's among them. ``together``: the divergence with some of
    them rounded together over the sum of theirs, NaN before it is known. ``windows``: digest of what was
    read."""

    kld: dict[str, float] = field(default_factory=dict)
    error: dict[str, dict[str, float]] = field(default_factory=dict)
    together: float = math.nan
    windows: str = ""

    def of(self, tensor: str, type_name: str) -> float:
        """The loss of a tensor in a type."""
        errors = self.error[tensor]
        return self.kld[tensor] * errors[type_name] / errors[PROBE] if errors[PROBE] > 0 else 0.0

    def save(self, path: Path) -> None:
        """Writes the file atomically."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")


def load(path: Path) -> Losses:
    """What an interrupted or finished measurement has left; empty where there is no file. Raises GgmlExtError
    for another file."""
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kld = {str(name): float(value) for name, value in facts["kld"].items()}
        error = {
            str(name): {str(kind): float(value) for kind, value in its.items()}
            for name, its in facts["error"].items()
        }
        return Losses(kld, error, float(facts["together"]), str(facts["windows"]))
    except FileNotFoundError:
        return Losses()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
        raise GgmlExtError(f"{path}: no losses of this version ({exc}); delete it and go on") from exc


def measure(
    model: Path,
    tensors: Sequence[Tensor],
    rounder: Rounder,
    tokens: NDArray[np.int32],
    path: Path,
    *,
    threads: int = 0,
    warn: Warn,
) -> Losses:
    """The losses of the tensors of the float GGUF file ``model``, going on from what ``path`` holds and kept
    there.

    tokens: int32 [windows, ctx], see WINDOWS. Raises GgmlExtError for a model that llama.cpp cannot run, or
    that gives NaN.
    """
    found, windows = load(path), hashlib.sha256(tokens.tobytes()).hexdigest()
    if found.windows != windows:
        found = Losses(windows=windows)
    left = [tensor for tensor in tensors if tensor.name not in found.kld]
    if not left and not math.isnan(found.together):
        return found
    some = _some(tensors)
    with WritableModel(model, threads=threads or None) as loaded:
        judge = _Judge(loaded, tokens)
        with track(len(left) + 1, "losses", "tensors") as advance:
            for tensor in left:
                found.error[tensor.name] = rounder.errors(tensor)
                _put_probe(loaded, tensor, rounder)
                found.kld[tensor.name] = judge.divergence()
                _restore(loaded, tensor)
                found.save(path)
                advance(1, f"{tensor.name} {found.kld[tensor.name]:.2g}")
            for tensor in some:
                _put_probe(loaded, tensor, rounder)
            total = sum(found.kld[tensor.name] for tensor in some)
            found.together = judge.divergence() / total if total > 0 else 1.0
            found.save(path)
            advance(1)
    if not 0.5 < found.together < 2:
        warn(
            f"{len(some)} tensors together lose {found.together:.2g} times what they lose one by one; "
            "bits are shared out by the single losses all the same"
        )
    return found


def _some(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors from all over the model, few enough to be rounded once more."""
    total = sum(tensor.n_weights for tensor in tensors)
    every = -(-total // _TOGETHER_WEIGHTS)
    return [tensor for tensor in tensors if tensor.n_weights <= _TOGETHER_WEIGHTS][::every]


class _Judge:
    """The logits of a model's windows at the time of construction, and how far they are from that later."""

    def __init__(self, model: WritableModel, tokens: NDArray[np.int32]) -> None:
        self._model = model
        n, ctx = tokens.shape
        self._tokens = tokens.copy()
        if model.bos is not None:
            self._tokens[:, 0] = model.bos
        self._positions = np.tile(np.arange(ctx, dtype=np.int32), n)
        self._sequences = np.repeat(np.arange(n, dtype=np.int32), ctx)
        self._scored = (self._positions >= min(_FIRST, ctx // 4)) & (self._positions % _STEP == 0)
        model.start(n_ctx=ctx, n_seq=n, n_batch=n * ctx, n_outputs=int(self._scored.sum()))
        logits = self._logits()
        self._words = np.argpartition(logits, -min(_WORDS, logits.shape[1]), axis=1)[:, -_WORDS:]
        self._base = _log_softmax(np.take_along_axis(logits, self._words, 1))

    def divergence(self) -> float:
        """Mean over the scored tokens of sum p log(p / q), p and q among the base's likeliest tokens."""
        now = _log_softmax(np.take_along_axis(self._logits(), self._words, 1))
        mean = float((np.exp(self._base) * (self._base - now)).sum(1).mean())
        if not math.isfinite(mean):
            raise GgmlExtError(f"{self._model.path}: gives NaN or infinite logits; make it anew")
        return max(mean, 0.0)

    def _logits(self) -> Floats:
        self._model.clear()
        return self._model.decode(self._tokens.ravel(), self._positions, self._sequences, self._scored)


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    shifted: NDArray[np.float64] = logits.astype(np.float64) - logits.max(1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(1, keepdims=True))
    return shifted


def _put_probe(model: WritableModel, tensor: Tensor, rounder: Rounder) -> None:
    for first, rows in float_slabs(tensor):
        data = native.quantize(tensor.type_name, rounder.probe(tensor, rows))
        model.put(tensor.name, first * tensor.row_bytes, data)


def _restore(model: WritableModel, tensor: Tensor) -> None:
    step = max(1, _SLAB_WEIGHTS // tensor.row_length)
    with reading(tensor) as file:
        for first in range(0, tensor.n_rows, step):
            count = min(step, tensor.n_rows - first)
            model.put(tensor.name, first * tensor.row_bytes, read_bytes(file, tensor, first, count))
