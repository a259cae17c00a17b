"""What several readers of a model's graph do alike: see nodes by their names, know the model's heads."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from typing import Any

import cffi
import numpy as np
from numpy.typing import NDArray

from ggml_ext.core import paths
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.outputs import identity
from ggml_ext.gguf.header import value
from ggml_ext.gguf.source import Source

# ``tensor_head`` is how struct ggml_tensor begins (ggml.h).
_DECLARATIONS = """
struct tensor_head { int type; void * buffer; int64_t ne[4]; size_t nb[4]; };
const char * ggml_get_name(const void *);
size_t ggml_nbytes(const void *);
void ggml_backend_tensor_get(const void *, void *, size_t, size_t);
"""
_F32 = 0  # of enum ggml_type


class NodeReader(ABC):
    """Sees the nodes of a graph whose whole name ``pattern`` matches; a subclass says in ``take`` what it
    wants of them. ``error``: what came up there, which ends the graph; whoever runs it raises it."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.error: Exception | None = None
        self._pattern = pattern
        self._ffi = cffi.FFI()
        self._ffi.cdef(_DECLARATIONS)
        self._library = self._ffi.dlopen(str(paths.library("ggml-base")))
        self._callback = self._ffi.callback("bool(void *, bool, void *)", self._see)

    @property
    def address(self) -> int:
        """Of the callback, which lives as long as this object."""
        return int(self._ffi.cast("uintptr_t", self._callback))

    @abstractmethod
    def take(self, tensor: Any, name: re.Match[str]) -> None:
        """A node that has been computed."""

    def values(self, tensor: Any) -> NDArray[np.float32]:
        """Of an F32 tensor of any strides, [ne3, ne2, ne1, ne0]. Raises GgmlExtError for another type."""
        head = self._ffi.cast("struct tensor_head *", tensor)
        if head.type != _F32:
            name = self._ffi.string(self._library.ggml_get_name(tensor)).decode("utf-8", "replace")
            raise GgmlExtError(f"{name}: the graph's node is not F32; run on the CPU")
        memory = np.empty(self._library.ggml_nbytes(tensor) // 4, np.float32)
        self._library.ggml_backend_tensor_get(
            tensor, self._ffi.cast("void *", memory.ctypes.data), 0, memory.nbytes
        )
        return np.lib.stride_tricks.as_strided(
            memory, tuple(head.ne)[::-1], tuple(head.nb)[::-1], writeable=False
        )

    def _see(self, tensor: Any, ask: bool, _data: Any) -> bool:
        name = self._pattern.fullmatch(
            self._ffi.string(self._library.ggml_get_name(tensor)).decode("utf-8", "replace")
        )
        if name is None or ask:
            return name is not None
        try:
            self.take(tensor, name)
        except Exception as error:  # an exception must not pass through C
            self.error = error
        return self.error is None


def heads_per_layer(source: Source, key: str, what: str) -> list[int]:
    """The model's ``attention.head_count`` or ``attention.head_count_kv``. Raises GgmlExtError for a model
    that has no such key, of which ``what`` needs attention."""
    name = f"{source.arch}.{key}"
    if name not in source.keys:
        raise GgmlExtError(f"{source.path}: no key {name}; {what} need a model with attention")
    found = value(source.keys[name])
    return list(found) if isinstance(found, (list, tuple)) else [int(found)] * source.n_blocks


def reading_of(source: Source, cut: NDArray[np.int64]) -> str:
    """A digest of the model's files and of the windows that it reads."""
    digest = hashlib.sha256(cut.tobytes())
    for path in source.files:
        digest.update(json.dumps(identity(path)).encode())
    return digest.hexdigest()
