"""Binding of ggml-ext.h: quantise, dequantise, dot products and what the library can do.

cffi in ABI mode: the declarations are read from the installed header, nothing is compiled. The libraries are
the ones that llama_cpp loads after ``import ggml_ext`` (libggml-base, libggml-cpu and libllama of
paths.lib_dir()), so both share one copy. Arrays that already have the documented dtype and layout are passed
without a copy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cffi
import numpy as np
from numpy.typing import NDArray

from ggml_ext.core import paths
from ggml_ext.core.cpus import processors
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.runtime.weighting import usable

_CDEF = re.compile(r"// --- cffi: begin ---(.*)// --- cffi: end ---", re.DOTALL)
_REINSTALL = "reinstall ggml-ext with pip"
_VERSION = re.compile(r"#define\s+GGML_EXT_FORMAT_VERSION\s+(\d+)")

# Weights per C call when many rows are quantised: a tenth of a second or so, which is how often progress
# moves and how long Ctrl-C takes.
_CHUNK_WEIGHTS = 1 << 18

LARGEST = {"nvfp4": 6.0 * 448.0}
"""Magnitudes that a type's encoder clips without an error: largest e2m1 code times largest e4m3 scale. The
scales of the other types are f16 or wider, and become Inf, which is an error."""

_MUST_CHANGE = "the weights or the type must change"

_MAX_TYPE_ID = 255  # ids are below GGML_TYPE_COUNT, which no function returns


class UnknownTypeError(GgmlExtError):
    """No ggml type has the name."""


@dataclass(frozen=True)
class _Native:
    """``base`` and ``cpu``: libraries; ``errors``: return value -> name of an enum ggml_ext_error."""

    ffi: Any
    base: Any
    cpu: Any
    errors: dict[int, str]


def _open(header: Path, base: Path, cpu: Path) -> _Native:
    """Loads the two libraries with the header's declarations; base first, as cpu depends on it.

    Raises GgmlExtError if a file is missing, is no patched library, or belongs to another header.
    """
    try:
        text = header.read_text(encoding="utf-8")
    except OSError as error:
        raise GgmlExtError(f"cannot read: {header} ({error.strerror}); {_REINSTALL}") from error
    declarations, version = _CDEF.search(text), _VERSION.search(text)
    if declarations is None or version is None:
        raise GgmlExtError(f"damaged header: {header}; {_REINSTALL}")
    ffi = cffi.FFI()
    ffi.cdef(declarations[1].replace("GGML_EXT_API ", ""))
    native = _Native(
        ffi, _dlopen(ffi, base), _dlopen(ffi, cpu), dict(ffi.typeof("enum ggml_ext_error").elements)
    )
    for library, path, symbol in (
        (native.base, base, "ggml_ext_format_version"),
        (native.cpu, cpu, "ggml_ext_cpu_paths"),
    ):
        if not hasattr(library, symbol):
            raise GgmlExtError(f"stock llama.cpp: {path} lacks {symbol}; use ggml-ext's libraries")
    found = native.base.ggml_ext_format_version()
    if found != int(version[1]):
        raise GgmlExtError(f"versions differ: {base} has {found}, {header} {version[1]}; {_REINSTALL}")
    return native


def _dlopen(ffi: Any, path: Path) -> Any:
    try:
        return ffi.dlopen(str(path))
    except OSError as error:
        raise GgmlExtError(f"cannot load: {error}; {_REINSTALL}") from error


def _cpu_library() -> Path:
    """libggml-cpu; of a build with one per kind of processor (GGML_CPU_ALL_VARIANTS) the one that llama.cpp
    would load here: the one that gives itself the highest score.

    Raises GgmlExtError where there is none for this processor.
    """
    variants = sorted(paths.lib_dir().glob("libggml-cpu-*"))
    if not variants:
        return paths.library("ggml-cpu")
    ffi = cffi.FFI()
    ffi.cdef("int ggml_backend_score(void);")
    scores: dict[Path, int] = {}
    for path in variants:
        library = _dlopen(ffi, path)
        scores[path] = library.ggml_backend_score() if hasattr(library, "ggml_backend_score") else 0
        ffi.dlclose(library)
    best = max(variants, key=lambda path: scores[path])
    if scores[best] <= 0:
        raise GgmlExtError(
            f"no CPU library in {paths.lib_dir()} is for this processor; build ggml-ext on this machine"
        )
    return best


@lru_cache(maxsize=1)
def _native() -> _Native:
    header = paths.include_dir() / "ggml-ext.h"
    return _open(header, paths.library("ggml-base"), _cpu_library())


@lru_cache(maxsize=1)
def llama_library() -> tuple[Any, Any]:
    """cffi's FFI object with the header's declarations, and libllama for the functions marked [llama].

    Raises GgmlExtError as every function of this module does without a sound installation.
    """
    native, path = _native(), paths.library("llama")
    library = _dlopen(native.ffi, path)
    if not hasattr(library, "ggml_ext_layers_new"):
        raise GgmlExtError(f"stock llama.cpp: {path} lacks ggml_ext_layers_new; use ggml-ext's libraries")
    return native.ffi, library


def format_version() -> int:
    """Version of the GGUF extension that the library reads and writes (key ggml_ext.version)."""
    return int(_native().base.ggml_ext_format_version())


def cpu_paths() -> list[str]:
    """FQ4 dot-product paths that this processor can run, fastest first; the last is "generic"."""
    native = _native()
    text: bytes = native.ffi.string(native.cpu.ggml_ext_cpu_paths())
    return text.decode().split(",")


def type_name(type_id: int) -> str:
    """Canonical name of a type, as ggml_type_name gives it. Raises GgmlExtError for an unknown id."""
    name = _name_or_none(type_id)
    if name is None:
        raise GgmlExtError(f"unknown tensor type: id {type_id}; a newer ggml-ext may know it")
    return name


def type_id(name: str) -> int:
    """Id of a type by name ("fq4", "q4_K", ...; case is ignored). Raises UnknownTypeError."""
    number = int(_native().base.ggml_ext_type_from_name(name.encode()))
    if number < 0:
        names = (_name_or_none(number) for number in range(_MAX_TYPE_ID + 1))
        raise UnknownTypeError(f"unknown tensor type: {name}; there are: {', '.join(n for n in names if n)}")
    return number


def block_size(type_name: str) -> int:
    """Weights per block: row lengths are multiples of it."""
    return int(_native().base.ggml_ext_block_size(type_id(type_name)))


def row_size(type_name: str, k: int) -> int:
    """Bytes of a row of k weights. Raises GgmlExtError if k is no multiple of the block size."""
    block = block_size(type_name)
    if k < 0 or k % block:
        raise GgmlExtError(
            f"row length {k} does not fit type {type_name}: blocks have {block} weights; choose another type"
        )
    return k // block * int(_native().base.ggml_ext_row_size(type_id(type_name), block))


def needs_imatrix(type_name: str) -> bool:
    """Whether quantising to the type takes an importance matrix. Raises GgmlExtError for types that
    weights cannot be quantised to."""
    needs = int(_native().base.ggml_ext_needs_imatrix(type_id(type_name)))
    if needs < 0:
        raise GgmlExtError(f"weights cannot be quantised to type {type_name}; choose another type")
    return needs == 1


def quantize(
    type_name: str,
    rows: NDArray[Any],
    imatrix: NDArray[Any] | None = None,
    *,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.uint8]:
    """Quantises rows [n, k] to uint8 [n, row_size(type_name, k)].

    rows: float32 in C order is read in place; other dtypes and layouts are converted, a chunk at a time.
    imatrix: [k] importances (mean squared input per column), finite and >= 0; see weighting.py for those that
    are 0.
    threads: 0 for all processors. The bytes do not depend on it.
    progress: called with the number of rows done since the last call.
    Raises GgmlExtError for an unknown or unusable type, a wrong shape, a type that needs an importance matrix
    when there is none, and a row with NaN, Inf or values beyond the type's range; it names the row.
    """
    k = _columns(rows)
    size = row_size(type_name, k)
    largest = LARGEST.get(type_name.lower(), math.inf)
    if needs_imatrix(type_name) and imatrix is None:
        raise GgmlExtError(f"type {type_name} needs an importance matrix; give one or choose another type")
    weights = None if imatrix is None else _importances(imatrix, k)
    number = type_id(type_name)
    out = np.empty((len(rows), size), np.uint8)
    step = max(1, _CHUNK_WEIGHTS // max(k, 1))

    def encode(start: int) -> int:
        part = np.ascontiguousarray(rows[start : start + step], np.float32)
        native = _native()
        require_range(part, start, largest)
        code = native.base.ggml_ext_quantize(
            number,
            _pointer(part, "float[]"),
            _pointer(out[start : start + step], "char[]"),
            len(part),
            k,
            native.ffi.NULL if weights is None else _pointer(weights, "float[]"),
        )
        if code < 0:
            raise GgmlExtError(f"{_reason(code, part, start)}; {_MUST_CHANGE}")
        return len(part)

    with ThreadPoolExecutor(threads or processors()) as pool:
        futures = [pool.submit(encode, start) for start in range(0, len(rows), step)]
        try:
            for future in as_completed(futures):
                done = future.result()
                if progress is not None:
                    progress(done)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return out


def require_range(part: NDArray[np.float32], start: int, largest: float) -> None:
    """Refuses rows with NaN, Inf or a value beyond +-largest; some encoders would write them as others.

    Raises GgmlExtError. start: number of the first row.
    """
    with np.errstate(invalid="ignore"):
        inside = (np.abs(part) <= largest) & (np.abs(part) < math.inf)
    if inside.all():
        return
    row = int(np.argmin(inside.all(axis=1)))
    what = "values too large for the type" if np.isfinite(part[row]).all() else "NaN or Inf"
    raise GgmlExtError(f"{what} in row {start + row}; {_MUST_CHANGE}")


def dequantize(type_name: str, data: NDArray[np.uint8], k: int) -> NDArray[np.float32]:
    """Decodes uint8 [n, row_size(type_name, k)] to float32 [n, k]; data in C order is read in place.

    Raises GgmlExtError for an unknown type or one without a decoder, and for a wrong shape or dtype.
    """
    size = row_size(type_name, k)
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != size:
        raise GgmlExtError(
            f"wrong data for type {type_name}: {data.dtype} {list(data.shape)}; "
            f"rows of {k} weights are uint8 [n, {size}]"
        )
    data = np.ascontiguousarray(data)
    out = np.empty((len(data), k), np.float32)
    code = _native().base.ggml_ext_dequantize(
        type_id(type_name), _pointer(data, "char[]"), _pointer(out, "float[]"), len(data), k
    )
    if code < 0:
        raise GgmlExtError(f"type {type_name} cannot be decoded; choose another type")
    return out


def dot(type_name: str, row: NDArray[np.uint8], x: NDArray[Any], path: str | None = None) -> float:
    """Dot product of one quantised row, uint8 [row_size(type_name, k)], with x [k] as llama.cpp computes it:
    x (float32 in C order is read in place) is rounded to the type's activation type first.

    path: one of cpu_paths(), None for the one in use; only FQ4 has more than one.
    Raises GgmlExtError for an unknown type, a wrong shape or dtype, and a path that this processor lacks.
    """
    values = np.ascontiguousarray(x, np.float32)
    if values.ndim != 1 or row.dtype != np.uint8 or row.shape != (row_size(type_name, values.size),):
        raise GgmlExtError(
            f"wrong shapes for a dot product with type {type_name}: row {row.dtype} {list(row.shape)}, "
            f"x {list(values.shape)}; give one row and as many values as it has weights"
        )
    if path is not None and path not in cpu_paths():
        raise GgmlExtError(f"no dot-product path {path}; this processor has: {', '.join(cpu_paths())}")
    native = _native()
    result = native.ffi.new("float *")
    code = native.cpu.ggml_ext_cpu_dot(
        type_id(type_name),
        native.ffi.NULL if path is None else path.encode(),
        _pointer(np.ascontiguousarray(row), "char[]"),
        _pointer(values, "float[]"),
        values.size,
        result,
    )
    if code < 0:
        raise GgmlExtError(f"no dot product for type {type_name} ({native.errors[code]}); choose another")
    return float(result[0])


def nearest_words(x: NDArray[np.float32], words: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Of each vector of x [n, channels] the number of the nearest of words [256, channels], of equally near
    ones the first. channels: 4 or 8; cffi releases the GIL meanwhile."""
    assert len(words) == 256
    x, words = np.ascontiguousarray(x), np.ascontiguousarray(words)
    codes = np.empty(len(x), np.uint8)
    native = _native()
    code = native.cpu.ggml_ext_nearest_words(len(x), x.shape[1], floats(x), floats(words), bytes_(codes))
    assert code == 0, native.errors[code]
    return codes


