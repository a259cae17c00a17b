"""Where a file's bits went: bits per weight by kind of matrix and block, and what they cost in KL divergence
where the file says so. A table, and a picture with a square per matrix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ggml_ext.core.plots import require_matplotlib, save_figure
from ggml_ext.gguf.inspect import InspectResult, TensorInfo

_BLOCK = re.compile(r"^blk\.(\d+)\.(.*)$")


@dataclass(frozen=True)
class Place:
    """A matrix. ``kind``: its name without the block, as "attn_q"; ``block``: None outside of them. ``loss``:
    what its rounding costs by the file's table of losses, None where it has none."""

    kind: str
    block: int | None
    bits: float
    weights: int
    loss: float | None


def places(result: InspectResult) -> list[Place]:
    """All matrices of a file, as it has them."""
    losses = _losses(result)
    return [
        _place(tensor, losses.get((tensor.name, tensor.type.lower())))
        for tensor in result.tensors
        if len(tensor.dims) > 1 and tensor.name.endswith(".weight")
    ]


def _place(tensor: TensorInfo, loss: float | None) -> Place:
    match = _BLOCK.match(tensor.name)
    kind, block = (tensor.name, None) if match is None else (match[2], int(match[1]))
    bits = 8 * tensor.bytes / tensor.weights
    return Place(kind.removesuffix(".weight"), block, bits, tensor.weights, loss)


def _losses(result: InspectResult) -> dict[tuple[str, str], float]:
    if result.ext is None or result.ext.losses is None:
        return {}
    its = result.ext.losses
    values = iter(its.values)
    return {(tensor, kind): next(values) for tensor in its.tensors for kind in its.types}


def _kinds(found: Iterable[Place]) -> dict[str, list[Place]]:
    kinds: dict[str, list[Place]] = {}
    for place in found:
        kinds.setdefault(place.kind, []).append(place)
    return kinds


def bits_table(result: InspectResult) -> Table:
    """A line per kind of matrix: bits per weight, their range over the blocks, the kind's share of all bytes
    and of the losses that the file tells."""
    kinds = _kinds(places(result))
    table = Table("matrix", box=None, pad_edge=False)
    for column in ("bits/weight", "from", "to", "share"):
        table.add_column(column, justify="right")
    all_bits = sum(place.bits * place.weights for its in kinds.values() for place in its)
    all_loss = sum(place.loss or 0.0 for its in kinds.values() for place in its)
    if all_loss > 0:
        table.add_column("of the loss", justify="right")
    for kind, its in kinds.items():
        bits, weights = sum(place.bits * place.weights for place in its), sum(place.weights for place in its)
        cells = [
            f"{bits / weights:.3f}",
            f"{min(place.bits for place in its):.3f}",
            f"{max(place.bits for place in its):.3f}",
            f"{100 * bits / all_bits:.1f} %",
        ]
        if all_loss > 0:
            cells.append(f"{100 * sum(place.loss or 0.0 for place in its) / all_loss:.1f} %")
        table.add_row(kind, *cells)
    return table


def write_plot(path: Path, result: InspectResult) -> None:
    """Draws bits per weight, a column per block and a line per kind of matrix; those outside the blocks stand
    in a column of their own. Raises GgmlExtError without matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    found = places(result)
    kinds = list(_kinds(found))
    n_blocks = 1 + max((place.block for place in found if place.block is not None), default=-1)
    grid = _grid(found, kinds, n_blocks)
    figure = Figure(
        figsize=(3.2 + 0.28 * (n_blocks + 1), 1.4 + 0.3 * len(kinds)), dpi=130, layout="constrained"
    )
    axes = figure.add_subplot()
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    every = max(1, n_blocks // 16)
    ticks = list(range(0, n_blocks, every))
    axes.set_xticks([*ticks, n_blocks], [*map(str, ticks), "none"], fontsize=7)
    axes.set_xlabel("block")
    axes.set_title(f"{result.path.name}: {result.bits_per_weight:.3f} bits per weight", fontsize=9)
    figure.colorbar(image, ax=axes, label="bits per weight")
    save_figure(path, figure)


def _grid(found: Sequence[Place], kinds: Sequence[str], n_blocks: int) -> list[list[float]]:
    """Bits by kind and block, NaN where there is no such matrix."""
    grid = [[float("nan")] * (n_blocks + 1) for _ in kinds]
    for place in found:
        grid[kinds.index(place.kind)][n_blocks if place.block is None else place.block] = place.bits
    return grid
