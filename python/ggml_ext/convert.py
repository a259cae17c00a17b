"""ggml-ext convert: a model in f16, bf16 or f32 -> a GGUF file of the wanted types.

A conversion is transform x rounding x type. The transform changes the matrices before they are rounded,
the rounding chooses each weight's code, the type says what codes there are. Today the only transform is
none; the rounding is rtn, or imatrix where importances are given.

An interrupted conversion leaves nothing behind and starts again; the one step that can take hours, the
importance matrix, is kept in a cache once it is complete (importance.py).
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ggml_ext import encode, hf, native, rules, stock
from ggml_ext import importance
from ggml_ext.errors import GgmlExtError
from ggml_ext.imatrix import Imatrix, load
from ggml_ext.outputs import check_outputs
from ggml_ext.source import Source, open_gguf


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion made.

    ``weights``: number of weights by type, most common first. ``fallbacks``: tensor -> (wanted type, used
    type) where the row length did not allow the wanted one. ``without_importance``: quantised tensors for
    which the importance matrix has no entry. ``without_effect``: tensors that --type-for names in vain.
    """

    path: Path
    n_bytes: int
    n_tensors: int
    weights: dict[str, int]
    bits_per_weight: float
    seconds: float
    fallbacks: dict[str, tuple[str, str]]
    without_importance: list[str]
    without_effect: list[str]

    def summary(self) -> str:
        """One line for the end of the command."""
        total = sum(self.weights.values())
        shares = ", ".join(f"{name} {100 * count / total:.1f} %" for name, count in self.weights.items())
        return (
            f"{self.path}: {self.n_bytes / 1e6:.1f} MB, {self.bits_per_weight:.3f} bits per weight "
            f"({self.n_tensors} tensors; weights: {shares}), {self.seconds:.1f} s"
        )

    def remarks(self) -> list[str]:
        """One line for each thing that did not go as asked."""
        lines = []
        for wanted, used in sorted(set(self.fallbacks.values())):
            names = [name for name, pair in self.fallbacks.items() if pair == (wanted, used)]
            lines.append(f"rows do not fit the blocks of {wanted}, used {used} for {_listed(names)}")
        uncollected = [name for name in self.without_importance if name in _UNCOLLECTED]
        missing = [name for name in self.without_importance if name not in _UNCOLLECTED]
        if missing:
            lines.append(f"warning: no importances for {_listed(missing)}; rounded without")
        if uncollected:
            lines.append(f"llama-imatrix collects no importances for {_listed(uncollected)}; rounded without")
        if self.without_effect:
            lines.append(
                f"warning: --type-for does nothing for {_listed(self.without_effect)}; never quantised"
            )
        return lines


# Looked up row by row, or left out by llama-imatrix unless asked for.
_UNCOLLECTED = rules.EMBEDDINGS | {rules.HEAD}


def _listed(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} tensor{'s' * (len(names) != 1)}: {', '.join(names[:most])}{more}"


def _warn(line: str) -> None:
    print(f"ggml-ext: {line}", file=sys.stderr, flush=True)


def convert(
    source: Path,
    out: Path,
    *,
    type_name: str = "fq4",
    imatrix: Path | None = None,
    calibration: Path | None = None,
    type_for: Sequence[tuple[str, str]] = (),
    keep: Sequence[str] = (),
    threads: int = 0,
    ctx: int = 512,
    warn: Callable[[str], None] = _warn,
) -> ConvertResult:
    """Converts a Hugging Face model directory or an f16/bf16/f32 GGUF file to the GGUF file ``out``.

    type_name: a ggml type (fq4, q4_k, f16, ...) or one of llama-quantize's mixes (q4_k_m, iq4_xs, q4_0, ...),
    which llama-quantize then makes itself.
    imatrix: importance matrix of llama-imatrix. calibration: text to compute one from.
    type_for: (pattern, type) pairs; keep: patterns of tensors that stay as they are (re.search, names).
    threads: 0 means all. ctx: tokens per context of the calibration text. warn: gets one line at a time.
    Raises GgmlExtError; ``out`` then stays as it was.
    """
    started = time.monotonic()
    request = rules.compile_rules(type_name, type_for, keep)
    _check_request(request, imatrix, calibration)
    _check_paths(source, out)
    with _work_folder(out) as work, _as_gguf(source, work) as model:
        opened = open_gguf(model)
        shapes = [tensor.shape for tensor in opened.tensors]
        matrix, calibrated = _importance(source, opened, imatrix, calibration, work, ctx=ctx, threads=threads)
        if request.base in rules.STOCK_MIXES:
            fallbacks = stock.quantize(opened, out, request, matrix, work=work, threads=threads)
        else:
            choices = rules.choose(shapes, opened.arch, request, native.block_size)
            fallbacks = {c.name: (c.fallback_from, c.target) for c in choices if c.fallback_from}
            encode.write(opened, out, choices, matrix, calibrated, threads=threads)
    result = _result(out, shapes, opened.arch, request, fallbacks, matrix, time.monotonic() - started)
    for line in result.remarks():
        warn(line)
    return result


