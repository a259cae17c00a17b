"""What evaluations share: models with their caches, a text, and a journal of what is done."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.files import read_text_bytes
from ggml_ext.core.outputs import identity
from ggml_ext.gguf.shards import named_parts
from ggml_ext.measure.journal import Journal
from ggml_ext.runtime.cache_types import CacheTypes
from ggml_ext.runtime.llama import Model

_Self = TypeVar("_Self", bound="Journalled")


class Subject(NamedTuple):
    """A model that is measured, and its KV cache."""

    path: Path
    cache: CacheTypes

    def facts(self) -> list[Any]:
        """What its scores depend on, for a journal."""
        return [[identity(part) for part in named_parts(self.path) if part.exists()], *self.cache]


def read_text(path: Path) -> tuple[bytes, str]:
    """The text without one final line feed, as llama.cpp's tools read it, and the file's SHA-256.

    Raises GgmlExtError.
    """
    try:
        data = read_text_bytes(path)
    except OSError as error:
        raise GgmlExtError(f"{path}: {error.strerror}; name a text file that can be read") from error
    return data.removesuffix(b"\n"), hashlib.sha256(data).hexdigest()


def check_vocabulary(
    model: Model, tokens: NDArray[np.int32], base: Path, n_vocab: int, expected: NDArray[np.int32]
) -> None:
    """Raises GgmlExtError unless ``model`` has the ``n_vocab`` tokens of ``base`` and makes of a text the
    ``tokens`` [n] that are ``expected`` [n] of it."""
    if model.n_vocab != n_vocab or not np.array_equal(tokens, expected):
        raise GgmlExtError(
            f"{model.path}: its vocabulary is not that of {base}; compare models of one tokenizer"
        )


class Journalled:
    """An evaluation whose records of subjects are kept on disk. Use it in ``with``: leaving the block keeps
    them, so that the same command goes on from them."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def _records(self, subject: Subject) -> list[NDArray[np.void]]:
        """What ``subject`` has so far, from the first window or case on, each [rows]."""
        return self._journal.windows(subject.facts())

    def _keep(self, subject: Subject, record: NDArray[np.void]) -> None:
        """Add the next record [rows] of ``subject``."""
        self._journal.append(subject.facts(), record)

    def finish(self) -> None:
        """Forget the journal: the results have been delivered."""
        self._journal.finish()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.__exit__(None, None, None)
