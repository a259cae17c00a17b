"""A llama.cpp context whose KV cache may have a budget, for tests that cut, copy and save sequences."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_ext.runtime.llama import Model, log_lines


class Context:
    """``kv``: GGML_EXT_KV. ``n_ctx``: of each sequence, of all together where ``unified``."""

    def __init__(
        self,
        path: Path,
        *,
        kv: str = "off",
        n_ctx: int = 1024,
        n_seq: int = 1,
        ubatch: int = 64,
        batch: int | None = None,
        unified: bool = False,
        types: tuple[int, int] = (0, 0),
        flash: bool = False,
        threads: int = 1,
    ) -> None:
        self.model = Model(path, threads=threads)
        self.api: Any = self.model._api
        params = self.api.llama_context_default_params()
        params.n_ctx = n_ctx if unified else n_ctx * n_seq
        params.n_seq_max, params.n_ubatch, params.n_batch = n_seq, ubatch, batch or ubatch
        params.type_k, params.type_v = types
        params.flash_attn_type = int(flash)
        params.kv_unified = unified
        params.n_threads = params.n_threads_batch = threads
        self.batch = batch or ubatch
        before = os.environ.get("GGML_EXT_KV")
        os.environ["GGML_EXT_KV"] = kv
        try:
            self.context = self.api.llama_init_from_model(self.model._model, params)
        finally:
            os.environ.pop("GGML_EXT_KV")
            if before is not None:
                os.environ["GGML_EXT_KV"] = before
        self.log = log_lines()
        self._adapters: dict[Path, Any] = {}
        self.memory = self.api.llama_get_memory(self.context) if self.context else None

    def decode(self, tokens: Sequence[int], first: int = 0, sequence: int = 0) -> NDArray[np.float32]:
        """Logits of the last token [n_vocab]; ``first``: position of the first one."""
        return self.decode_all([(token, first + i, sequence) for i, token in enumerate(tokens)])

    def decode_all(self, entries: Sequence[tuple[int, int, int]]) -> NDArray[np.float32]:
        """Of tokens with their positions and sequences, in one batch."""
        status = self.try_decode(entries)
        assert status == 0, (status, log_lines())
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, (self.model.n_vocab,)).copy()

    def try_decode(self, entries: Sequence[tuple[int, int, int]]) -> int:
        """llama_decode's status."""
        return self.try_decode_shared(
            [(token, position, [sequence]) for token, position, sequence in entries]
        )

    def try_decode_shared(self, entries: Sequence[tuple[int, int, Sequence[int]]]) -> int:
        """llama_decode's status, for tokens of several sequences each."""
        n = len(entries)
        batch = self.api.llama_batch_init(n, 0, max(len(sequences) for _, _, sequences in entries))
        batch.n_tokens = n
        for i, (token, position, sequences) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, len(sequences)
            for j, sequence in enumerate(sequences):
                batch.seq_id[i][j] = sequence
            batch.logits[i] = i == n - 1
        try:
            return int(self.api.llama_decode(self.context, batch))
        finally:
            self.api.llama_batch_free(batch)

    def remove(self, sequence: int, p0: int, p1: int = -1) -> bool:
        """llama_memory_seq_rm."""
        return bool(self.api.llama_memory_seq_rm(self.memory, sequence, p0, p1))

    def pos_min(self, sequence: int = 0) -> int:
        """llama_memory_seq_pos_min."""
        return int(self.api.llama_memory_seq_pos_min(self.memory, sequence))

    def pos_max(self, sequence: int = 0) -> int:
        """llama_memory_seq_pos_max."""
        return int(self.api.llama_memory_seq_pos_max(self.memory, sequence))

    def copy(self, source: int, target: int, p0: int = -1, p1: int = -1) -> None:
        """llama_memory_seq_cp."""
        self.api.llama_memory_seq_cp(self.memory, source, target, p0, p1)

    def adapt(self, adapter: Path, scale: float) -> None:
        """LoRA adapter of what follows."""
        if adapter not in self._adapters:
            self._adapters[adapter] = self.api.llama_adapter_lora_init(
                self.model._model, str(adapter).encode()
            )
            assert self._adapters[adapter], log_lines()
        pointers = (self.api.llama_adapter_lora_p_ctypes * 1)(self._adapters[adapter])
        scales = (ctypes.c_float * 1)(scale)
        assert self.api.llama_set_adapters_lora(self.context, pointers, 1, scales) == 0

    def save_all(self) -> bytes:
        """The state of the whole context."""
        size = self.api.llama_state_get_size(self.context)
        data = (ctypes.c_uint8 * size)()
        used = self.api.llama_state_get_data(self.context, data, size)
        return bytes(data)[:used]

    def stop_after(self, calls: int | None) -> None:
        """Graphs are aborted when they have asked so often whether to go on; None: no more."""
        kind = self.api.llama_set_abort_callback.argtypes[1]
        asked = iter(range(calls or 0))
        self._stop = kind() if calls is None else kind(lambda _data: next(asked, None) is None)
        self.api.llama_set_abort_callback(self.context, self._stop, None)

    def restore_all(self, state: bytes) -> bool:
        """Whether the whole context's state was taken."""
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        return bool(self.api.llama_state_set_data(self.context, data, len(state)))

    def save(self, sequence: int = 0) -> bytes:
        """The state of a sequence."""
        size = self.api.llama_state_seq_get_size(self.context, sequence)
        data = (ctypes.c_uint8 * size)()
        assert self.api.llama_state_seq_get_data(self.context, data, size, sequence) == size
        return bytes(data)

    def restore(self, state: bytes, sequence: int = 0) -> bool:
        """Whether the state was taken."""
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        return bool(self.api.llama_state_seq_set_data(self.context, data, len(state), sequence))

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self.context:
            self.api.llama_free(self.context)
        self.model.close()
