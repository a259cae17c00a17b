"""The levels that the weights of an encoded matrix can take, and how to change only their codes.

A Grid separates what GPTQ, coordinate descent and learned rounding choose (one level per weight) from what
the encoder chose before (scales, minima, table rows): w = scale * books[book][level] + offset, with one
scale, offset and book per group of consecutive weights. Block layouts: ggml/src/ggml-common.h of llama.cpp
(block_q4_0, block_q4_K, ...); a test decodes every type both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ggml_ext.gguf import fq3, fq3_64, fq4, fq4_64, fq4_blocks

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Grid:
    """``group``: weights per group. ``books`` float32 [n_books, n_levels], ascending. ``scale``,
    ``offset`` float32 and ``book`` uint8, all [rows, n / group]. ``levels`` uint8 [rows, n]."""

    group: int
    books: Floats
    scale: Floats
    offset: Floats
    book: Bytes
    levels: Bytes

    def values(self) -> Floats:
        """The weights, float32 [rows, n]."""
        rows, n = self.levels.shape
        groups = self.levels.reshape(rows, n // self.group, self.group)
        picked = self.books[self.book[..., None], groups]
        values: Floats = self.scale[..., None] * picked + self.offset[..., None]
        return values.reshape(rows, n)

    def with_levels(self, levels: Bytes) -> Grid:
        """The same groups with other levels."""
        return replace(self, levels=levels)


@dataclass(frozen=True)
class _Layout:
    """``block``: weights per block of ``n_bytes``. ``scales``: byte offsets of its fp16 scales. ``books``:
    ascending levels. ``codes``: level -> the code that stands for it in the file."""

    block: int
    n_bytes: int
    group: int
    books: Floats
    codes: Bytes
    scales: tuple[int, ...]
    parameters: Callable[[Bytes], tuple[Floats, Floats, Bytes]]
    unpack: Callable[[Bytes], Bytes]
    pack: Callable[[Bytes, Bytes], None]


def supports(type_name: str) -> bool:
    """Whether levels can be chosen one by one for the type."""
    return type_name in _LAYOUTS


def names() -> list[str]:
    """The types that have a grid."""
    return list(_LAYOUTS)


def block_size(type_name: str) -> int:
    """Weights per block."""
    return _LAYOUTS[type_name].block


def decode(type_name: str, data: Bytes) -> Grid:
    """The grid of uint8 [rows, row bytes] as the encoder left it."""
    layout = _LAYOUTS[type_name]
    blocks = data.reshape(-1, layout.n_bytes)
    scale, offset, book = layout.parameters(blocks)
    inverse = np.zeros(256, np.uint8)
    inverse[layout.codes] = np.arange(layout.codes.size)
    levels = inverse[layout.unpack(blocks)]
    rows = len(data)
    return Grid(
        layout.group,
        layout.books,
        np.ascontiguousarray(scale.reshape(rows, -1), np.float32),
        np.ascontiguousarray(offset.reshape(rows, -1), np.float32),
        np.ascontiguousarray(book.reshape(rows, -1)),
        levels.reshape(rows, -1),
    )


def encode(type_name: str, data: Bytes, levels: Bytes) -> Bytes:
    """A copy of ``data`` with other levels, uint8 [rows, n]; scales stay."""
    layout = _LAYOUTS[type_name]
    out = data.copy()
    layout.pack(out.reshape(-1, layout.n_bytes), layout.codes[levels].reshape(-1, layout.block))
    return out


def rescale(type_name: str, data: Bytes, factor: float | Floats) -> Bytes:
    """A copy of ``data`` whose blocks' scales are multiplied by ``factor`` (one, or one per block, as
    [rows, blocks]), as far as their floats can. MXFP4 and NVFP4 are returned as they are."""
    layout = _LAYOUTS[type_name]
    out = data.copy()
    blocks = out.reshape(-1, layout.n_bytes)
    if type_name in ("fq4_64", "fq3_64"):
        scale = fq4_blocks.SCALES[blocks[:, 0]] * np.asarray(factor, np.float32).reshape(-1)
        blocks[:, 0] = fq4_blocks.round_d(scale)
    for at in layout.scales:
        scale = _half(blocks, at).astype(np.float32) * np.asarray(factor, np.float32).reshape(-1)
        blocks[:, at : at + 2] = scale.clip(-65504, 65504).astype("<f2")[:, None].view(np.uint8)
    return out


def _half(blocks: Bytes, at: int) -> NDArray[np.float16]:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")[:, 0]


def _nibbles(packed: Bytes, run: int) -> Bytes:
    """uint8 [blocks, n / 2] -> [blocks, n]: of each ``run`` bytes first the low nibbles, then the high."""
    parts = packed.reshape(len(packed), -1, run)
    return np.stack([parts & 15, parts >> 4], 2).reshape(len(packed), -1)


def _joined(low: Bytes, high: Bytes) -> Bytes:
    codes: Bytes = low | high << np.uint8(4)
    return codes.reshape(-1, 256)


def _pack_nibbles(codes: Bytes, run: int) -> Bytes:
    parts = codes.reshape(len(codes), -1, 2, run)
    packed: Bytes = parts[:, :, 0] | parts[:, :, 1] << np.uint8(4)
    return packed.reshape(len(codes), -1)


def _no_offset(scale: Floats) -> tuple[Floats, Floats, Bytes]:
    return scale, np.zeros_like(scale), np.zeros(scale.shape, np.uint8)


# --- Q4_0: fp16 d, 32 codes; w = d (q - 8)


def _d_parameters(blocks: Bytes) -> tuple[Floats, Floats, Bytes]:
    return _no_offset(_half(blocks, 0).astype(np.float32)[:, None])


# --- Q4_1: fp16 d, m, 32 codes; w = d q + m. Q5_0, Q5_1: the same two with a fifth bit of each code in a
# uint32 before the nibbles; Q5_0: w = d (q - 16)


def _minimum_parameters(blocks: Bytes) -> tuple[Floats, Floats, Bytes]:
    scale, minimum = (_half(blocks, at).astype(np.float32)[:, None] for at in (0, 2))
    return scale, minimum, np.zeros(scale.shape, np.uint8)


def _fifth_bits(first: int) -> tuple[Callable[[Bytes], Bytes], Callable[[Bytes, Bytes], None]]:
    """Unpack and pack for the bits in bytes first .. first + 3 and the nibbles in the 16 bytes after them."""
    nibbles = first + 4

    def unpack(blocks: Bytes) -> Bytes:
        high = np.unpackbits(blocks[:, first:nibbles], axis=1, bitorder="little")
        codes: Bytes = _nibbles(blocks[:, nibbles : nibbles + 16], 16) | high << np.uint8(4)
        return codes

    def pack(blocks: Bytes, codes: Bytes) -> None:
        blocks[:, first:nibbles] = np.packbits(codes >> 4, axis=1, bitorder="little")
        blocks[:, nibbles : nibbles + 16] = _pack_nibbles(codes & np.uint8(15), 16)

    return unpack, pack


# --- Q4_K, Q5_K: fp16 d, dmin; 8 scales and 8 minima of 6 bits in 12 bytes; w = d sc q - dmin m


def _k_parameters(blocks: Bytes) -> tuple[Floats, Floats, Bytes]:
    packed = blocks[:, 4:16]
    low, high, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = np.concatenate([low & 63, (rest & 15) | (low >> 6) << 4], 1).astype(np.float32)
    minimum = np.concatenate([high & 63, (rest >> 4) | (high >> 6) << 4], 1).astype(np.float32)
    d, dmin = (_half(blocks, at).astype(np.float32)[:, None] for at in (0, 2))
    return d * scale, -(dmin * minimum), np.zeros(scale.shape, np.uint8)


def _q5_k_unpack(blocks: Bytes) -> Bytes:
    low = _nibbles(blocks[:, 48:176], 32).reshape(-1, 8, 32)
    high: Bytes = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None] & np.uint8(1)
    return _joined(low, high)


def _q5_k_pack(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 48:176] = _pack_nibbles(codes & np.uint8(15), 32)
    high = (codes.reshape(-1, 8, 32) >> 4) << np.arange(8, dtype=np.uint8)[None, :, None]
    blocks[:, 16:48] = np.bitwise_or.reduce(high, 1)


# --- Q6_K: 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 int8 scales, fp16 d; w = d sc (q - 32)
# Each half of 128 weights: low nibbles in runs of 64 bytes, bit pair k of byte l belongs to weight 32 k + l.


def _q6_k_parameters(blocks: Bytes) -> tuple[Floats, Floats, Bytes]:
    scale = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return _no_offset(_half(blocks, 208).astype(np.float32)[:, None] * scale)


def _q6_k_unpack(blocks: Bytes) -> Bytes:
    low = _nibbles(blocks[:, :128], 64).reshape(-1, 2, 4, 32)
    shift = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    high: Bytes = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shift & np.uint8(3)
    return _joined(low, high)


def _q6_k_pack(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, :128] = _pack_nibbles(codes & np.uint8(15), 64)
    shift = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    high = (codes.reshape(-1, 2, 4, 32) >> 4) << shift
    blocks[:, 128:192] = np.bitwise_or.reduce(high, 2).reshape(-1, 64)


# --- IQ4_NL: fp16 d, 32 codes; w = d K[q]. IQ4_XS: fp16 d, 8 scales of 6 bits (2 high bits in one uint16,
# low nibbles in 4 bytes); w = d (ls - 32) K[q]

_IQ4_VALUES = np.array(
    [[-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]], np.float32
)


def _iq4_xs_parameters(blocks: Bytes) -> tuple[Floats, Floats, Bytes]:
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> (2 * np.arange(8, dtype=np.uint16)) & 3
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], 2).reshape(-1, 8)
    scale = (low | high << 4).astype(np.float32) - 32
    return _no_offset(_half(blocks, 0).astype(np.float32)[:, None] * scale)


# --- MXFP4 and NVFP4: e2m1 codes; sign in bit 3, magnitudes doubled; the scale is halved for it

_E2M1 = np.array([[-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12]], np.float32)
_E2M1_CODES = np.array([15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7], np.uint8)


def _mxfp4_parameters(blocks: Bytes) -> tuple[Floats, Floats, Bytes]:
    """The scale is 2^(e - 127), e one byte per 32 weights."""
    return _no_offset(np.ldexp(np.float32(0.5), blocks[:, :1].astype(np.int32) - 127).astype(np.float32))


def _nvfp4_parameters(blocks: Bytes) -> tuple[Floats, Floats, Bytes]:
    """The scale is an unsigned e4m3 (bias 7, 3 bits of mantissa) per 16 weights; 0x7f stands for 0."""
    bits = blocks[:, :4].astype(np.int32)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    normal = np.ldexp((1 + mantissa / 8).astype(np.float32), exponent - 7)
    scale = np.where(exponent == 0, np.ldexp(mantissa.astype(np.float32), -9), normal)
    return _no_offset(np.where(bits == 0x7F, 0, scale * 0.5).astype(np.float32))


def _unpack_e2m1(codes: Bytes) -> Bytes:
    return np.where(codes == 8, 0, codes)  # the negative zero


# --- FQ4, FQ4_64, FQ3, FQ3_64: docs/gguf.md


def _table_layout(layout: fq4_blocks.BlockType, scales: tuple[int, ...]) -> _Layout:
    """Of a type whose weights are d T[s][q]."""

    def parameters(blocks: Bytes) -> tuple[Floats, Floats, Bytes]:
        records = layout.blocks(blocks)
        rows = layout.rows(records)
        scale = np.repeat(layout.scales(records)[:, None], rows.shape[1], 1)
        return scale, np.zeros_like(scale), rows

    def unpack(blocks: Bytes) -> Bytes:
        return layout.codes(layout.blocks(blocks))

    def pack(blocks: Bytes, codes: Bytes) -> None:
        records = layout.blocks(blocks).copy()
        layout.set_codes(records, codes)
        blocks[:] = records.view(np.uint8).reshape(blocks.shape)

    books = layout.table.values.astype(np.float32)
    codes = np.arange(books.shape[1], dtype=np.uint8)
    return _Layout(layout.block, layout.n_bytes, 16, books, codes, scales, parameters, unpack, pack)


def _packed(
    first: int, last: int, run: int
) -> tuple[Callable[[Bytes], Bytes], Callable[[Bytes, Bytes], None]]:
    """Unpack and pack for codes that are all nibbles, in bytes first .. last - 1."""

    def unpack(blocks: Bytes) -> Bytes:
        return _nibbles(blocks[:, first:last], run)

    def pack(blocks: Bytes, codes: Bytes) -> None:
        blocks[:, first:last] = _pack_nibbles(codes, run)

    return unpack, pack


def _steps(first: int, last: int) -> Floats:
    return np.arange(first, last, dtype=np.float32)[None]


_CODES4, _CODES5, _CODES6 = (np.arange(n, dtype=np.uint8) for n in (16, 32, 64))
_Q6_STEPS = _steps(-32, 32)

_mxfp4_nibbles, _pack_mxfp4 = _packed(1, 17, 16)
_nvfp4_nibbles, _pack_nvfp4 = _packed(4, 36, 8)


def _unpack_mxfp4(blocks: Bytes) -> Bytes:
    return _unpack_e2m1(_mxfp4_nibbles(blocks))


def _unpack_nvfp4(blocks: Bytes) -> Bytes:
    return _unpack_e2m1(_nvfp4_nibbles(blocks))


# fmt: off
_LAYOUTS = {
    "fq4": _table_layout(fq4.LAYOUT, (0,)),
    "fq4_64": _table_layout(fq4_64.LAYOUT, ()),
    "fq3": _table_layout(fq3.LAYOUT, (0,)),
    "fq3_64": _table_layout(fq3_64.LAYOUT, ()),
    "q4_0": _Layout(32, 18, 32, _steps(-8, 8), _CODES4, (0,), _d_parameters, *_packed(2, 18, 16)),
    "q4_1": _Layout(32, 20, 32, _steps(0, 16), _CODES4, (0, 2), _minimum_parameters, *_packed(4, 20, 16)),
    "q5_0": _Layout(32, 22, 32, _steps(-16, 16), _CODES5, (0,), _d_parameters, *_fifth_bits(2)),
    "q5_1": _Layout(32, 24, 32, _steps(0, 32), _CODES5, (0, 2), _minimum_parameters, *_fifth_bits(4)),
    "q4_k": _Layout(256, 144, 32, _steps(0, 16), _CODES4, (0, 2), _k_parameters, *_packed(16, 144, 32)),
    "q5_k": _Layout(256, 176, 32, _steps(0, 32), _CODES5, (0, 2), _k_parameters, _q5_k_unpack, _q5_k_pack),
    "q6_k": _Layout(256, 210, 16, _Q6_STEPS, _CODES6, (208,), _q6_k_parameters, _q6_k_unpack, _q6_k_pack),
    "iq4_nl": _Layout(32, 18, 32, _IQ4_VALUES, _CODES4, (0,), _d_parameters, *_packed(2, 18, 16)),
    "iq4_xs": _Layout(256, 136, 32, _IQ4_VALUES, _CODES4, (0,), _iq4_xs_parameters, *_packed(8, 136, 16)),
    "mxfp4": _Layout(32, 17, 32, _E2M1, _E2M1_CODES, (), _mxfp4_parameters, _unpack_mxfp4, _pack_mxfp4),
    "nvfp4": _Layout(64, 36, 16, _E2M1, _E2M1_CODES, (), _nvfp4_parameters, _unpack_nvfp4, _pack_nvfp4),
}
# fmt: on
