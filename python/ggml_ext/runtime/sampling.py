"""The fused sampler: top-k, typical-p, top-p, min-p, temperature and the draw as one llama.cpp sampler.

``fused`` makes one. It draws from logits in memory, joins a sampler chain of llama-cpp-python, or takes the
place of the end of the chain in a ``Llama``. docs/sampling.md has the mathematics and the policy of ties.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import TracebackType
from typing import Any

import cffi
import numpy as np
from numpy.typing import NDArray

from ggml_ext.core import paths
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.runtime import native
from ggml_ext.runtime.llama import view

STAGES = {
    "top_k": "GGML_EXT_SAMPLER_TOP_K",
    "typical_p": "GGML_EXT_SAMPLER_TYPICAL",
    "top_p": "GGML_EXT_SAMPLER_TOP_P",
    "min_p": "GGML_EXT_SAMPLER_MIN_P",
    "temperature": "GGML_EXT_SAMPLER_TEMPERATURE",
}
"""Stages of the sampler in llama.cpp's order -> enum ggml_ext_sampler_stage."""

_RANDOM_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED

# From llama.h; these have been the same in every pinned release.
_UPSTREAM = """
typedef struct { int32_t id; float logit; float p; } llama_token_data;
typedef struct {
    llama_token_data * data; size_t size; int64_t selected; bool sorted;
} llama_token_data_array;
void llama_sampler_accept(struct llama_sampler * smpl, int32_t token);
void llama_sampler_apply(struct llama_sampler * smpl, llama_token_data_array * cur_p);
void llama_sampler_reset(struct llama_sampler * smpl);
struct llama_sampler * llama_sampler_clone(const struct llama_sampler * smpl);
void llama_sampler_free(struct llama_sampler * smpl);
void llama_sampler_chain_add(struct llama_sampler * chain, struct llama_sampler * smpl);
struct llama_sampler * llama_sampler_chain_get(struct llama_sampler * chain, int32_t i);
"""

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama.h's llama_token_data."""


@cache
def _upstream() -> tuple[Any, Any]:
    """cffi's FFI object with the declarations above, and libllama for them."""
    ffi = cffi.FFI()
    ffi.include(native.llama_library()[0])
    ffi.cdef(_UPSTREAM)
    return ffi, ffi.dlopen(str(paths.library("llama")))


def address(sampler: Any) -> Any:
    """cffi's pointer to the sampler that a pointer object of llama_cpp points to."""
    ffi, _ = _upstream()
    return ffi.cast("struct llama_sampler *", ffi.from_buffer(sampler.contents))


def apply(logits: NDArray[np.float32], *samplers: Any) -> tuple[NDArray[Any], int]:
    """Applies samplers (cffi's pointers), one after the other, to an array of all tokens.

    logits: [n_vocab]. Returns the candidates that are left, CANDIDATE [n], and the index of the selected one,
    negative if none was.
    """
    ffi, llama = _upstream()
    rows = np.zeros(logits.size, CANDIDATE)
    rows["id"] = np.arange(logits.size, dtype=np.int32)
    rows["logit"] = logits
    data = ffi.cast("llama_token_data *", ffi.from_buffer(rows))
    array = ffi.new("llama_token_data_array *", {"data": data, "size": logits.size, "selected": -1})
    for sampler in samplers:
        llama.llama_sampler_apply(sampler, array)
    # A sampler may have put memory of its own in the place of the rows.
    left: Any = ffi.buffer(array.data, array.size * CANDIDATE.itemsize)
    return np.frombuffer(left, CANDIDATE).copy(), int(array.selected)


