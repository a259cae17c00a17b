"""Writes the converted model: every tensor in its chosen type, a slab of rows at a time.

Memory is bounded by the slab (_SLAB_WEIGHTS), whatever the size of the model or of its largest tensor. What
a calibration has prepared is copied from its block files, a tensor at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.atomic import atomic_path
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.progress import Advance, track
from ggml_ext.core.registry import FLOAT_TYPES
from ggml_ext.gguf.imatrix import Imatrix
from ggml_ext.gguf.source import Source, Tensor, read_bytes, read_floats, reading
from ggml_ext.gguf.transformed import carried
from ggml_ext.gguf.writer import (
    OutTensor,
    float32_array_key,
    padding,
    string_array_key,
    string_key,
    uint32_array_key,
    uint32_key,
    write_header,
)
from ggml_ext.observe.importance import Calibration
from ggml_ext.runtime import native
from ggml_ext.types.rules import Choice

if TYPE_CHECKING:
    from ggml_ext.methods.calibrate.block_file import FileSite, Stored

_SLAB_WEIGHTS = 4 * 1024 * 1024
_FIRST_EXTENDED_ID = 200  # ggml's own ids lie below
# The patched llama.cpp's names for files that are mostly of one.
_FILE_TYPES = {"fq4": 200, "fq4_64": 201, "fq3": 202, "fq3_64": 203}

Importances = NDArray[np.float32]


@dataclass(frozen=True)
class Prepared:
    """What a calibration has made of the model. ``tensors``: those that it rounded, changed or added.
    ``mix``: the name of llama-quantize's mix whose types the file has, or "". ``sites``: those with a
    transform or a clip. ``activation``: bits and group, None for llama.cpp's own. ``errors``: relative
    squared error of each rounded matrix's output. ``losses``: tensor -> type -> what it costs, of the tensors
    whose types were chosen by that. docs/gguf.md has their meaning."""

    tensors: Mapping[str, Stored]
    mix: str
    transform: str
    rounding: str
    sites: Sequence[FileSite]
    activation: Sequence[int] | None
    errors: Mapping[str, float]
    losses: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class _Job:
    """One tensor's work: a tensor of the source to convert. ``importance``: float32 [experts, row length]."""

    tensor: Tensor
    target: str
    out: OutTensor
    importance: Importances | None


@dataclass(frozen=True)
class _Copy:
    """One tensor's work: a prepared tensor to copy."""

    stored: Stored
    out: OutTensor

    @property
    def target(self) -> str:
        return self.stored.type_name


def write(
    source: Source,
    out: Path,
    choices: Sequence[Choice],
    matrix: Imatrix | None,
    calibration: Calibration | None,
    *,
    prepared: Prepared | None = None,
    threads: int = 0,
) -> None:
    """Writes ``out`` with the types of ``choices`` (one per tensor of the source, in order).

    prepared: tensors that take the place of the source's, or come in addition. Raises GgmlExtError for NaN or
    Inf among the weights or in what a type can hold, a missing importance matrix for a type that cannot do
    without, a source that ends early, prepared tensors of another model, and a full or read-only disk.
    """
    ready = dict(prepared.tensors) if prepared is not None else {}
    jobs: list[_Job | _Copy] = []
    for tensor, choice in zip(source.tensors, choices, strict=True):
        stored = ready.pop(tensor.name, None)
        jobs.append(_job(tensor, choice, matrix) if stored is None else _copy(stored, tensor.dims))
    jobs += [_copy(stored, stored.dims) for stored in ready.values()]
    keys = _keys(source, jobs, matrix, calibration, prepared)
    total = sum(math.prod(job.out.dims) for job in jobs)
    progress = track(total, out.name, "weights")
    with atomic_path(out) as temporary, temporary.open("wb") as file, progress as advance:
        write_header(file, keys, [job.out for job in jobs], source.alignment)
        for job in jobs:
            for data in _encoded(job, threads, advance):
                file.write(data.data)
            file.write(padding(job.out.n_bytes, source.alignment))


def _copy(stored: Stored, dims: tuple[int, ...]) -> _Copy:
    if stored.dims != dims:
        raise GgmlExtError(
            f"{stored.path}: {stored.name} has dimensions {list(stored.dims)}, the model's {list(dims)}; "
            "calibrate this model anew"
        )
    n_bytes = math.prod(dims[1:]) * native.row_size(stored.type_name, dims[0])
    return _Copy(stored, OutTensor(stored.name, dims, native.type_id(stored.type_name), n_bytes))


