"""FQ4_64: 64 weights in 35 bytes, FQ4's table, a scale of one byte; see fq4_blocks.py.

The code of weight j (0..31) is the low nibble of q[j], that of weight 32 + j the high one.
"""

from __future__ import annotations

from ggml_ext.gguf.fq4 import NEAREST
from ggml_ext.gguf.fq4_blocks import ByteScales, Nibbles

BLOCK = 64  # weights per block
LAYOUT = ByteScales(BLOCK, NEAREST, Nibbles(BLOCK, 32))
BLOCK_BYTES = LAYOUT.n_bytes

quantize, dequantize = LAYOUT.quantize, LAYOUT.dequantize
