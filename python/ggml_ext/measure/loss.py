"""Tells from the rows of ``compare`` where a model's loss comes from: its blocks and its tensors.

The error behind the last block is shared out among the parts in which it arose, the embedding and the
blocks. If errors of different parts are uncorrelated, what a block passes on adds to what it causes:
A_k = g_k A_(k-1) + O_k, where A is the accumulated and O the own error (see layers.py). Both are measured, so
each gain g_k follows, and the last A is the sum over all parts k of O_k g_(k+1) ... g_n, their contributions.
docs/compare.md shows how well that agrees with rounding each part alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]
"""Head and lines."""

NAMED_PARTS = 3
"""Parts in a summary, at most."""

WORST_TENSORS = 5

ERROR_KINDS = {
    "output": "squared error of the products on the calibration text, relative",
    "weight": "squared error of the weights, relative",
}
"""ggml_ext.error.kind of docs/gguf.md."""


def shares(row: Row) -> dict[str, float]:
    """Part ("embedding", "block 0", ...) -> share of the error behind the last block; 0 without one."""
    names = ["embedding", *(_part(layer) for layer in row["layers"])]
    own = [row["embedding_error"], *(layer["own"] for layer in row["layers"])]
    accumulated = [row["embedding_error"], *(layer["accumulated"] for layer in row["layers"])]
    contributions, passed_on = [0.0] * len(own), 1.0
    for k in reversed(range(len(own))):
        contributions[k] = own[k] * passed_on
        if k > 0 and accumulated[k - 1] > 0:
            passed_on *= max(accumulated[k] - own[k], 0.0) / accumulated[k - 1]
    total = sum(contributions) or 1.0
    return {name: contribution / total for name, contribution in zip(names, contributions, strict=True)}


def _part(layer: Row) -> str:
    return f"block {layer['block']}"


def summary(row: Row, name: str) -> str | None:
    """One line on the parts that lose most; None where nothing was measured."""
    if row["layers"] is None:
        return None
    largest = sorted(shares(row).items(), key=lambda item: -item[1])[:NAMED_PARTS]
    named = ", ".join(f"{part} {100 * share:.0f} %" for part, share in largest if share > 0)
    named = named or "none, every block gives the values of the base"
    return f"{name}: largest shares of the error behind the last block: {named}"


def block_table(rows: Sequence[Row], names: Sequence[str]) -> Table | None:
    """Own error with share, and accumulated error, of every part of every model where they were measured."""
    measured = [(name, row) for name, row in zip(names, rows, strict=True) if row["layers"] is not None]
    if not measured:
        return None
    head = ["", *(f"{name} {kind}" for name, _ in measured for kind in ("own", "accumulated"))]
    body: dict[str, list[str]] = {}  # by part; a model of another shape than the base has no figures
    for _, row in measured:
        share = shares(row)
        for part, own, accumulated in (
            ("embedding", row["embedding_error"], row["embedding_error"]),
            *((_part(layer), layer["own"], layer["accumulated"]) for layer in row["layers"]),
        ):
            line = body.setdefault(part, [part])
            line += [f"{own:.3g} ({100 * share[part]:.0f} %)", f"{accumulated:.3g}"]
    return head, list(body.values())


def tensor_table(rows: Sequence[Row], names: Sequence[str]) -> Table | None:
    """The tensors with the largest errors of every file that carries them."""
    body = []
    for name, row in zip(names, rows, strict=True):
        errors = row["tensor_errors"]
        if errors is not None:
            worst = sorted(errors["values"].items(), key=lambda item: -item[1])[:WORST_TENSORS]
            kind = ERROR_KINDS.get(errors["kind"], errors["kind"])
            body += [[name, f"`{tensor}`", f"{error:.3g}", kind] for tensor, error in worst]
    return (["model", "tensor", "error", "kind"], body) if body else None
