"""A thin layer over the low-level API of llama-cpp-python: load, tokenize, decode, read logits.

Arrays cross the border without copies: the addresses that the bindings hand out are turned into numpy
views through cffi. llama.cpp's log is kept in memory, so that errors can repeat llama.cpp's own reason.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import cffi
import numpy as np
from numpy.typing import DTypeLike, NDArray

from ggml_ext.core.cpus import threads_or_cores
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.signals import ENDING
from ggml_ext.runtime import aborts, hparams, stack
from ggml_ext.runtime.cache_types import PLAIN, CacheTypes

_ffi = cffi.FFI()

LOG_DEBUG, LOG_WARN, LOG_ERROR, LOG_CONT = 1, 3, 4, 5
"""Values of enum ggml_log_level."""

_F32 = 0  # of enum ggml_type

_log: deque[tuple[int, str]] = deque(maxlen=400)
"""Level and text of llama.cpp's latest log lines, but for those that only its developers need."""

_ABORTED = 2
"""llama_decode's status where the abort callback ended the graph."""

_interrupted = threading.Event()

_warned: set[tuple[int, int]] = set()
"""Context lengths, wanted and trained on, that were warned of."""


@cache
def bindings() -> Any:
    """The module ``llama_cpp.llama_cpp``, with llama.cpp's log redirected to us and its backends started.

    Raises GgmlExtError if the bindings are missing or do not fit the libraries.
    """
    try:
        import llama_cpp.llama_cpp as api
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise GgmlExtError(
            f"llama-cpp-python: {error}; install the release that ggml-ext doctor names"
        ) from error
    api.llama_log_set(_log_callback(api), None)
    api.llama_backend_init()
    aborts.install()
    return api


@cache
def _log_callback(api: Any) -> Any:
    """The C callback that keeps llama.cpp's log; cached because C holds on to it for ever."""

    def keep(level: int, text: bytes, _user_data: object) -> None:
        line = text.decode("utf-8", "replace").rstrip("\n")
        if level == LOG_CONT and _log:
            _log[-1] = (_log[-1][0], _log[-1][1] + line)
            return
        if level == LOG_DEBUG:  # hundreds of lines for every graph
            return
        _log.append((level, line))
        if level in (LOG_WARN, LOG_ERROR) and line.startswith(("ggml_ext", "ggml-ext")):
            print(line, file=sys.stderr)

    return api.llama_log_callback(keep)


def max_sequences() -> int:
    """Most parallel sequences of a context."""
    return int(bindings().llama_max_parallel_sequences())


def log_lines() -> list[str]:
    """llama.cpp's latest log lines: what a call of this module has cleared before and left behind."""
    return [line for _, line in _log]


def _reason(remedy: str = "") -> str:
    """The first error line in llama.cpp's log without the name of the C function before it, and ``remedy``
    where it has none of its own: what our code says has one behind a semicolon."""
    errors = (line.strip() for level, line in _log if level == LOG_ERROR and line.strip())
    line = next(errors, "no reason given")
    head, sep, tail = line.partition(": ")
    reason = (tail if sep and head.isidentifier() else line).removeprefix("error loading model: ")
    own = not remedy or (reason.startswith("ggml-ext: ") and "; " in reason)
    return reason if own else f"{reason}; {remedy}"


@cache
def _abort_callback(api: Any) -> Any:
    return api.ggml_abort_callback(lambda _data: _interrupted.is_set())


def _ending_callback(api: Any, ends: Callable[[], bool]) -> Any:
    return api.ggml_abort_callback(lambda _data: _interrupted.is_set() or ends())


