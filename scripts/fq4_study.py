#!/usr/bin/env python3
"""The comparison that settled the layout, table and encoder of FQ4 (docs/fq4.md), the layout of FQ4_64
(docs/fq4_64.md) and the encoders of FQ3 and FQ3_64 (docs/fq3.md), in plain numpy.

    scripts/fq4_study.py --json OUT.json                       Gaussian, Student-t(5) and Student-t(3) rows
    scripts/fq4_study.py --model F16.gguf --imatrix I.gguf     the block matrices of a model as well
    scripts/fq4_study.py --model F16.gguf --write DIR          and one F32 GGUF per variant, with the decoded
                                                               weights, for `ggml-ext compare`

Every variant is a fake quantiser: weights in, decoded weights out. A block of 256 (64) weights has
one scale d; each sub-block picks the row of the table with the smallest weighted error. The
encoder tries `candidates` values of d = absmax * f / 127, keeps the best, then `refits` times
refits d by least squares and searches again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from ggml_ext.gguf import fq3, fq4

F32 = NDArray[np.float32]

SUPER = 256
CHUNK = 8192  # weights per step: the [weights, rows] error array then stays in the L2 cache
LONE_FACTOR = 1.05  # f where there is one candidate only

# Eight shapes; the table has their mirror images too. The frozen format's, and those that the study began
# with.
SHAPES = fq4.TABLE[:8].astype(np.float32)
FIRST_SHAPES = np.array(
    [
        [-46, -34, -27, -22, -16, -12, -7, -2, 4, 8, 14, 18, 24, 30, 38, 47],
        [-58, -44, -36, -28, -20, -14, -8, -2, 4, 10, 15, 22, 29, 36, 44, 53],
        [-63, -50, -40, -32, -24, -20, -10, -3, 4, 10, 16, 26, 34, 42, 52, 64],
        [-74, -58, -47, -38, -28, -20, -12, -3, 5, 14, 22, 30, 39, 48, 61, 75],
        [-86, -68, -54, -42, -31, -22, -12, -4, 5, 14, 23, 34, 44, 55, 67, 80],
        [-97, -72, -58, -46, -35, -25, -14, -4, 6, 16, 27, 38, 50, 64, 79, 95],
        [-112, -84, -64, -51, -39, -27, -16, -4, 8, 20, 32, 43, 56, 72, 88, 108],
        [-122, -89, -72, -57, -44, -30, -18, -6, 6, 21, 35, 48, 62, 78, 101, 126],
    ],
    dtype=np.float32,
)
IQ4_NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def mirrored(shapes: F32) -> F32:
    """[n, codes] shapes -> [2 n, codes]: every shape, then every shape mirrored and negated."""
    return np.concatenate([shapes, -shapes[:, ::-1]])


def scaled(codebook: F32, rows: int) -> F32:
    """One codebook times `rows` evenly spaced scales up to 1, over the range of the free table."""
    return np.rint(codebook * np.linspace(0.36, 1.0, rows, dtype=np.float32)[:, None]).astype(np.float32)


TABLES = {
    "learned": mirrored(SHAPES),
    "first": mirrored(FIRST_SHAPES),
    "8 rows": mirrored(SHAPES[[0, 2, 4, 7]]),
    "codebook x 16": scaled(IQ4_NL, 16),
    "codebook x 8": scaled(IQ4_NL, 8),
    "8 codes": fq3.TABLE.astype(np.float32),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One format and encoder. `importance`: how importances (all 1 without a matrix) become weights of the
    squared error: "plain" w = imp; "magnitude" w = imp sqrt(mean(x^2) + x^2), as llama.cpp's encoders."""

    name: str
    table: str = "learned"
    sub: int = 16
    candidates: int = 9
    low: float = 0.90
    high: float = 1.30
    refits: int = 2
    importance: str = "plain"
    block: int = SUPER
    mantissa: int = 10  # bits of the scale's fraction: 10 is fp16, fewer a minifloat of 8 bits in all

    @property
    def bits(self) -> float:
        """Bits per weight."""
        index_bits, code_bits = np.log2(TABLES[self.table].shape)
        return float(code_bits + (16 if self.mantissa == 10 else 8) / self.block + index_bits / self.sub)

    def round_scale(self, d: F32) -> F32:
        """d [n] as the format can hold it. Minifloats: the range of the exponent is left open."""
        if self.mantissa == 10:
            return d.astype(np.float16).astype(np.float32)
        fraction, exponent = np.frexp(d)
        steps = np.float32(2 << self.mantissa)
        return np.ldexp(np.rint(fraction * steps) / steps, exponent).astype(np.float32)