def _job(tensor: Tensor, choice: Choice, matrix: Imatrix | None) -> _Job:
    importance = None
    if matrix is not None and choice.target not in FLOAT_TYPES and choice.target != tensor.type_name:
        importance = matrix.rows(tensor)
    if importance is None and choice.target != tensor.type_name and native.needs_imatrix(choice.target):
        raise GgmlExtError(
            f"{tensor.name}: type {choice.target} needs an importance matrix; "
            "add --rounding imatrix, --calibration TEXT or --imatrix FILE that covers this tensor"
        )
    n_bytes = tensor.n_bytes
    if choice.target != tensor.type_name:
        n_bytes = tensor.n_rows * native.row_size(choice.target, tensor.row_length)
    out = OutTensor(tensor.name, tensor.dims, native.type_id(choice.target), n_bytes)
    return _Job(tensor, choice.target, out, importance)


def _encoded(job: _Job | _Copy, threads: int, advance: Advance) -> Iterator[NDArray[np.uint8]]:
    """The tensor's bytes in its new type, slab by slab."""
    if isinstance(job, _Copy):
        data = job.stored.read()
        if data.nbytes != job.out.n_bytes:
            raise GgmlExtError(
                f"{job.stored.path}: {job.stored.name} is incomplete; delete the file and calibrate again"
            )
        yield data
        advance(math.prod(job.out.dims))
        return
    with reading(job.tensor) as file:
        for first, count in _slabs(job.tensor):
            if job.target == job.tensor.type_name:
                yield _copied(file, job.tensor, first, count)
                advance(count * job.tensor.row_length)
            else:
                yield _quantized(job, file, first, count, threads, advance)