@cache
def _load_callback(api: Any) -> Any:
    return api.llama_progress_callback(lambda _progress, _data: not _interrupted.is_set())


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP end a long call into llama.cpp: the callbacks above make it return.

    Python runs its own handlers only after a C call has returned, which takes minutes for a long batch, or
    within a callback, from where their exception would be lost. At the end of the block the handler of the
    signal that came is called, which raises KeyboardInterrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        _interrupted.set()

    _interrupted.clear()
    previous = {
        number: signal.signal(number, note)
        for number in (signal.SIGINT, *ENDING)
        if callable(signal.getsignal(number))  # not one that is ignored, as in a shell's background job
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _interrupted.clear()
        if came:
            handler = previous[signal.Signals(came[0])]
            assert callable(handler)
            handler(came[0], None)


def view(pointer: Any, dtype: DTypeLike, *shape: int) -> NDArray[Any]:
    """numpy array over the memory that ``pointer`` (a pointer object of the bindings) points to, no copy.

    The memory stays llama.cpp's: the array is valid as long as the memory is.
    """
    kind = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    address = _ffi.cast("char *", _ffi.from_buffer(pointer.contents))
    memory: Any = _ffi.buffer(address, count * kind.itemsize)
    return np.frombuffer(memory, dtype=kind).reshape(shape)


class Model:
    """A GGUF model loaded by llama.cpp, with one context for decoding. Close it, or use it in ``with``."""

    def __init__(self, path: Path, *, threads: int | None = None, weights: bool = True) -> None:
        """Load ``path``; decode with ``threads`` threads (None: one per physical core).

        Without ``weights`` only the header is read and checked: enough to tokenize. Raises GgmlExtError with
        llama.cpp's own reason if the file cannot be loaded, and as hparams.check; see aborts.py for the rest.
        """
        self.path = path
        self.threads = threads_or_cores(threads)
        self._api = bindings()
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None
        self._ends: Any = None
        try:
            path.open("rb").close()
        except OSError as error:
            raise GgmlExtError(f"{path}: {error.strerror}; name a GGUF file that can be read") from error
        aborts.running(path)
        hparams.check(path)
        params = self._parameters(weights)
        _log.clear()
        with interruptible():
            self._model = self._api.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise GgmlExtError(f"{path}: llama.cpp cannot load it: {_reason('make the file anew')}")
        self.vocab = self._api.llama_model_get_vocab(self._model)
        self.n_vocab: int = self._api.llama_vocab_n_tokens(self.vocab)
        self.n_layer: int = self._api.llama_model_n_layer(self._model)
        self.n_embd: int = self._api.llama_model_n_embd(self._model)
        rope = self._api.llama_model_rope_type(self._model)
        self.adjacent_rope: bool = rope == self._api.LLAMA_ROPE_TYPE_NORM
        """Whether RoPE turns adjacent channels, not channels half a head apart."""
        self.n_ctx_train: int = self._api.llama_model_n_ctx_train(self._model)
        adds_bos = self._api.llama_vocab_get_add_bos(self.vocab)
        self.bos: int | None = self._api.llama_vocab_bos(self.vocab) if adds_bos else None
        """Token that stands before every text, None if the model has none."""
        self.adds_eos: bool = self._api.llama_vocab_get_add_eos(self.vocab)

    def _parameters(self, weights: bool) -> Any:
        params = self._api.llama_model_default_params()
        params.progress_callback = _load_callback(self._api)
        if not weights:
            params.no_alloc, params.load_mode = True, self._api.LLAMA_LOAD_MODE_NONE  # with mmap it asserts
        return params

    def tokenize(self, text: bytes, *, special: bool = False) -> NDArray[np.int32]:
        """Token ids [n] of UTF-8 ``text``, BOS first where the model wants it. All of it is plain text, or
        with ``special`` the spellings of control tokens are these tokens.

        Raises GgmlExtError for a model without a vocabulary, one that cannot tokenize this text, and a text
        with longer runs than there is stack for (stack.py).
        """
        if self._api.llama_vocab_type(self.vocab) == self._api.LLAMA_VOCAB_TYPE_NONE:  # llama.cpp would abort
            raise GgmlExtError(f"{self.path}: holds no tokenizer; use a complete model file")
        return stack.call(lambda: self._tokenize(text, special), self.longest_run(text))

    def longest_run(self, text: bytes) -> int:
        """Bound on how deep tokenizing the text goes, for stack.call."""
        if self._api.llama_vocab_type(self.vocab) != self._api.LLAMA_VOCAB_TYPE_BPE:
            return 0  # the others have no std::regex
        return stack.longest_run(text, words=self._metadata("tokenizer.ggml.pre") == "whitespace")

    def _metadata(self, key: str) -> str:
        """A string among the file's keys, "" where it lacks the key."""
        buffer = ctypes.create_string_buffer(256)
        self._api.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    def _tokenize(self, text: bytes, special: bool) -> NDArray[np.int32]:
        capacity = len(text) + 2
        for _ in range(2):
            buffer = (self._api.llama_token * capacity)()
            count = self._api.llama_tokenize(self.vocab, text, len(text), buffer, capacity, True, special)
            if count >= 0:
                return np.frombuffer(buffer, dtype=np.int32, count=count).copy()
            capacity = -count
        raise GgmlExtError(
            f"{self.path}: its vocabulary cannot tokenize this text; check the model's tokenizer"
        )

    def check_ctx(self, n_ctx: int, option: str = "--ctx") -> None:
        """Says on stderr, once per length, that ``option`` goes beyond what the model was trained on."""
        if 0 < self.n_ctx_train < n_ctx and (n_ctx, self.n_ctx_train) not in _warned:
            _warned.add((n_ctx, self.n_ctx_train))
            print(
                f"ggml-ext: warning: {self.path}: {option} {n_ctx} is beyond the {self.n_ctx_train} tokens "
                "that the model was trained on; its figures there say little",
                file=sys.stderr,
            )

    def start(
        self,
        *,
        n_ctx: int,
        n_seq: int,
        n_batch: int,
        observer: tuple[int, int] | None = None,
        ends: Callable[[], bool] | None = None,
        exact: bool = False,
        n_outputs: int = 0,
        cache: CacheTypes = PLAIN,
    ) -> None:
        """Make the context: ``n_seq`` sequences of ``n_ctx`` tokens, ``n_batch`` tokens per decode. One that
        was made before is freed.

        ``observer``: addresses of a ggml_backend_sched_eval_callback and of its user data, which the caller
        keeps alive as long as the context. ``ends``: asked between the nodes of the graph; where it says so
        ``run`` ends early. ``exact``: float32 cache, no flash attention, and one micro-batch per decode.
        ``n_outputs``: most outputs of a decode, 0 for all. ``cache``: types and budget of the KV cache.
        """
        self.check_ctx(n_ctx)
        self._end_context()
        aborts.running(self.path)
        self._ends = _abort_callback(self._api) if ends is None else _ending_callback(self._api, ends)
        params = self._api.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch = n_ctx * n_seq, n_seq, n_batch
        params.n_ubatch = cache.ubatch(min(n_batch, params.n_ubatch))
        params.n_outputs_max = n_outputs
        params.n_threads = params.n_threads_batch = self.threads
        params.abort_callback = self._ends
        params.no_perf = True
        if exact:
            params.n_ubatch = n_batch
            params.type_k = params.type_v = _F32
            params.flash_attn_type = self._api.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.kv_unified = False
        elif not cache.plain:
            params.type_k, params.type_v = cache.ids
            params.flash_attn_type = self._api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if observer is not None:
            params.cb_eval = self._api.ggml_backend_sched_eval_callback(observer[0])
            params.cb_eval_user_data = observer[1]
        _log.clear()
        with interruptible(), cache.budget():
            self._context = self._api.llama_init_from_model(self._model, params)
        if not self._context:
            raise GgmlExtError(
                f"{self.path}: llama.cpp cannot make a context of {n_seq} x {n_ctx} tokens: "
                f"{_reason('try a smaller --ctx')}"
            )
        self._batch = self._api.llama_batch_init(n_batch, 0, 1)

    @property
    def context(self) -> int:
        """Address of the llama_context that ``start`` made, for C functions that take one."""
        assert self._context, "call start first"
        return int(self._context)

    def clear(self) -> None:
        """Forget all sequences."""
        memory = self._api.llama_get_memory(self._context)
        if memory:
            self._api.llama_memory_clear(memory, True)

    def decode(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        outputs: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        """Decode one batch; all arguments have shape [n], n <= n_batch.

        Returns logits [outputs.sum(), n_vocab] in the order of the batch: a view that the next decode
        overwrites. Raises GgmlExtError if llama.cpp fails, KeyboardInterrupt on Ctrl-C.
        """
        self._decode(tokens, positions, sequences, outputs)
        rows = int(np.count_nonzero(outputs))
        if rows == 0:
            return np.empty((0, self.n_vocab), np.float32)
        pointer = self._api.llama_get_logits(self._context)
        if not pointer:
            raise GgmlExtError(f"{self.path}: gives no logits; only text-generating models can be evaluated")
        return view(pointer, np.float32, rows, self.n_vocab)

    def run(
        self, tokens: NDArray[np.int32], positions: NDArray[np.int32], sequences: NDArray[np.int32]
    ) -> None:
        """Decode one batch, all tokens outputs, for an observer's sake: no logits are read, and ``ends`` may
        end it. Raises as ``decode`` does."""
        self._decode(tokens, positions, sequences, np.ones(len(tokens), np.bool_), ended=_ABORTED)

    def _decode(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        outputs: NDArray[np.bool_],
        ended: int = 0,
    ) -> None:
        """``ended``: a status that is no error either."""
        aborts.running(self.path)
        n = len(tokens)
        batch = self._batch
        batch.n_tokens = n
        view(batch.token, np.int32, n)[:] = tokens
        view(batch.pos, np.int32, n)[:] = positions
        view(batch.n_seq_id, np.int32, n)[:] = 1
        view(batch.logits, np.int8, n)[:] = outputs
        for i, sequence in enumerate(sequences.tolist()):
            batch.seq_id[i][0] = sequence
        _log.clear()
        with interruptible():
            status = self._api.llama_decode(self._context, batch)
            self._api.llama_synchronize(self._context)
        if status not in (0, ended):
            raise GgmlExtError(f"{self.path}: llama.cpp cannot decode ({status}): {_reason()}")

    def _end_context(self) -> None:
        if self._batch is not None:
            self._api.llama_batch_free(self._batch)
        if self._context:
            self._api.llama_free(self._context)
        self._batch = self._context = None

    def close(self) -> None:
        """Free everything; logits handed out before become invalid."""
        self._end_context()
        if self._model:
            self._api.llama_model_free(self._model)
        self._model = None

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()
