"""How far the blocks of a model are from those of its base: where a quantised model's loss comes from.

A block's error is the relative mean squared error of its output, the residual stream behind it:
sum |b - a|^2 / sum |a|^2 over tokens and channels, a the base's output, b the model's. *accumulated*: the
model runs freely, so a block inherits the errors of those before it. *own*: every block gets the base's
output of the block before it, so only its own weights differ. The tokens are those of the perplexity, the
second half of every window; so the huge activations of a window's first token cannot hide the rest.
The token embeddings are measured likewise, and block 0 gets the base's for its own error.

llama.cpp names the outputs "l_out-<block>"; ggml_ext/observe/layers.cpp reads and replaces them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.progress import Advance, track
from ggml_ext.measure.windows import Scratch
from ggml_ext.runtime.llama import Model
from ggml_ext.runtime.native import llama_library

WINDOW_TOKENS = 512
"""Longest window: one micro-batch of llama.cpp, in which every block's output is one tensor."""

Sums = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Per block the sums of squared differences and of squares of the base's outputs."""


class LayersUnavailableError(GgmlExtError):
    """The blocks of a model cannot be compared; other figures of it can."""


@dataclass(frozen=True)
class LayerError:
    """Relative mean squared errors of one block's output."""

    accumulated: float
    own: float


@dataclass(frozen=True)
class ModelErrors:
    """Relative mean squared errors of the token embeddings and of the blocks, from block 0 on."""

    embedding: float
    layers: list[LayerError]


class _Observed:
    """A loaded model whose embeddings and block outputs are recorded or compared, one window per decode.

    ``shape``: of a window's outputs, [1 + n_layer, ctx, n_embd]: embeddings, then blocks.
    """

    def __init__(self, model: Model, ctx: int) -> None:
        """Start ``model``, which is closed before this object is dropped."""
        self._ffi, self._library = llama_library()
        self.model, self.shape = model, (1 + model.n_layer, ctx, model.n_embd)
        self._layers = self._ffi.gc(
            self._library.ggml_ext_layers_new(model.n_layer, model.n_embd),
            self._library.ggml_ext_layers_free,
        )
        if self._layers == self._ffi.NULL:
            raise MemoryError
        callback = self._ffi.addressof(self._library, "ggml_ext_layers_eval")
        callback_address, data_address = (
            int(self._ffi.cast("uintptr_t", pointer)) for pointer in (callback, self._layers)
        )
        model.start(n_ctx=ctx, n_seq=1, n_batch=ctx, observer=(callback_address, data_address))

    def run(self, mode: str, tokens: NDArray[np.int32], outputs: NDArray[np.float32]) -> Sums:
        """Decode the window ``tokens`` [ctx]; write ``outputs`` or compare with them (``shape``).

        ``mode``: "RECORD", "FREE" or "FORCED", as in enum ggml_ext_layers_mode. Raises
        LayersUnavailableError.
        """
        n_outputs, ctx, _ = self.shape
        skip = ctx // 2
        window, positions = tokens.copy(), np.arange(ctx, dtype=np.int32)
        if self.model.bos is not None:
            window[0] = self.model.bos
        status = self._library.ggml_ext_layers_begin(
            self._layers,
            getattr(self._library, f"GGML_EXT_LAYERS_{mode}"),
            self._pointer(outputs, "float[]"),
            ctx,
            skip,
        )
        if status < 0:
            raise MemoryError
        self.model.clear()
        self.model.decode(window, positions, np.zeros(ctx, np.int32), positions >= skip)
        error, signal = np.empty(n_outputs), np.empty(n_outputs)
        seen = self._library.ggml_ext_layers_sums(
            self._layers, self._pointer(error, "double[]"), self._pointer(signal, "double[]")
        )
        if seen != n_outputs:
            found = "others than [tokens, width]" if seen < 0 else f"{seen} of {n_outputs}"
            raise LayersUnavailableError(
                f"{self.model.path}: no error per block: of this architecture's embeddings and block outputs "
                f"llama.cpp shows {found}; compare with --layers 0"
            )
        return error, signal

    def _pointer(self, array: NDArray[Any], ctype: str) -> Any:
        return self._ffi.from_buffer(ctype, array)


@contextmanager
def _observe(path: Path, ctx: int, threads: int | None) -> Iterator[_Observed]:
    with Model(path, threads=threads) as model:
        yield _Observed(model, ctx)