class FusedSampler:
    """One fused sampler with its generator of random numbers; ``fused`` makes it.

    Not for several threads at once. Close it, or use it in ``with``; a closed one raises GgmlExtError.
    """

    def __init__(self, pointer: Any) -> None:
        """Takes over ``pointer``, a fused ``struct llama_sampler *`` of cffi."""
        self._pointer = pointer
        self._free = weakref.finalize(self, _upstream()[1].llama_sampler_free, pointer)

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Draws a token. logits: float32 [n_vocab] in C order, read in place.

        Raises GgmlExtError for another dtype or shape, for logits that are NaN or Inf, and if all are -Inf.
        """
        data = _logits(logits)
        library = native.llama_library()[1]
        return _token(library.ggml_ext_sampler_sample_logits(self._open(), data, logits.size))

    def kept(self, logits: NDArray[np.float32]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The tokens that ``sample`` chooses from and their probabilities, without a draw.

        logits as for ``sample``. Returns ids [n_kept], ascending, and probabilities [n_kept], whose sum is 1.
        Raises as ``sample``.
        """
        data = _logits(logits)
        ffi, library = native.llama_library()
        ids, probabilities = np.empty(logits.size, np.int32), np.empty(logits.size, np.float32)
        count = _token(
            library.ggml_ext_sampler_kept(
                self._open(),
                data,
                logits.size,
                ffi.from_buffer("int32_t[]", ids),
                ffi.from_buffer("float[]", probabilities),
            )
        )
        return ids[:count].copy(), probabilities[:count].copy()

    @property
    def seed(self) -> int:
        """The seed in use; without one of the caller's, the random one."""
        return int(native.llama_library()[1].ggml_ext_sampler_seed(self._open()))

    def reset(self) -> None:
        """Starts the generator again from the seed; without a seed, from a new random one."""
        _upstream()[1].llama_sampler_reset(self._open())

    def clone(self) -> FusedSampler:
        """A second sampler in the same state: both go on with the same draws."""
        return FusedSampler(_upstream()[1].llama_sampler_clone(self._open()))

    def add_to(self, chain: Any) -> None:
        """Puts a clone at the end of a sampler chain, which owns it and needs no other end.

        chain: a LlamaSampler of llama_cpp._internals, or what llama_cpp.llama_sampler_chain_init returned.
        llama_sampler_sample ends the process if a token cannot be drawn (NaN); ``sample`` and ``installed``
        raise. Raises GgmlExtError for what is no chain.
        """
        ffi, llama = _upstream()
        pointer = getattr(chain, "sampler", chain)
        target = ffi.NULL if not pointer else address(pointer)
        if llama.llama_sampler_chain_get(target, -1) == ffi.NULL:
            raise GgmlExtError(f"no sampler chain: {chain!r}; give an open LlamaSampler or chain pointer")
        llama.llama_sampler_chain_add(target, llama.llama_sampler_clone(self._open()))

    @contextmanager
    def installed(self, llama: Any) -> Iterator[None]:
        """Inside the block, everything that a llama_cpp.Llama generates is drawn by this sampler.

        Its parameters and its seed count: temperature, top_k, top_p, min_p, typical_p and seed of the call do
        not. Penalties, logit bias, logits processors and a grammar of the call act before it. Read a stream
        inside the block: one that begins behind it is stock's.
        Raises GgmlExtError for another object, and in a call that asks for mirostat.
        """
        stock = getattr(type(llama), "_init_sampler", None)
        if stock is None:
            raise GgmlExtError(f"no Llama of the pinned llama-cpp-python: {llama!r}; give a llama_cpp.Llama")
        self._open()
        outer = vars(llama).get("_init_sampler")
        llama._init_sampler = partial(_Generation, self, llama, partial(stock, llama))
        try:
            yield
        finally:
            if outer is None:
                del llama._init_sampler
            else:
                llama._init_sampler = outer

    def close(self) -> None:
        """Frees the sampler; clones live on."""
        self._free()

    def __enter__(self) -> FusedSampler:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Any:
        if not self._free.alive:
            raise GgmlExtError("the sampler is closed; make another with ggml_ext.runtime.sampling.fused")
        return self._pointer

    def _sample_behind(self, front: Any, logits: NDArray[np.float32]) -> int:
        """``sample`` behind ``front`` (cffi's pointer), a sampler chain that selects nothing."""
        rows, selected = apply(logits, front, self._open())
        if selected < 0:
            raise GgmlExtError(_NOTHING)
        token = int(rows["id"][selected])
        _upstream()[1].llama_sampler_accept(front, token)
        return token


