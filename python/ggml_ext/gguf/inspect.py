"""What a GGUF file consists of: types, sizes, and how it was made. Reads headers only."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.ext import PREFIX, ExtMetadata, TensorErrors, read_ext
from ggml_ext.gguf.header import Described, Header, value
from ggml_ext.gguf.shards import Part, named_errors, read_parts
from ggml_ext.runtime import native

_FACTOR = re.compile(r"^blk\.\d+\.(?P<site>.*)\.(?P<kind>fq_[lrh])$")
_PROBE = re.compile(r"^blk\.\d+\.attn_k\.kv_probe$")
_CODEBOOK = re.compile(r"^blk\.(?P<layer>\d+)\.attn_[kv]\.kv_cq(?P<bits>[12])$")
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorInfo:
    """``dims``: GGUF order, dims[0] is the row length in weights. ``type``: in upper case, "Q4_K".
    ``error``: of its rounding, None where the file does not say; see ExtMetadata.errors for its kind."""

    name: str
    type: str
    dims: tuple[int, ...]
    weights: int
    bytes: int
    error: float | None = None


@dataclass(frozen=True)
class TypeSummary:
    """All tensors of one type."""

    type: str
    tensors: int
    weights: int
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Factor:
    """A stored factor of a transform, named blk.N.``site``.``kind``: the matrix that reads it and fq_l, fq_r
    or fq_h; ``order`` rows and columns of ``type``, in ``blocks`` blocks."""

    site: str
    kind: str
    order: int
    type: str
    blocks: int


@dataclass(frozen=True)
class InspectResult:
    """``files``: names of the model's files, one but for a split model, whose first is ``path``. ``bytes``:
    of all of them. ``bits_per_weight``: tensor data only, over all tensors but ``factors``' and codebooks.
    ``quantized_bits_per_weight``: of the quantised tensors, with the factors' bytes. ``types``: the one with
    most bytes first. ``ext``: None for a file without keys under ggml_ext."""

    path: Path
    files: tuple[str, ...]
    architecture: str
    name: str | None
    bytes: int
    parameters: int
    bits_per_weight: float
    quantized_bits_per_weight: float | None
    types: tuple[TypeSummary, ...]
    factors: tuple[Factor, ...]
    tensors: tuple[TensorInfo, ...]
    ext: ExtMetadata | None

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``--json``; ``path`` as text."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def inspect(path: Path) -> InspectResult:
    """Describes a model, extended or stock: a GGUF file, or all parts of a split one whose first is ``path``.

    Raises GgmlExtError for a file that is missing, unreadable, truncated, no GGUF, or refused by the rules of
    docs/gguf.md, and for parts that do not make a model (shards.py).
    """
    parts = read_parts(path)
    header = parts[0].header
    with named_errors(path):
        ext = _ext(path, header)
        architecture, name = (_text(header, f"general.{key}") for key in ("architecture", "name"))
    errors = {} if ext is None or ext.errors is None else dict(_errors(ext.errors))
    tensors = tuple(_tensor(part, described, errors) for part in parts for described in part.header.tensors)
    own = tuple(tensor for tensor in tensors if not _beside(tensor.name))
    parameters = sum(tensor.weights for tensor in own)
    return InspectResult(
        path=path,
        files=tuple(part.path.name for part in parts),
        architecture=architecture or "unknown",
        name=name,
        bytes=sum(part.size for part in parts),
        parameters=parameters,
        bits_per_weight=_bits(sum(tensor.bytes for tensor in tensors), parameters),
        quantized_bits_per_weight=_quantized_bits(tensors),
        types=_summaries(own),
        factors=_factors(tensors),
        tensors=tensors,
        ext=ext,
    )


def _ext(path: Path, header: Header) -> ExtMetadata | None:
    try:
        return read_ext(header)
    except GgmlExtError as exc:
        raise GgmlExtError(f"{path}: {exc}") from exc


def _errors(errors: TensorErrors) -> Iterator[tuple[str, float]]:
    return zip(errors.tensors, errors.values, strict=True)


def _text(header: Header, key: str) -> str | None:
    return str(value(header.keys[key])) if key in header.keys else None


def _bits(n_bytes: int, weights: int) -> float:
    return 8 * n_bytes / weights if weights else 0.0


def _beside(name: str) -> bool:
    """Whether a tensor holds no weights of the model."""
    return any(pattern.match(name) for pattern in (_FACTOR, _CODEBOOK))


def _quantized_bits(tensors: Sequence[TensorInfo]) -> float | None:
    factors = sum(tensor.bytes for tensor in tensors if _FACTOR.match(tensor.name))
    quantized = [tensor for tensor in tensors if tensor.type not in _FLOATS]
    if not quantized:
        return None
    return _bits(sum(t.bytes for t in quantized) + factors, sum(t.weights for t in quantized))


def _factors(tensors: Sequence[TensorInfo]) -> tuple[Factor, ...]:
    """One for each site, kind, order and type, in the order of the first block that has it."""
    found: Counter[tuple[str, str, int, str]] = Counter()
    for tensor in tensors:
        match = _FACTOR.match(tensor.name)
        if match is not None:
            found[match["site"], match["kind"], tensor.dims[0], tensor.type] += 1
    return tuple(Factor(*which, blocks) for which, blocks in found.items())


def _tensor(part: Part, described: Described, errors: Mapping[str, float]) -> TensorInfo:
    where = f"{part.path}: tensor {described.name}"
    try:
        type_ = native.type_name(described.type_id)
    except GgmlExtError as exc:
        raise GgmlExtError(
            f"{where} has unknown type {described.type_id}; a newer ggml-ext may read it"
        ) from exc
    block = native.block_size(type_)
    if described.dims[0] % block:
        raise GgmlExtError(
            f"{where} has rows of {described.dims[0]} weights, {type_.upper()} wants multiples of {block}; "
            "convert the model again"
        )
    weights = math.prod(described.dims)
    n_bytes = native.row_size(type_, described.dims[0]) * math.prod(described.dims[1:])
    if part.header.data + described.offset + n_bytes > part.size:
        raise GgmlExtError(f"{where} ends beyond the file, which is truncated; download it again")
    error = errors.get(described.name)
    return TensorInfo(described.name, type_.upper(), described.dims, weights, n_bytes, error)


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
    n_files = len(result.files)
    facts = {
        "file": str(result.path),
        "name": result.name or "-",
        "architecture": result.architecture,
        "parameters": f"{result.parameters:,}",
        "file size": f"{result.bytes:,} bytes" + (f" in {n_files} files" if n_files > 1 else ""),
        "bits per weight": f"{result.bits_per_weight:.4f}",
    }
    if result.quantized_bits_per_weight is not None:
        facts["of quantised"] = f"{result.quantized_bits_per_weight:.4f}, with transforms"
    facts |= _kv_facts(result.tensors)
    if result.ext is None:
        return {**facts, f"{PREFIX}*": "none"}
    facts["format version"] = str(result.ext.version)
    facts["rounding"] = result.ext.rounding or "-"
    facts["transform"] = result.ext.transform or "-"
    facts |= _transform_facts(result, result.ext)
    if result.ext.calibration is not None:
        parts = dataclasses.asdict(result.ext.calibration)
        facts["calibration"] = ", ".join(f"{name} {part}" for name, part in parts.items() if part is not None)
    return facts


def bits_text(bits: Sequence[int]) -> str:
    """Of codebooks: "2 and 1 bits"."""
    return " and ".join(map(str, bits)) + (" bit" if list(bits) == [1] else " bits")


def _kv_facts(tensors: Sequence[TensorInfo]) -> dict[str, str]:
    """What the file has for a paged KV cache."""
    facts = {}
    probes = [math.prod(tensor.dims[1:]) for tensor in tensors if _PROBE.match(tensor.name)]
    if probes:
        facts["KV probes"] = f"{sum(probes)} heads in {len(probes)} layers"
    heads: dict[str, int] = {}
    bits = set()
    for tensor in tensors:
        match = _CODEBOOK.match(tensor.name)
        if match is not None:
            heads[match["layer"]] = math.prod(tensor.dims[3:])
            bits.add(int(match["bits"]))
    if bits:
        of_all = f"{sum(heads.values())} heads in {len(heads)} layers"
        facts["KV codebooks"] = f"{of_all}, {bits_text(sorted(bits, reverse=True))}"
    return facts


def _transform_facts(result: InspectResult, ext: ExtMetadata) -> dict[str, str]:
    facts = {}
    if result.factors:
        facts["factors"] = ", ".join(
            f"{f.site}.{f.kind} {f.order} x {f.order} {f.type} in {f.blocks}" for f in result.factors
        )
    orders = Counter(order for order in ext.hadamard if order > 1)
    if orders:
        facts["Hadamard"] = ", ".join(f"order {order} at {sites} sites" for order, sites in orders.items())
    if ext.fold_sizes is not None:
        diagonals, heads = (sum(n > 0 for n in sizes) for sizes in (ext.fold_sizes, ext.fold_orders))
        facts["folded"] = f"diagonals at {diagonals} sites, heads of v at {heads}"
    elif ext.transform not in (None, "none"):
        facts["folded"] = "not recorded; LoRA adapters are refused"
    clips = [clip for clip in ext.clip if clip < 1]
    if clips:
        facts["clip"] = f"{min(clips):.3f} to {max(clips):.3f} at {len(clips)} sites"
    if ext.activation_bits is not None:
        group = f"one scale per {ext.activation_group}" if ext.activation_group else "one scale per token"
        facts["activations"] = f"{ext.activation_bits} bits, {group}"
    if ext.errors is not None and ext.errors.values:
        values = ext.errors.values
        worst = ext.errors.tensors[values.index(max(values))]
        facts[f"{ext.errors.kind} error"] = (
            f"mean {sum(values) / len(values):.3g}, largest {max(values):.3g} ({worst})"
        )
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
    for column in ("bytes", "error"):
        table.add_column(column, justify="right")
    for tensor in result.tensors:
        dims = " x ".join(map(str, tensor.dims))
        error = "" if tensor.error is None else f"{tensor.error:.3g}"
        table.add_row(Text(tensor.name), tensor.type, dims, f"{tensor.bytes:,}", error)
    return table
