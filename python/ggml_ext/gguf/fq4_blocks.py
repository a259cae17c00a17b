"""Blocks of weights d * TABLE[s, q] in plain numpy: slow, readable, bit for bit what the C code of the types
computes. fq4.py, fq4_64.py, fq3.py and fq3_64.py are the types; docs/gguf.md is the specification.

A block begins with its scale d, then has the row indices s of its sub-blocks of 16 weights: that of sub-block
b is the low nibble of s[b // 2] for even b, the high nibble for odd b. Codes q follow, see Nibbles, Planes.

Every float operation is a float32 one in the order of the C source; sums therefore run one term at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ggml_ext.gguf.fq4_search import (
    SUB,
    Bytes,
    Choice,
    Floats,
    Table,
    choose,
    error_weights,
    no_choice,
    refit_d,
)

# First guesses of d: with an fp16 scale factor * absmax / 127; with a scale of one byte consecutive scales
# from that of a factor on. Then the number of least-squares refits. docs/fq4.md, fq4_64.md, "candidates".
_FACTORS = np.array([0.9, 0.95, 1, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3], np.float32)
_FIRST_FACTOR = np.float32(0.95)
_N_GUESSES = 8
_N_REFITS = 2

# Weights per step of an encoder: bounds the temporary arrays to a few MB.
_STEP = 64 * 256


class Codes(Protocol):
    """How codes lie in ``n_bytes`` of a block."""

    n_bytes: int

    def unpack(self, data: Bytes) -> Bytes:
        """uint8 [n, n_bytes] -> codes uint8 [n, block]."""

    def pack(self, codes: Bytes) -> Bytes:
        """The inverse."""


class Nibbles:
    """Codes of 4 bits: of each ``run`` bytes first the low nibbles, then the high ones."""

    def __init__(self, block: int, run: int) -> None:
        self.n_bytes = block // 2
        self._run = run

    def unpack(self, data: Bytes) -> Bytes:
        parts = data.reshape(len(data), -1, self._run)
        return np.stack([parts & 15, parts >> 4], 2).reshape(len(data), -1)

    def pack(self, codes: Bytes) -> Bytes:
        parts = codes.reshape(len(codes), -1, 2, self._run)
        packed: Bytes = parts[:, :, 0] | parts[:, :, 1] << np.uint8(4)
        return packed.reshape(len(codes), -1)


class Planes:
    """Codes of 3 bits: block / 4 bytes, of which byte j has in its bits 2 k and 2 k + 1 the two low bits of
    the code of weight k block / 4 + j; then block / 8 bytes, of which byte j has in its bit n the high bit of
    weight n block / 8 + j."""

    def __init__(self, block: int) -> None:
        self._low = block // 4
        self.n_bytes = self._low + block // 8

    def unpack(self, data: Bytes) -> Bytes:
        low = data[:, None, : self._low] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & np.uint8(3)
        high = data[:, None, self._low :] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
        codes: Bytes = low.reshape(len(data), -1) | high.reshape(len(data), -1) << np.uint8(2)
        return codes

    def pack(self, codes: Bytes) -> Bytes:
        low = (codes & np.uint8(3)).reshape(len(codes), 4, -1)
        high = (codes >> np.uint8(2)).reshape(len(codes), 8, -1)
        return np.concatenate(
            [
                np.bitwise_or.reduce(low << np.arange(0, 8, 2, dtype=np.uint8)[:, None], 1),
                np.bitwise_or.reduce(high << np.arange(8, dtype=np.uint8)[:, None], 1),
            ],
            1,
        )


class BlockType(ABC):
    """A type: ``block`` weights in ``n_bytes``."""

    def __init__(self, block: int, table: Table, scale: str, codes: Codes) -> None:
        self.block = block
        self.table = table
        self._codes = codes
        self._n_subs = block // SUB
        self._dtype = np.dtype([("d", scale), ("s", "u1", self._n_subs // 2), ("q", "u1", codes.n_bytes)])
        self.n_bytes = self._dtype.itemsize

    @abstractmethod
    def scales(self, blocks: NDArray[np.void]) -> Floats:
        """The scales [n] of blocks [n]."""

    @abstractmethod
    def _search(self, x: Floats, weight: Floats) -> tuple[Choice, NDArray[np.bool_]]:
        """The best encodings of x [n, s, 16], and which blocks [n] the type cannot hold."""

    @abstractmethod
    def _stored(self, d: Floats) -> NDArray[Any]:
        """Scales as blocks store them; those of NaN say so."""

    def quantize(self, rows: NDArray[Any], imatrix: NDArray[Any] | None = None) -> Bytes:
        """rows [n, k], k a multiple of the block, importances [k] >= 0 or None -> uint8 [n, bytes].

        A block with a NaN, with weights beyond the type's range, or with importances that make the error
        overflow a float, gets d = NaN. Raises ValueError for a row length that is no multiple of the block.
        """
        n, k = rows.shape
        blocks = np.ascontiguousarray(rows, np.float32).reshape(n * (k // self.block), self.block)
        if imatrix is None:
            return self.quantize_blocks(blocks).reshape(n, -1)
        importances = np.broadcast_to(np.asarray(imatrix, np.float32), (n, k)).reshape(blocks.shape)
        return self.quantize_blocks(blocks, importances).reshape(n, -1)

    def quantize_blocks(self, x: Floats, importances: Floats | None = None) -> Bytes:
        """x float32 [n, block], importances likewise, >= 0, or None -> uint8 [n, bytes of a block]."""
        out = np.zeros(len(x), self._dtype)
        step = _STEP // self.block
        # Infinite and NaN costs lose every comparison; they need no warning.
        with np.errstate(all="ignore"):
            weights = np.ones_like(x) if importances is None else error_weights(importances)
            for start in range(0, len(x), step):
                part = slice(start, start + step)
                out[part] = self._encode(
                    x[part].reshape(-1, self._n_subs, SUB).astype(np.float32),
                    weights[part].reshape(-1, self._n_subs, SUB).astype(np.float32),
                )
        return out.view(np.uint8).reshape(len(x), self.n_bytes)

    def dequantize(self, data: Bytes) -> Floats:
        """uint8 [n, bytes] -> float32 [n, k]."""
        blocks = self.blocks(data)
        out: Floats = self.scales(blocks)[:, None] * self.decode(blocks).astype(np.float32)
        return out.reshape(len(data), -1)

    def blocks(self, data: Bytes) -> NDArray[np.void]:
        """Bytes of whole blocks as records of d, s and q."""
        return np.ascontiguousarray(data).reshape(-1, self.n_bytes).view(self._dtype)[:, 0]

    def rows(self, blocks: NDArray[np.void]) -> Bytes:
        """The row indices [n, s] of the sub-blocks."""
        return np.stack([blocks["s"] & 15, blocks["s"] >> 4], -1).reshape(len(blocks), self._n_subs)

    def codes(self, blocks: NDArray[np.void]) -> Bytes:
        """The codes [n, block] of the weights."""
        return self._codes.unpack(blocks["q"])

    def set_codes(self, blocks: NDArray[np.void], codes: Bytes) -> None:
        """Puts codes [n, block] into the blocks."""
        blocks["q"] = self._codes.pack(codes)

    def decode(self, blocks: NDArray[np.void]) -> NDArray[np.int8]:
        """TABLE[s, q] of every weight: int8 [n, block]."""
        codes = self.codes(blocks).reshape(len(blocks), self._n_subs, SUB)
        return self.table.values[self.rows(blocks)[..., None], codes].reshape(len(blocks), self.block)

    def _encode(self, x: Floats, weight: Floats) -> NDArray[np.void]:
        """x, weight [n, s, 16] -> blocks [n]."""
        best, refused = self._search(x, weight)
        blocks = np.zeros(len(x), self._dtype)
        blocks["d"] = self._stored(np.where(refused, np.float32(np.nan), best.d))
        blocks["s"] = np.where(refused[:, None], 0, best.row[:, 0::2] | best.row[:, 1::2] << 4)
        codes = np.where(refused[:, None], np.uint8(0), best.codes().reshape(len(x), self.block))
        self.set_codes(blocks, codes)
        return blocks


_FP16_MAX = np.float32(65504)
_MAX_WEIGHT = np.float32(6e6)  # beyond it d would not fit fp16: 1.3 * 6e6 / 127 < 65504


class HalfScales(BlockType):
    """Blocks with an fp16 scale."""

    def __init__(self, block: int, table: Table, codes: Codes) -> None:
        super().__init__(block, table, "<f2", codes)

    def scales(self, blocks: NDArray[np.void]) -> Floats:
        d: Floats = blocks["d"].astype(np.float32)
        return d

    def _stored(self, d: Floats) -> NDArray[Any]:
        return d.astype(np.float16)

    def _search(self, x: Floats, weight: Floats) -> tuple[Choice, NDArray[np.bool_]]:
        largest = np.abs(x).max((1, 2))
        valid = largest <= _MAX_WEIGHT  # false for NaN
        x = np.where(valid[:, None, None], x, np.float32(0))
        best = no_choice(self.table, len(x), self._n_subs)
        for factor in _FACTORS:
            best.improve(choose(self.table, x, weight, _round_half(largest * (factor / np.float32(127)))))
        for _ in range(_N_REFITS):
            best.improve(choose(self.table, x, weight, _round_half(refit_d(x, weight, best))))
        overflowed = (best.d == 0) & (_round_half(largest * (_FACTORS[-1] / np.float32(127))) > 0)
        return best, ~valid | overflowed


def _round_half(d: Floats) -> Floats:
    """To the nearest fp16 (ties to even), at most the largest one."""
    return np.where(d < _FP16_MAX, d, _FP16_MAX).astype(np.float16).astype(np.float32)


_BYTE_NAN = 255
_BYTE_MAX_WEIGHT = np.float32(2e4)


def _make_scales() -> Floats:
    byte = np.arange(256)
    scales = np.ldexp(1 + byte % 8 / 8, byte // 8 - 24).astype(np.float32)
    scales[0], scales[_BYTE_NAN] = 0, np.nan
    return scales


# float32 [256]: the scale of each byte.
SCALES = _make_scales()


def round_d(d: Floats) -> NDArray[np.intp]:
    """The byte of the nearest scale (ties to the even one), at most the largest; 0 for nearer to 0."""
    bits = d.astype(np.float32).view(np.uint32).astype(np.int64)
    rounded = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - ((127 - 24) << 3)
    inside = np.where(d < SCALES[254], np.maximum(rounded, 1), 254)
    return np.where(d > np.float32(0.5) * SCALES[1], inside, 0).astype(np.intp)


class ByteScales(BlockType):
    """Blocks whose scale is a number without sign of 5 bits of exponent and 3 of fraction."""

    def __init__(self, block: int, table: Table, codes: Codes) -> None:
        super().__init__(block, table, "u1", codes)

    def scales(self, blocks: NDArray[np.void]) -> Floats:
        d: Floats = SCALES[blocks["d"]]
        return d

    def _stored(self, d: Floats) -> NDArray[Any]:
        return np.where(np.isnan(d), _BYTE_NAN, round_d(d)).astype(np.uint8)

    def _search(self, x: Floats, weight: Floats) -> tuple[Choice, NDArray[np.bool_]]:
        largest = np.abs(x).max((1, 2))
        valid = largest <= _BYTE_MAX_WEIGHT  # false for NaN
        x = np.where(valid[:, None, None], x, np.float32(0))
        largest = np.where(valid, largest, np.float32(0))
        first = round_d(largest * (_FIRST_FACTOR / np.float32(127)))
        best = no_choice(self.table, len(x), self._n_subs)
        for guess in range(_N_GUESSES):
            d = SCALES[np.where(first > 0, np.minimum(first + guess, 254), 0)]
            best.improve(choose(self.table, x, weight, d))
        for _ in range(_N_REFITS):
            d = SCALES[np.where(best.d > 0, round_d(refit_d(x, weight, best)), 0)]
            best.improve(choose(self.table, x, weight, d))
        return best, ~valid | ((first > 0) & (best.d == 0))