def fused(
    *,
    temperature: float = 0.8,
    top_k: int = 40,
    top_p: float = 0.95,
    min_p: float = 0.05,
    typical_p: float = 1.0,
    min_keep: int = 1,
    seed: int | None = None,
    order: Sequence[str] = tuple(STAGES),
) -> FusedSampler:
    """A fused sampler; the defaults are those of llama_cpp.Llama.

    temperature <= 0: always the most probable token. top_k <= 0, top_p >= 1, min_p <= 0 and typical_p >= 1
    turn a stage off. min_keep: tokens that top-p, min-p and typical-p leave at least.
    seed: 0 .. 2**32 - 2; None for a random one. order: the stages that run, first to last, names of STAGES.
    Raises GgmlExtError for a parameter that is not finite or out of range, and for unknown or repeated
    stages.
    """
    numbers = {"temperature": temperature, "top_p": top_p, "min_p": min_p, "typical_p": typical_p}
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise GgmlExtError(f"{name} is {value}; give a finite number")
    _check_range("top_k", top_k, -(2**31), 2**31 - 1)
    _check_range("min_keep", min_keep, 0, 2**31 - 1)
    if seed is not None:
        _check_range("seed", seed, 0, _RANDOM_SEED - 1)
    if unknown := [name for name in order if name not in STAGES]:
        raise GgmlExtError(f"unknown stage: {unknown[0]}; there are: {', '.join(STAGES)}")
    if len(set(order)) < len(order):
        raise GgmlExtError(f"a stage stands twice in the order {', '.join(order)}; name each at most once")
    ffi, library = native.llama_library()
    params = ffi.new(
        "struct ggml_ext_sampler_params *",
        {
            **numbers,
            "n_stages": len(order),
            "stages": [getattr(library, STAGES[name]) for name in order],
            "top_k": top_k,
            "min_keep": min_keep,
            "seed": _RANDOM_SEED if seed is None else seed,
        },
    )
    pointer = library.ggml_ext_sampler_fused(params)
    if pointer == ffi.NULL:
        raise GgmlExtError(f"the sampler cannot be made with {numbers}; choose usual values")
    return FusedSampler(pointer)


class _Generation:
    """Stands where Llama keeps the sampler of one generation: the call's own samplers, then the fused one."""

    def __init__(
        self,
        sampler: FusedSampler,
        llama: Any,
        upstream: Callable[..., Any],
        *,
        mirostat_mode: int = 0,
        **arguments: Any,
    ) -> None:
        """upstream: Llama's own _init_sampler, which makes a chain; arguments: what Llama gives it."""
        if mirostat_mode:
            raise GgmlExtError(
                f"mirostat_mode={mirostat_mode} while a fused sampler is installed; leave one of them out"
            )
        self._sampler = sampler
        self._n_vocab: int = llama.n_vocab()
        self._front = _front(upstream, arguments) if _has_front(arguments) else None

    def sample(self, context: Any, idx: int = -1) -> int:
        """Draws a token for output ``idx`` of the context's last decode; negative counts from its end."""
        import llama_cpp.llama_cpp as api

        pointer = api.llama_get_logits_ith(context.ctx, idx)
        if not pointer:
            raise GgmlExtError(f"no logits for output {idx}; decode before you sample")
        logits = view(pointer, np.float32, self._n_vocab)
        if self._front is None:
            return self._sampler.sample(logits)
        return self._sampler._sample_behind(address(self._front.sampler), logits)


def _has_front(arguments: dict[str, Any]) -> bool:
    """Whether a call to Llama asks for more than the fused sampler does."""
    neutral = {"repeat_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
    return (
        any(arguments.get(name, value) != value for name, value in neutral.items())
        or arguments.get("grammar") is not None
        or arguments.get("logits_processor") is not None
    )


def _front(upstream: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Llama's chain without its end: at a temperature below 0 the end is dist alone."""
    import llama_cpp.llama_cpp as api

    chain = upstream(**{**arguments, "temp": -1.0})
    last = api.llama_sampler_chain_n(chain.sampler) - 1
    api.llama_sampler_free(api.llama_sampler_chain_remove(chain.sampler, last))
    return chain


_NOTHING = "no token can be drawn: a logit is NaN or Inf, or all are -Inf; check the model"


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise GgmlExtError(f"{name} is {value}; give a number from {least} to {most}")


def _logits(logits: NDArray[np.float32]) -> Any:
    """cffi's ``float *`` to the logits, which it keeps alive."""
    if logits.dtype != np.float32 or logits.ndim != 1 or not logits.size or not logits.flags.c_contiguous:
        raise GgmlExtError(
            f"wrong logits: {logits.dtype} {list(logits.shape)}; give float32 [n_vocab] in C order"
        )
    return native.floats(logits)


def _token(code: int) -> int:
    """A token or count; an error of the library is raised."""
    if code >= 0:
        return code
    name = native.error_name(code)
    raise GgmlExtError(
        _NOTHING if name == "GGML_EXT_E_FINITE" else f"the sampler failed: {name}; see the log"
    )
