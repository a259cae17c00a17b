"""FQ3_64: 64 weights in 27 bytes, FQ3's table, FQ4_64's scale of one byte; see fq4_blocks.py."""

from __future__ import annotations

from ggml_ext.gguf.fq3 import NEAREST
from ggml_ext.gguf.fq4_blocks import ByteScales, Planes

BLOCK = 64  # weights per block
LAYOUT = ByteScales(BLOCK, NEAREST, Planes(BLOCK))
BLOCK_BYTES = LAYOUT.n_bytes

quantize, dequantize = LAYOUT.quantize, LAYOUT.dequantize
