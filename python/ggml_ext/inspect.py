"""What a GGUF file consists of: types, sizes, and how it was made. Reads the header only."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ggml_ext.errors import GgmlExtError
from ggml_ext.gguf_ext import PREFIX, ExtMetadata, read_ext
from ggml_ext.header import Described, Header, read_header, value


@dataclass(frozen=True)
class TensorInfo:
    """``dims``: GGUF order, dims[0] is the row length in weights. ``type``: as gguf names it, "Q4_K"."""

    name: str
    type: str
    dims: tuple[int, ...]
    weights: int
    bytes: int


@dataclass(frozen=True)
class TypeSummary:
    """All tensors of one type."""

    type: str
    tensors: int
    weights: int
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class InspectResult:
    """``bytes``: of the file. ``bits_per_weight``: tensor data only, over all tensors. ``types``: the one
    with most bytes first. ``ext``: None for a file without keys under ggml_ext."""

    path: Path
    architecture: str
    name: str | None
    bytes: int
    parameters: int
    bits_per_weight: float
    types: tuple[TypeSummary, ...]
    tensors: tuple[TensorInfo, ...]
    ext: ExtMetadata | None

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``--json``; ``path`` as text."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def inspect(path: Path) -> InspectResult:
    """Describes a GGUF file, extended or stock.

    Raises GgmlExtError for a file that is missing, unreadable, truncated, no GGUF, or refused by the rules of
    docs/gguf.md.
    """
    try:
        return _inspect(path)
    except OSError as exc:
        raise GgmlExtError(f"{path}: {exc.strerror}; check the path and its permissions") from exc
    except GgmlExtError as exc:
        raise GgmlExtError(f"{path}: {exc}") from exc
    except (ValueError, OverflowError) as exc:
        raise GgmlExtError(f"{path}: damaged GGUF file, {exc}; download or convert it again") from exc


def _inspect(path: Path) -> InspectResult:
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise GgmlExtError("not a GGUF file; give one")
    header = read_header(path)
    tensors = tuple(_tensor(described) for described in header.tensors)
    for described, tensor in zip(header.tensors, tensors, strict=True):
        if header.data + described.offset + tensor.bytes > size:
            raise GgmlExtError(f"truncated, tensor {tensor.name} ends beyond the file; download it again")
    parameters = sum(tensor.weights for tensor in tensors)
    return InspectResult(
        path=path,
        architecture=_text(header, "general.architecture") or "unknown",
        name=_text(header, "general.name"),
        bytes=size,
        parameters=parameters,
        bits_per_weight=_bits(sum(tensor.bytes for tensor in tensors), parameters),
        types=_summaries(tensors),
        tensors=tensors,
        ext=read_ext(header),
    )


def _text(header: Header, key: str) -> str | None:
    return str(value(header.keys[key])) if key in header.keys else None


def _bits(n_bytes: int, weights: int) -> float:
    return 8 * n_bytes / weights if weights else 0.0


def _tensor(described: Described) -> TensorInfo:
    try:
        type_ = gguf.GGMLQuantizationType(described.type_id)
    except ValueError as exc:
        raise GgmlExtError(
            f"tensor {described.name} has unknown type {described.type_id}; a newer ggml-ext may read it"
        ) from exc
    block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    if described.dims[0] % block:
        raise GgmlExtError(
            f"tensor {described.name} has rows of {described.dims[0]} weights, "
            f"{type_.name} wants multiples of {block}; convert the model again"
        )
    weights = math.prod(described.dims)
    return TensorInfo(described.name, type_.name, described.dims, weights, weights // block * block_bytes)


def _summaries(tensors: tuple[TensorInfo, ...]) -> tuple[TypeSummary, ...]:
    summaries = []
    for type_ in {tensor.type for tensor in tensors}:
        members = [tensor for tensor in tensors if tensor.type == type_]
        weights = sum(tensor.weights for tensor in members)
        n_bytes = sum(tensor.bytes for tensor in members)
        summaries.append(TypeSummary(type_, len(members), weights, n_bytes, _bits(n_bytes, weights)))
    return tuple(sorted(summaries, key=lambda summary: (-summary.bytes, summary.type)))


def print_result(result: InspectResult, *, tensors: bool = False, console: Console | None = None) -> None:
    """Prints the result to standard output, with every tensor if asked for."""
    console = console or Console(highlight=False)
    for label, text in _facts(result).items():
        console.print(f"{label:<18}{text}", markup=False, soft_wrap=True)
    console.print(_type_table(result))
    if tensors:
        console.print(_tensor_table(result))


def _facts(result: InspectResult) -> dict[str, str]:
    facts = {
        "file": str(result.path),
        "name": result.name or "-",
        "architecture": result.architecture,
        "parameters": f"{result.parameters:,}",
        "file size": f"{result.bytes:,} bytes",
        "bits per weight": f"{result.bits_per_weight:.4f}",
    }
    if result.ext is None:
        return {**facts, f"{PREFIX}*": "none"}
    facts["format version"] = str(result.ext.version)
    facts["rounding"] = result.ext.rounding or "-"
    facts["transform"] = result.ext.transform or "-"
    if result.ext.calibration is not None:
        parts = dataclasses.asdict(result.ext.calibration)
        facts["calibration"] = ", ".join(f"{name} {part}" for name, part in parts.items() if part is not None)
    return facts


def _type_table(result: InspectResult) -> Table:
    table = Table("type", box=None, pad_edge=False)
    for column in ("tensors", "weights", "bytes", "bits/weight", "share"):
        table.add_column(column, justify="right")
    total = sum(summary.bytes for summary in result.types)
    for summary in result.types:
        table.add_row(
            summary.type,
            str(summary.tensors),
            f"{summary.weights:,}",
            f"{summary.bytes:,}",
            f"{summary.bits_per_weight:.4f}",
            f"{100 * summary.bytes / total:.1f} %" if total else "-",
        )
    return table


def _tensor_table(result: InspectResult) -> Table:
    table = Table("tensor", "type", box=None, pad_edge=False)
    table.add_column("dims", justify="right")
    table.add_column("bytes", justify="right")
    for tensor in result.tensors:
        dims = " x ".join(map(str, tensor.dims))
        table.add_row(Text(tensor.name), tensor.type, dims, f"{tensor.bytes:,}")
    return table
