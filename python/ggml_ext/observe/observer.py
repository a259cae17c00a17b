"""llama.cpp's observer (ggml-ext.h, ggml_ext_observer_*), bound for one context at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.cpus import require_threads
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.observe.layout import MOMENT
from ggml_ext.observe.sites import Table, parse
from ggml_ext.runtime.llama import Model
from ggml_ext.runtime.native import error_name, llama_library

LARGEST_TOKEN = 64.0
"""A token counts at most as much as so many median ones; docs/rounding.md has the figures."""


class NotFiniteError(GgmlExtError):
    """A site's activations hold NaN or Inf."""


@dataclass(frozen=True)
class Target:
    """Where the sums of a site go: float32 arrays, ``after`` of a block's size and perhaps ``before`` itself,
    ``absmax`` [n], ``sample`` [rows, n] flat, beside ``absmax`` only. ``before`` None: zeros; ``after``
    None: not observed. ``moments``: see layout.Place."""

    before: NDArray[np.float32] | None
    after: NDArray[np.float32] | None
    absmax: NDArray[np.float32] | None = None
    sample: NDArray[np.float32] | None = None
    stride: int = 1
    moments: int = MOMENT


class Observer:
    """Use it in ``with``, around the model that it observes: C holds its address as long as the context."""

    def __init__(self, threads: int) -> None:
        """threads: of the sums. Raises GgmlExtError as require_threads, and MemoryError."""
        require_threads(threads)
        self._ffi, self._library = llama_library()
        self._observer = self._library.ggml_ext_observer_new(threads)
        if self._observer == self._ffi.NULL:
            raise MemoryError
        self._kept: list[Any] = []

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *_: object) -> None:
        self._library.ggml_ext_observer_free(self._observer)
        self._kept = []

    def start(self, model: Model, *, ctx: int, n_seq: int, n_outputs: int = 0) -> None:
        """Makes the model's context, for ``n_seq`` windows of ``ctx`` tokens at a time."""
        callback = self._ffi.addressof(self._library, "ggml_ext_observer_eval")
        callback_address, data_address = (
            int(self._ffi.cast("uintptr_t", pointer)) for pointer in (callback, self._observer)
        )
        model.start(
            n_ctx=ctx,
            n_seq=n_seq,
            n_batch=ctx * n_seq,
            observer=(callback_address, data_address),
            ends=self._done,
            exact=True,
            n_outputs=n_outputs,
        )

    def _done(self) -> bool:
        return bool(self._library.ggml_ext_observer_done(self._observer))

    def table_text(self) -> str:
        """The table of the context's graph, as JSON."""
        text = self._library.ggml_ext_observer_table(self._observer)
        if text == self._ffi.NULL:
            raise GgmlExtError("llama.cpp made no table of sites; reinstall ggml-ext with pip")
        found: bytes = self._ffi.string(text)
        return found.decode("utf-8", "replace")

    def table(self) -> Table:
        """The same, parsed."""
        return parse(self.table_text())

    def size(self, n: int, experts: int, moments: int) -> int:
        """Floats of a block of sums."""
        return int(self._library.ggml_ext_observer_size(n, experts, moments))

    def aim(self, targets: Sequence[Target]) -> None:
        """Says where the sums of the next decodes go, one target per site of the table.

        The arrays are kept alive until the next call.
        """
        structs = self._ffi.new("struct ggml_ext_site_sums[]", len(targets))
        kept: list[Any] = [structs]
        for struct, target in zip(structs, targets, strict=True):
            for name in ("before", "after", "absmax", "sample"):
                array = getattr(target, name)
                pointer = self._ffi.NULL if array is None else self._ffi.from_buffer("float[]", array)
                setattr(struct, name, pointer)
                kept.append(pointer)
            struct.sample_stride, struct.moments = target.stride, target.moments
            if target.sample is not None and target.absmax is not None:
                struct.sample_rows = target.sample.size // target.absmax.size
        self._check(self._library.ggml_ext_observer_sums(self._observer, len(targets), structs))
        self._kept = kept

    def decode(
        self, model: Model, windows: NDArray[np.int32], first_token: int, largest: float = LARGEST_TOKEN
    ) -> int:
        """Decodes ``windows`` [n, ctx] at once, their sums added; returns the number of sites seen.

        first_token: how many tokens came before. largest: as LARGEST_TOKEN, 0 for no limit.
        Raises NotFiniteError for NaN or Inf in a site, GgmlExtError for what else goes wrong,
        KeyboardInterrupt on Ctrl-C: the sums are then in between and of no use.
        """
        n, ctx = windows.shape
        begun = self._library.ggml_ext_observer_begin(
            self._observer, first_token, n * ctx, largest, self._ffi.NULL
        )
        self._check(begun)
        model.clear()
        positions = np.tile(np.arange(ctx, dtype=np.int32), n)
        sequences = np.repeat(np.arange(n, dtype=np.int32), ctx)
        model.run(windows.reshape(-1), positions, sequences)
        return self._check(self._library.ggml_ext_observer_end(self._observer))

    def _check(self, code: Any) -> int:
        if code >= 0:
            return int(code)
        name, anchor = error_name(int(code)), self._culprit()
        if name == "GGML_EXT_E_MEMORY":
            raise MemoryError
        if name == "GGML_EXT_E_FINITE":
            raise NotFiniteError(
                f"{anchor}: reads NaN or Inf; the model is damaged, or its f16 weights overflow: "
                "take f32, bf16 or the original"
            )
        raise GgmlExtError(
            f"{anchor or 'observer'}: the graph is not the table's ({name}); please report it with the model"
        )

    def _culprit(self) -> str:
        text: bytes = self._ffi.string(self._library.ggml_ext_observer_culprit(self._observer))
        return text.decode("utf-8", "replace")