def encoder(candidates: int, low: float, high: float, refits: int = 2, table: str = "learned") -> Variant:
    prefix = "FQ3, " if table == "8 codes" else ""
    name = f"{prefix}{candidates} x {low:.2f}-{high:.2f}, {refits} refits"
    return Variant(name, table=table, candidates=candidates, low=low, high=high, refits=refits)


VARIANTS = [
    Variant("FQ4"),
    Variant("first table", table="first", candidates=11, low=0.62, high=1.12),
    Variant("one codebook x 16 scales", table="codebook x 16", candidates=11, low=0.62, high=1.12),
    Variant("3-bit row indices", table="8 rows"),
    Variant("3 bits, codebook x 8 scales", table="codebook x 8", candidates=11, low=0.62, high=1.12),
    Variant("sub-blocks of 32", sub=32),
    Variant("32, codebook x 16 scales", table="codebook x 16", sub=32, candidates=11, low=0.62, high=1.12),
    Variant("magnitude weights", importance="magnitude"),
    encoder(1, LONE_FACTOR, LONE_FACTOR),
    encoder(3, 0.95, 1.15),
    encoder(5, 0.90, 1.20),
    encoder(7, 0.85, 1.25),
    encoder(7, 0.90, 1.30),
    encoder(9, 0.80, 1.30),
    encoder(9, 0.90, 1.30, 0),
    encoder(9, 0.90, 1.30, 1),
    encoder(9, 0.90, 1.30, 4),
    encoder(11, 0.62, 1.12),
    encoder(11, 0.80, 1.30),
    encoder(11, 0.85, 1.35),
    encoder(15, 0.70, 1.40),
    encoder(31, 0.50, 1.60),
    *(
        Variant(f"64, {scale}", block=64, mantissa=mantissa, candidates=11, high=1.40)
        for scale, mantissa in (("fp16", 10), ("e3m5", 5), ("e4m4", 4), ("e5m3", 3), ("e6m2", 2))
    ),
    *(
        encoder(candidates, low, high, refits, "8 codes")
        for candidates, low, high, refits in (
            (5, 0.80, 1.20, 2),
            (7, 0.80, 1.25, 2),
            (9, 0.75, 1.15, 2),
            (9, 0.80, 1.20, 2),
            (9, 0.80, 1.40, 2),
            (9, 0.90, 1.30, 0),
            (9, 0.90, 1.30, 2),
            (9, 0.90, 1.30, 4),
            (13, 0.70, 1.30, 2),
            (25, 0.50, 1.70, 2),
        )
    ),
    Variant("FQ3_64", table="8 codes", block=64, mantissa=3, candidates=11, low=0.8, high=1.40),
]