@dataclass(frozen=True)
class BaseOutputs:
    """What the blocks of ``base`` give for ``windows`` [n, ctx].

    ``shape``: of a window's outputs, [1 + n_layer, ctx, n_embd], float32 in ``scratch``.
    """

    base: Path
    windows: NDArray[np.int32]
    shape: tuple[int, int, int]
    scratch: Scratch

    def errors(self, path: Path, advance: Advance, *, threads: int | None = None) -> ModelErrors:
        """The errors of model ``path``. ``advance``: called with the tokens decoded.

        Raises LayersUnavailableError for a model of another shape than the base and for outputs that are NaN,
        infinite or all zero; GgmlExtError if the model cannot be loaded.
        """
        n_outputs, ctx, n_embd = self.shape
        sums = {mode: np.zeros((2, n_outputs)) for mode in ("FREE", "FORCED")}
        with _observe(path, ctx, threads) as observed:
            if observed.shape != self.shape:
                raise LayersUnavailableError(
                    f"{path}: no error per block: it has {observed.shape[0] - 1} blocks of width "
                    f"{observed.shape[2]}, {self.base} {n_outputs - 1} of {n_embd}; compare with --layers 0"
                )
            for slot, window in enumerate(self.windows):
                outputs = self.scratch.rows(slot, 0)(0, n_outputs * ctx)
                for mode, total in sums.items():
                    total += observed.run(mode, window, outputs)
                    advance(ctx)
        with np.errstate(all="ignore"):
            accumulated, own = (error / signal for error, signal in sums.values())
        bad = ~(np.isfinite(accumulated) & np.isfinite(own))
        if bad.any():
            where = f"the output of block {bad.argmax() - 1}" if bad.argmax() else "an embedding"
            raise LayersUnavailableError(
                f"{path}: no error per block: {where}, or the base's, is NaN, infinite or zero; "
                "make the file anew"
            )
        errors = [LayerError(*map(float, pair)) for pair in zip(accumulated, own, strict=True)]
        return ModelErrors(errors[0].own, errors[1:])


@contextmanager
def record(
    base: Path, windows: NDArray[np.int32], advance: Advance, *, threads: int | None = None
) -> Iterator[BaseOutputs]:
    """Run ``base`` over ``windows`` [n, ctx], ctx at most WINDOW_TOKENS; its outputs wait in a scratch file.

    Of long rows of windows only as many are used as the file may hold. One window's outputs are in memory.
    ``advance``: called with the tokens decoded. Raises LayersUnavailableError if llama.cpp does not show the
    outputs, GgmlExtError if the model cannot be loaded or the disk is full.
    """
    with ExitStack() as stack:
        with _observe(base, windows.shape[1], threads) as observed:
            n_outputs, ctx, n_embd = observed.shape
            scratch = stack.enter_context(Scratch(n_outputs * ctx, n_embd, len(windows), "block outputs"))
            windows = windows[: scratch.windows]
            outputs = np.zeros(observed.shape, np.float32)
            for slot, window in enumerate(windows):
                observed.run("RECORD", window, outputs)
                scratch.write(slot, 0, outputs)
                advance(ctx)
        yield BaseOutputs(base, windows, observed.shape, scratch)


def choose_windows(windows: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    """``count`` of ``windows`` [n, ctx], evenly spread over the text, cut to WINDOW_TOKENS."""
    chosen = np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(int)
    return np.ascontiguousarray(windows[chosen, :WINDOW_TOKENS])


def layer_errors(
    base: Path, models: Sequence[Path], windows: NDArray[np.int32], *, threads: int | None = None
) -> list[ModelErrors | None]:
    """The errors of ``models`` against ``base`` over token ``windows`` [n, ctx].

    None for a model whose blocks cannot be compared; a line on standard error says why. Raises GgmlExtError
    if a model cannot be loaded or the disk is full.
    """
    errors: list[ModelErrors | None] = [None] * len(models)
    with track(windows.size * (1 + 2 * len(models)), "error per block", "tok") as advance:
        try:
            with record(base, windows, advance, threads=threads) as outputs:
                for i, path in enumerate(models):
                    try:
                        errors[i] = outputs.errors(path, advance, threads=threads)
                    except LayersUnavailableError as error:
                        print(f"ggml-ext: {error}", file=sys.stderr)
        except LayersUnavailableError as error:
            print(f"ggml-ext: {error}", file=sys.stderr)
    return errors