def _slabs(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """(first row, number of rows); no slab crosses from one expert to the next, whose importances differ."""
    per_expert = tensor.dims[1] if len(tensor.dims) > 1 else 1
    step = max(1, _SLAB_WEIGHTS // max(tensor.row_length, 1))
    for expert in range(0, tensor.n_rows, max(per_expert, 1)):
        for first in range(expert, expert + per_expert, step):
            yield first, min(step, expert + per_expert - first)


def _copied(file: BufferedReader, tensor: Tensor, first: int, count: int) -> NDArray[np.uint8]:
    if tensor.type_name in FLOAT_TYPES:
        read_floats(file, tensor, first, count)  # NaN and Inf are refused in copies too
    return read_bytes(file, tensor, first, count)


def _quantized(
    job: _Job, file: BufferedReader, first: int, count: int, threads: int, advance: Advance
) -> NDArray[np.uint8]:
    tensor = job.tensor
    rows = read_floats(file, tensor, first, count)
    importance = None if job.importance is None else job.importance[first // tensor.dims[1]]
    try:
        return native.quantize(
            job.target, rows, importance, threads=threads, progress=lambda n: advance(n * tensor.row_length)
        )
    except GgmlExtError as exc:
        raise GgmlExtError(
            f"{tensor.path}: tensor {tensor.name} does not fit type {job.target} ({exc}); "
            f"keep it as it is with --keep '^{tensor.name}$'"
        ) from exc


def _keys(
    source: Source,
    jobs: Sequence[_Job | _Copy],
    matrix: Imatrix | None,
    calibration: Calibration | None,
    prepared: Prepared | None,
) -> dict[str, bytes]:
    """The source's entries, less those of an earlier conversion, plus this one's."""
    dropped = ("split.", "quantize.imatrix.", "ggml_ext.")
    keys = {name: entry for name, entry in source.keys.items() if not name.startswith(dropped)}

    def put_uint32(name: str, value: int) -> None:
        keys[name] = uint32_key(name, value)

    def put_string(name: str, value: str) -> None:
        keys[name] = string_key(name, value)

    file_type = _file_type(jobs, prepared.mix if prepared is not None else "")
    keys.pop("general.file_type", None)
    if file_type is not None:
        put_uint32("general.file_type", file_type)
    put_uint32("general.quantization_version", gguf.GGML_QUANT_VERSION)
    used = matrix if any(isinstance(job, _Job) and job.importance is not None for job in jobs) else None
    if used is not None:
        put_string("quantize.imatrix.file", used.path.name)
        put_string("quantize.imatrix.dataset", used.dataset)
        put_uint32("quantize.imatrix.entries_count", len(used.entries))
        put_uint32("quantize.imatrix.chunks_count", used.chunks)
    kept = carried(source) if prepared is None else {}
    if prepared is None and not kept and all(job.out.type_id < _FIRST_EXTENDED_ID for job in jobs):
        return keys
    put_uint32("ggml_ext.version", 1)
    if prepared is None:
        put_string("ggml_ext.rounding", "rtn" if used is None else "imatrix")
        put_string("ggml_ext.transform.name", "none")
        keys.update(kept)
    else:
        keys.update(_prepared_keys(prepared))
    if calibration is not None and (used is not None or prepared is not None):
        put_string("ggml_ext.calibration.hash", calibration.sha256)
        put_uint32("ggml_ext.calibration.samples", calibration.samples)
        put_uint32("ggml_ext.calibration.length", calibration.length)
        put_uint32("ggml_ext.calibration.seed", calibration.seed)
    return keys


def _prepared_keys(prepared: Prepared) -> dict[str, bytes]:
    """What a calibration adds; keys whose value is the default are left out."""
    keys = {
        "ggml_ext.rounding": string_key("ggml_ext.rounding", prepared.rounding),
        "ggml_ext.transform.name": string_key("ggml_ext.transform.name", prepared.transform),
    }

    def put(name: str, entry: bytes) -> None:
        keys[name] = entry

    if prepared.sites or prepared.transform != "none":
        keys |= _site_keys(prepared.sites)
    if prepared.activation is not None:
        for name, value in zip(("bits", "group"), prepared.activation, strict=True):
            name = f"ggml_ext.activation.{name}"
            put(name, uint32_key(name, value))
    if prepared.errors:
        put("ggml_ext.error.tensors", string_array_key("ggml_ext.error.tensors", list(prepared.errors)))
        values = list(prepared.errors.values())
        put("ggml_ext.error.values", float32_array_key("ggml_ext.error.values", values))
        put("ggml_ext.error.kind", string_key("ggml_ext.error.kind", "output"))
    if prepared.losses:
        keys |= loss_keys(prepared.losses)
    return keys


def loss_keys(losses: Mapping[str, Mapping[str, float]]) -> dict[str, bytes]:
    """The table of losses: tensor -> type -> KL divergence."""
    types = sorted({name for its in losses.values() for name in its})
    values = [its.get(name, -1.0) for its in losses.values() for name in types]
    prefix = "ggml_ext.loss"
    return {
        f"{prefix}.tensors": string_array_key(f"{prefix}.tensors", list(losses)),
        f"{prefix}.types": string_array_key(f"{prefix}.types", types),
        f"{prefix}.values": float32_array_key(f"{prefix}.values", values),
    }


def _site_keys(sites: Sequence[FileSite]) -> dict[str, bytes]:
    """The table of sites: version 2 of the format."""
    columns: dict[str, Sequence[int]] = {
        "site.online": [site.online for site in sites],
        "site.folded": [len(site.readers) - site.online for site in sites],
        "site.first": [site.first for site in sites],
        "site.rows": [site.rows for site in sites],
        "site.head": [site.head for site in sites],
    }
    if any(site.hadamard > 1 for site in sites):
        columns["transform.hadamard"] = [site.hadamard for site in sites]
    floats: dict[str, Sequence[float]] = {}
    if any(site.clip < 1 for site in sites):
        floats["transform.clip"] = [site.clip for site in sites]
    if any(site.diagonal for site in sites):
        columns["fold.sizes"] = [len(site.diagonal) for site in sites]
        floats["fold.diagonals"] = list(chain.from_iterable(site.diagonal for site in sites))
    if any(site.matrix for site in sites):
        columns["fold.orders"] = [math.isqrt(len(site.matrix)) for site in sites]
        floats["fold.heads"] = list(chain.from_iterable(site.matrix for site in sites))
    strings = {
        "site.readers": list(chain.from_iterable(site.readers for site in sites)),
        "site.makers": [site.maker for site in sites],
    }
    keys = {"ggml_ext.version": uint32_key("ggml_ext.version", native.format_version())}
    for name, texts in strings.items():
        keys[f"ggml_ext.{name}"] = string_array_key(f"ggml_ext.{name}", texts)
    for name, integers in columns.items():
        keys[f"ggml_ext.{name}"] = uint32_array_key(f"ggml_ext.{name}", integers)
    for name, values in floats.items():
        keys[f"ggml_ext.{name}"] = float32_array_key(f"ggml_ext.{name}", values)
    return keys


def _file_type(jobs: Sequence[_Job | _Copy], mix: str) -> int | None:
    """llama.cpp's number for the mix, or for the type that most weights have; None if it has none for it."""
    if f"MOSTLY_{mix.upper()}" in gguf.LlamaFileType.__members__:
        return int(gguf.LlamaFileType[f"MOSTLY_{mix.upper()}"])
    weights: Counter[str] = Counter()
    for job in jobs:
        weights[job.target] += math.prod(job.out.dims)
    target = weights.most_common(1)[0][0]
    if target in _FILE_TYPES:
        return _FILE_TYPES[target]
    for name in ("ALL_F32" if target == "f32" else f"MOSTLY_{target.upper()}", f"MOSTLY_{target.upper()}_S"):
        if name in gguf.LlamaFileType.__members__:
            return int(gguf.LlamaFileType[name])
    return None