class Encoder:
    """Searches d and rows for `variant`, with a table other than the variant's if one is given. The nearest
    level is looked up by floor(cells x / d): midpoints of integer levels are halves, so 2 cells are exact."""

    def __init__(self, variant: Variant, table: F32 | None = None, cells: int = 2) -> None:
        self.variant = variant
        self.table = TABLES[variant.table] if table is None else table
        self.cells = cells
        middles = (np.arange(-128 * cells, 128 * cells, dtype=np.float32) + np.float32(0.5)) / cells
        codes = np.abs(middles[:, None, None] - self.table[None]).argmin(-1)
        self.levels = np.take_along_axis(self.table[None], codes[..., None], -1)[
            ..., 0
        ].copy()  # [256 cells, rows]

    def _search(self, x: F32, w: F32, d: F32) -> tuple[F32, F32, NDArray[np.uint8]]:
        """x, w [n, block], d [n] -> (cost [n], levels [n, block], row per sub-block [n, block / sub])."""
        n, rows, sub = len(x), len(self.table), self.variant.sub
        inverse = np.where(d != 0, 1 / np.where(d != 0, d, 1), 0).astype(np.float32)
        t = x * inverse[:, None]
        index = np.clip(np.floor(t * self.cells) + 128 * self.cells, 0, 256 * self.cells - 1).astype(np.intp)
        levels = np.take(self.levels, index.ravel(), axis=0)  # [n * 256, rows]
        error = t.reshape(-1, 1) - levels
        error *= error
        error *= w.reshape(-1, 1)
        cost = error.reshape(n, -1, sub, rows).sum(2)
        best = cost.argmin(-1)
        total = np.take_along_axis(cost, best[..., None], -1).sum((1, 2)) * d * d
        chosen = np.take_along_axis(levels.reshape(n, -1, sub, rows), best[..., None, None], -1).reshape(
            x.shape
        )
        return total, chosen, best.astype(np.uint8)

    def encode(self, x: F32, imp: F32 | None) -> tuple[F32, F32, NDArray[np.uint8]]:
        """x [n, block], imp [n, block] or None -> (d [n], levels [n, block], rows [n, block / sub])."""
        v = self.variant
        w = np.ones_like(x) if imp is None else imp
        if v.importance == "magnitude":
            w = w * np.sqrt((x * x).mean(1, keepdims=True) + x * x)
        absmax = np.abs(x).max(1)
        d = np.zeros(len(x), np.float32)
        _, levels, rows = self._search(x, w, d)
        cost = np.full(len(x), np.inf, np.float32)
        for trial in range(v.candidates + v.refits):
            if trial < v.candidates:
                step = (v.high - v.low) / max(v.candidates - 1, 1)
                guess = absmax * np.float32((v.low + trial * step) / 127)
            else:
                power = (w * levels * levels).sum(1)
                guess = (w * x * levels).sum(1) / np.where(power > 0, power, 1)
            guess = v.round_scale(guess)
            found = self._search(x, w, guess)
            better = found[0] < cost
            cost = np.where(better, found[0], cost)
            d = np.where(better, guess, d)
            levels = np.where(better[:, None], found[1], levels)
            rows = np.where(better[:, None], found[2], rows)
        return d, levels, rows

    def __call__(self, x: F32, imp: F32 | None = None) -> F32:
        """x [n, k], imp [k] or None, k a multiple of the block -> decoded [n, k]."""
        block = self.variant.block
        blocks = np.ascontiguousarray(x, np.float32).reshape(-1, block)
        imps = None if imp is None else np.broadcast_to(imp, x.shape).reshape(-1, block).astype(np.float32)
        out = np.empty_like(blocks)

        step = CHUNK // block

        def work(start: int) -> None:
            part = slice(start, start + step)
            d, levels, _ = self.encode(blocks[part], None if imps is None else imps[part])
            out[part] = d[:, None] * levels

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(work, range(0, len(blocks), step)))
        return out.reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """x [n, k], imp [k] or None; data sets are lists of these."""

    name: str
    x: F32
    imp: F32 | None = None


def synthetic(seed: int = 0, shape: tuple[int, int] = (512, 1024)) -> dict[str, list[Matrix]]:
    rng = np.random.default_rng(seed)
    return {
        "gaussian": [Matrix("rows", rng.standard_normal(shape).astype(np.float32))],
        "t5": [Matrix("rows", rng.standard_t(5, shape).astype(np.float32))],
        "t3": [Matrix("rows", rng.standard_t(3, shape).astype(np.float32))],
    }