def call(function: str, *arguments: Any) -> int:
    """Calls a function of libggml-base that returns an integer; cffi releases the GIL meanwhile."""
    return int(getattr(_native().base, function)(*arguments))


def new(ctype: str, **fields: Any) -> Any:
    """A new struct with these fields, as a pointer. The caller keeps alive what its pointers point to."""
    return _native().ffi.new(f"{ctype} *", fields)


def floats(array: NDArray[np.generic]) -> Any:
    """A ``float *`` to the memory of a contiguous float32 array, which it keeps alive."""
    assert array.dtype == np.float32
    return _pointer(array, "float[]")


def bytes_(array: NDArray[np.generic]) -> Any:
    """A ``uint8_t *`` to the memory of a contiguous uint8 array, which it keeps alive."""
    assert array.dtype == np.uint8
    return _pointer(array, "uint8_t[]")


def error_name(code: int) -> str:
    """Name of a negative return value."""
    return _native().errors[code]


def _name_or_none(number: int) -> str | None:
    native = _native()
    text = native.base.ggml_ext_type_name(number)
    if text == native.ffi.NULL:
        return None
    name: bytes = native.ffi.string(text)
    return name.decode()


def _pointer(array: NDArray[Any], ctype: str) -> Any:
    """A pointer to the array's memory; it keeps the array alive."""
    return _native().ffi.from_buffer(ctype, array)


def _columns(rows: NDArray[Any]) -> int:
    if rows.ndim != 2:
        raise GgmlExtError(f"wrong shape of weights: {list(rows.shape)}; give [rows, row length]")
    return int(rows.shape[1])


def _importances(imatrix: NDArray[Any], k: int) -> NDArray[np.float32]:
    weights = np.ascontiguousarray(imatrix, np.float32)
    if weights.shape != (k,):
        raise GgmlExtError(
            f"importance matrix does not fit: {list(weights.shape)} for rows of {k} weights; "
            "compute it from the same model"
        )
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise GgmlExtError("importance matrix holds a negative value, NaN or Inf; compute it again")
    return usable(weights)


def _reason(code: int, part: NDArray[np.float32], start: int) -> str:
    """Why quantising the rows of ``part``, which begin at row ``start``, failed. Scans the rows."""
    if _native().errors[code] != "GGML_EXT_E_FINITE":
        return f"quantising failed with {_native().errors[code]} in row {start}"
    return f"values too large for the type in row {start + int(np.abs(part).max(axis=1).argmax())}"
