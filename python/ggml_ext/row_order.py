"""Finds where each row of a Hugging Face matrix went in the GGUF file that was made from it.

llama.cpp's converter reorders the rows of some matrices (families.expected_rows). What calibration computes
for a matrix goes into the file row by row, so the order is not assumed but read off the weights: the rows
of both must be equal bit for bit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ggml_ext.errors import GgmlExtError
from ggml_ext.rules import FLOAT_TYPES
from ggml_ext.source import Source, Tensor, read_floats, reading


class RowMatcher:
    """The tensors of a float GGUF file, to be matched with modules of the folder ``where``."""

    def __init__(self, gguf: Source, where: object) -> None:
        self._tensors = {tensor.name: tensor for tensor in gguf.tensors}
        self._path = gguf.path
        self._where = where

    def match(
        self, name: str, weight: NDArray[np.float32], expected: NDArray[np.int64], module: str
    ) -> NDArray[np.int64]:
        """Row i of the GGUF tensor ``name`` is row result[i] of ``weight`` [n_out, n] or [experts, n_out, n].

        expected: the likely order, taken where it holds; equal rows are interchangeable. Raises
        GgmlExtError naming tensor and module if the rows are not the same ones.
        """
        tensor = self._tensor(name, weight, module)
        stacked = weight.reshape(-1, *weight.shape[-2:])
        n_out = stacked.shape[1]
        with reading(tensor) as file:
            for expert, matrix in enumerate(stacked):
                rows = read_floats(file, tensor, expert * n_out, n_out)
                if expert == 0:
                    expected = _order(rows, matrix, expected)
                if not _same(rows, matrix[expected]):
                    raise GgmlExtError(
                        f"{self._path}: the rows of {name} are not those of {module} in {self._where}; "
                        "convert that folder again and use the result"
                    )
        return expected

    def _tensor(self, name: str, weight: NDArray[np.float32], module: str) -> Tensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise GgmlExtError(
                f"{self._path}: no tensor {name}, which holds {module} of {self._where}; "
                "convert that folder again and use the result"
            )
        if tensor.type_name not in FLOAT_TYPES:
            raise GgmlExtError(f"{self._path}: {name} is of type {tensor.type_name}; give a float GGUF file")
        if tensor.dims[::-1] != weight.shape:
            raise GgmlExtError(
                f"{self._path}: {name} has shape {list(tensor.dims[::-1])}, {module} of {self._where} "
                f"{list(weight.shape)}; convert that folder again and use the result"
            )
        return tensor


def _same(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return bool(np.array_equal(a.view(np.int32), np.ascontiguousarray(b).view(np.int32)))


def _order(
    rows: NDArray[np.float32], matrix: NDArray[np.float32], expected: NDArray[np.int64]
) -> NDArray[np.int64]:
    """``expected`` if it holds, else the order found by the rows' contents; a row found nowhere stays where
    ``expected`` has it."""
    if _same(rows, matrix[expected]):
        return expected
    places: dict[int, list[int]] = {}
    for i in reversed(range(len(matrix))):
        places.setdefault(hash(matrix[i].tobytes()), []).append(i)
    found = expected.copy()
    for i, row in enumerate(rows):
        candidates = places.get(hash(row.tobytes()))
        if candidates:
            found[i] = candidates.pop()
    return found