def read_imatrix(path: Path) -> dict[str, F32]:
    """llama-imatrix's GGUF -> tensor name -> importances [k], averaged over experts."""
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    suffix = ".in_sum2"
    return {
        name.removesuffix(suffix): (data.reshape(-1, data.shape[-1]).sum(0) / tensors[counts].sum()).astype(
            "f4"
        )
        for name, data in tensors.items()
        if name.endswith(suffix) and (counts := name.replace(suffix, ".counts")) in tensors
    }


def matrices(reader: gguf.GGUFReader, imps: dict[str, F32]) -> Iterator[Matrix]:
    """The 2-D weights of the blocks; embeddings and head stay as they are."""
    for tensor in reader.tensors:
        if len(tensor.shape) == 2 and tensor.name.startswith("blk.") and tensor.shape[0] % SUPER == 0:
            x = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            yield Matrix(tensor.name, x, imps.get(tensor.name))


def measure(variant: Variant, data: list[Matrix]) -> dict[str, float]:
    """Relative squared errors, plain and importance-weighted, mean over matrices; encoder time per weight."""
    encode = Encoder(variant)
    errors, weighted, seconds = [], [], 0.0
    for matrix in data:
        start = time.process_time()
        decoded = encode(matrix.x, matrix.imp)
        seconds += time.process_time() - start
        square = np.square(matrix.x - decoded, dtype=np.float64)
        power = np.square(matrix.x, dtype=np.float64)
        imp = 1.0 if matrix.imp is None else matrix.imp
        errors.append(square.sum() / power.sum())
        weighted.append((imp * square).sum() / (imp * power).sum())
    weights = sum(matrix.x.size for matrix in data)
    return {
        "error": float(np.mean(errors)),
        "weighted_error": float(np.mean(weighted)),
        "us_per_weight": 1e6 * seconds / weights,
    }


def write_model(path: Path, reader: gguf.GGUFReader, decoded: dict[str, F32]) -> None:
    """A copy of the model in F32, with the given matrices in place of its own."""
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, arch)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in (
            "general.architecture",
            "general.file_type",
        ):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        if tensor.name in decoded:
            writer.add_tensor(tensor.name, decoded[tensor.name])
        else:
            writer.add_tensor(
                tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def print_row(variant: Variant, results: dict[str, dict[str, float]]) -> None:
    cells = [f"{result['error']:.6f} {result['weighted_error']:.6f}" for result in results.values()]
    seconds = np.mean([result["us_per_weight"] for result in results.values()])
    print(f"{variant.name:30} {variant.bits:.4f}  {'  '.join(cells)}  {seconds:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="f16, bf16 or f32 GGUF")
    parser.add_argument("--imatrix", type=Path, help="importance matrix of llama-imatrix (GGUF)")
    parser.add_argument("--only", default="", metavar="REGEX", help="variants whose names match")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--write", type=Path, metavar="DIR", help="write a fake-quantised F32 GGUF per variant"
    )
    args = parser.parse_args()

    data = synthetic()
    reader = gguf.GGUFReader(args.model) if args.model else None
    if reader is not None:
        data["model"] = list(matrices(reader, read_imatrix(args.imatrix) if args.imatrix else {}))
    print(
        f"{'variant':30} bits    "
        + "  ".join(f"{name + ': error, weighted':17}" for name in data)
        + "  us/weight"
    )
    rows: list[dict[str, Any]] = []
    for variant in VARIANTS:
        if not re.search(args.only, variant.name):
            continue
        results = {name: measure(variant, items) for name, items in data.items()}
        print_row(variant, results)
        rows.append({**dataclasses.asdict(variant), "bits": variant.bits, "results": results})
        if args.write is not None and reader is not None:
            encode = Encoder(variant)
            decoded = {matrix.name: encode(matrix.x, matrix.imp) for matrix in data["model"]}
            write_model(
                args.write / f"{re.sub('[^a-z0-9.]+', '-', variant.name.lower())}.gguf", reader, decoded
            )
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