def _check_request(request: rules.Rules, imatrix: Path | None, calibration: Path | None) -> None:
    """What can be wrong with the options alone is found before any work is done."""
    if imatrix is not None and calibration is not None:
        raise GgmlExtError("--imatrix and --calibration: give one of the two")
    names = {name for _, name in request.type_for}
    if request.base not in rules.STOCK_MIXES:
        names.add(request.base)
    for name in sorted(names):
        try:
            native.needs_imatrix(name)
        except GgmlExtError as exc:
            mixes = ", ".join(sorted(rules.STOCK_MIXES))
            raise GgmlExtError(
                f"unknown type {name}; use fq4, f16, bf16, f32, another ggml type or, for the whole file, "
                f"one of llama-quantize's: {mixes}"
            ) from exc


def _check_paths(source: Path, out: Path) -> None:
    if not source.exists():
        raise GgmlExtError(f"{source}: no such file or directory; check the path of the model")
    if out.exists() and out.samefile(source):
        raise GgmlExtError(f"{out}: source and output are the same file; write to another one")
    check_outputs(out)


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A folder beside the output, on the same file system, gone at the end whatever happens."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)
    except OSError as exc:
        raise GgmlExtError(f"{out.parent}: {exc.strerror}; choose another folder for the output") from exc
    with folder as name:
        yield Path(name)


@contextmanager
def _as_gguf(source: Path, work: Path) -> Iterator[Path]:
    """The source as a GGUF file. Errors about a temporary one name the directory that it was made from."""
    if not source.is_dir():
        yield source
        return
    model = work / "source.gguf"
    try:
        hf.to_gguf(source, model)
        yield model
    except GgmlExtError as exc:
        raise GgmlExtError(str(exc).replace(str(model), str(source))) from exc


def _importance(
    source: Path,
    opened: Source,
    imatrix: Path | None,
    calibration: Path | None,
    work: Path,
    *,
    ctx: int,
    threads: int,
) -> tuple[Imatrix | None, Calibration | None]:
    if imatrix is not None:
        return load(imatrix), None
    if calibration is None:
        return None, None
    files = sorted(source.iterdir()) if source.is_dir() else sorted({t.path for t in opened.tensors})
    return importance.collect(opened.path, files, calibration, work, ctx=ctx, threads=threads)


def _result(
    out: Path,
    shapes: Sequence[rules.Shape],
    arch: str,
    request: rules.Rules,
    fallbacks: dict[str, tuple[str, str]],
    matrix: Imatrix | None,
    seconds: float,
) -> ConvertResult:
    """Looks at the finished file, whoever wrote it."""
    tensors = open_gguf(out).tensors
    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[tensor.type_name] += tensor.n_weights
    source_types = {shape.name: shape.type_name for shape in shapes}
    without_importance = [
        tensor.name
        for tensor in tensors
        if matrix is not None
        and tensor.type_name not in (*rules.FLOAT_TYPES, source_types[tensor.name])
        and tensor.name not in matrix.entries
    ]
    return ConvertResult(
        path=out,
        n_bytes=out.stat().st_size,
        n_tensors=len(tensors),
        weights=dict(weights.most_common()),
        bits_per_weight=8 * sum(tensor.n_bytes for tensor in tensors) / weights.total(),
        seconds=seconds,
        fallbacks=fallbacks,
        without_importance=without_importance,
        without_effect=rules.without_effect(shapes, arch, request),
    )
