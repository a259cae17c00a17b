#!/usr/bin/env python3
"""Learns an FQ4 table: Lloyd's algorithm with the whole encoder in the loop, in plain numpy.

    scripts/fq4_table.py [--model F16.gguf] [--codes 16|8] [--sub 16|32] [--shapes 4|8|32] [--free]
                         [--block 64 --mantissa 3]

Encode; move every entry to the value that minimises the squared error over the weights that chose it
(sum of d x / sum of d^2); repeat. Gaussian rows count 1, Student-t(5) rows 0.3, the block matrices of a
model 1, each relative to its own power. A row and its mirror image move together; entries are rounded to
int8 at the end only, for rounding in between stops the descent early. The frozen table came from such a
run, started from the first table of fq4_study.py; another run ends within 1 % of its error, elsewhere.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import gguf
import numpy as np
from fq4_study import (
    F32,
    FIRST_SHAPES,
    SUPER,
    TABLES,
    Encoder,
    Matrix,
    Variant,
    matrices,
    measure,
    mirrored,
    synthetic,
)

STEPS = 80
SAMPLE = 196608  # weights of each data set per step
CELLS = 16  # of the encoder, per unit of x / d: entries are no integers while they move
BATCH = 8192  # weights
SHARES = {"gaussian": 1.0, "t5": 0.3, "model": 1.0}


def first_shapes(count: int, codes: int) -> F32:
    """[count, codes]: of the first eight shapes evenly spaced ones, or as many between them, with as many
    values as there are codes: the means of neighbours where these are 8."""
    first = FIRST_SHAPES.reshape(len(FIRST_SHAPES), codes, -1).mean(-1)
    if count <= len(first):
        return first[:: len(first) // count]
    at = np.linspace(0, len(first) - 1, count)
    low = np.minimum(at.astype(int), len(first) - 2)
    part = (at - low)[:, None]
    shapes = first[low] * (1 - part) + first[low + 1] * part
    # Or neighbours would stay alike.
    shapes += 3 * np.random.default_rng(0).standard_normal(shapes.shape)
    return np.sort(shapes, axis=1).astype(np.float32)


def step(table: F32, variant: Variant, data: dict[str, F32], random: np.random.Generator, free: bool) -> F32:
    """One round of Lloyd's algorithm on a sample of every data set: a better table. ``free``: rows do not
    move with their mirror images."""
    encoder = Encoder(variant, table, CELLS)
    moment = np.zeros(table.size)
    power = np.zeros(table.size)
    for name, blocks in data.items():
        sample = blocks[random.permutation(len(blocks))[: SAMPLE // variant.block]]
        share = SHARES[name] / np.square(sample).sum()
        batch = BATCH // variant.block
        for start in range(0, len(sample), batch):
            x = sample[start : start + batch]
            d, levels, rows = encoder.encode(x, None)
            row = np.repeat(rows.astype(np.intp), variant.sub, axis=1)
            entry = (table.shape[1] * row + np.abs(levels[..., None] - table[row]).argmin(-1)).ravel()
            scale = np.broadcast_to(d[:, None], x.shape)
            moment += np.bincount(entry, (share * scale * x).ravel(), table.size)
            power += np.bincount(entry, (share * scale * scale).ravel(), table.size)
    half = len(table) // 2
    moments, powers = moment.reshape(table.shape), power.reshape(table.shape)
    if not free:
        moments = moments[:half] - moments[half:, ::-1]
        powers = powers[:half] + powers[half:, ::-1]
    moved = np.where(powers > 0, moments / np.where(powers > 0, powers, 1), table[: len(powers)])
    moved = np.sort(np.clip(moved, -127, 127), axis=1).astype(np.float32)
    return moved if free else mirrored(moved)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="f16, bf16 or f32 GGUF")
    parser.add_argument("--codes", type=int, choices=(16, 8), default=16, help="values of a row")
    parser.add_argument("--sub", type=int, choices=(16, 32), default=16, help="weights per sub-block")
    parser.add_argument(
        "--shapes", type=int, choices=(4, 8, 32), default=8, help="rows of the table, less mirrors"
    )
    parser.add_argument("--free", action="store_true", help="rows without mirror images")
    parser.add_argument("--block", type=int, choices=(256, 64), default=SUPER, help="weights per block")
    parser.add_argument("--mantissa", type=int, default=10, help="bits of the scale's fraction, 10 is fp16")
    args = parser.parse_args()

    tests = {name: items for name, items in synthetic(seed=0).items() if name in SHARES}
    train = {name: items for name, items in synthetic(seed=1).items() if name in SHARES}
    if args.model is not None:
        blocks = [matrix.x.reshape(-1, args.block) for matrix in matrices(gguf.GGUFReader(args.model), {})]
        scaled = [block / np.sqrt(np.square(block).mean()) for block in blocks]
        train["model"] = [Matrix("even", np.concatenate([block[0::2] for block in scaled]))]
        tests["model"] = [Matrix("odd", np.concatenate([block[1::2] for block in scaled]))]
    data = {
        name: np.concatenate([item.x.reshape(-1, args.block) for item in items])
        for name, items in train.items()
    }

    random = np.random.default_rng(1)
    layout = Variant("result", table="learning", sub=args.sub, block=args.block, mantissa=args.mantissa)
    variant = dataclasses.replace(layout, candidates=7, low=0.8, refits=1)
    table = mirrored(first_shapes(args.shapes, args.codes))
    for number in range(STEPS):
        table = step(table, variant, data, random, args.free)
        if number % 10 == 9:
            TABLES["learning"] = np.rint(table)
            errors = {name: measure(layout, items)["error"] for name, items in tests.items()}
            figures = "  ".join(f"{name} {error:.6f}" for name, error in errors.items())
            print(f"step {number + 1}, {layout.bits} bits: {figures}", flush=True)
    for shape in np.rint(table if args.free else table[: args.shapes]).astype(int).tolist():
        print(shape)


if __name__ == "__main__":
    main()
