"""FQ3: 256 weights in 106 bytes, an fp16 scale, a table of 8 values per row; see fq4_blocks.py."""

from __future__ import annotations

from ggml_ext.gguf.fq4_blocks import HalfScales, Planes
from ggml_ext.gguf.fq4_search import Table

# Eight shapes from narrow to wide, learnt on Gaussian and Student-t weights (scripts/fq4_table.py --codes 8).
NEAREST = Table(
    [
        [-37, -23, -11, -2, 6, 16, 28, 44],
        [-55, -30, -15, -3, 9, 20, 34, 49],
        [-55, -36, -19, -5, 9, 24, 41, 65],
        [-58, -35, -17, -1, 15, 32, 53, 81],
        [-76, -41, -21, -4, 11, 28, 46, 71],
        [-71, -46, -26, -7, 11, 31, 58, 98],
        [-97, -43, -20, -2, 16, 37, 64, 99],
        [-88, -46, -23, -6, 10, 28, 52, 127],
    ]
)

# int8 [16 rows, 8 codes], rows ascending; row 8 + r is row r mirrored and negated.
TABLE = NEAREST.values

BLOCK = 256  # weights per block
LAYOUT = HalfScales(BLOCK, NEAREST, Planes(BLOCK))
BLOCK_BYTES = LAYOUT.n_bytes

quantize, dequantize = LAYOUT.quantize, LAYOUT.dequantize
