"""ggml-ext convert: a model in f16, bf16 or f32 -> a GGUF file of the wanted types.

A conversion is transform x rounding x type. The transform changes the matrices before they are rounded,
the rounding chooses each weight's code, the type says what codes there are. Without a transform, rounding to
nearest and by importance need the weights only, and are done here tensor by tensor; everything else goes
block by block (methods/calibrate/run.py) and is written from what that leaves.

An interrupted conversion leaves no output. What can take hours is kept: the importance matrix in a cache
(importance.py), the blocks in a folder beside the output, from which the same command goes on.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ggml_ext import recipes
from ggml_ext.core.atomic import target, work_folder
from ggml_ext.core.cpus import require_threads
from ggml_ext.core.errors import GgmlExtError, Warn, listed, warn
from ggml_ext.core.outputs import check_outputs
from ggml_ext.core.registry import ROUNDINGS
from ggml_ext.gguf.imatrix import Imatrix, load
from ggml_ext.gguf.source import Tensor, open_gguf
from ggml_ext.hf import folder as hf
from ggml_ext.hf import hub
from ggml_ext.hf.model_files import small_files
from ggml_ext.observe import importance
from ggml_ext.observe.prepare import table_of
from ggml_ext.observe.reuse import Asked, open_finished, settle
from ggml_ext.observe.samples import text_or_default
from ggml_ext.recipes import Options
from ggml_ext.runtime import native
from ggml_ext.types import encode, rules, stock


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion made.

    ``weights``: number of weights by type, most common first. ``bits_per_weight``: of all tensors.
    ``quantized_bits_per_weight``: of the quantised ones, with what online transforms take; None if nothing is
    quantised. ``fallbacks``: tensor -> (wanted type, used type) where the row length did not allow the wanted
    one. ``without_importance``: quantised tensors for which the importance matrix has no entry.
    ``without_effect``: tensors that --type-for names in vain. ``raised``: quantised tensors -> how many of
    their importances were too small to count (weighting.py).
    """

    path: Path
    n_bytes: int
    n_tensors: int
    weights: dict[str, int]
    bits_per_weight: float
    quantized_bits_per_weight: float | None
    seconds: float
    fallbacks: dict[str, tuple[str, str]]
    without_importance: list[str]
    without_effect: list[str]
    raised: dict[str, int]

    def summary(self) -> str:
        """One line for the end of the command."""
        total = max(sum(self.weights.values()), 1)
        shares = ", ".join(f"{name} {100 * count / total:.1f} %" for name, count in self.weights.items())
        quantized = self.quantized_bits_per_weight
        layers = "" if quantized is None else f", {quantized:.4f} in quantised tensors with transforms"
        return (
            f"{self.path}: {self.n_bytes / 1e6:.1f} MB, {self.bits_per_weight:.3f} bits per weight{layers} "
            f"({self.n_tensors} tensors; weights: {shares}), {self.seconds:.1f} s"
        )

    def remarks(self) -> list[str]:
        """One line for each thing that did not go as asked."""
        lines = []
        for wanted, used in sorted(set(self.fallbacks.values())):
            names = [name for name, pair in self.fallbacks.items() if pair == (wanted, used)]
            lines.append(f"rows do not fit the blocks of {wanted}, used {used} for {listed(names)}")
        uncollected = [name for name in self.without_importance if name in _UNCOLLECTED]
        missing = [name for name in self.without_importance if name not in _UNCOLLECTED]
        if missing:
            lines.append(f"warning: no importances for {listed(missing)}; rounded without")
        if uncollected:
            lines.append(f"importance matrices have nothing for {listed(uncollected)}; rounded without")
        if self.raised:
            lines.append(
                f"warning: {sum(self.raised.values())} importances are 0 or next to it and count as a "
                f"millionth of the largest beside them, in {listed(list(self.raised))}"
            )
        if self.without_effect:
            lines.append(
                f"warning: --type-for does nothing for {listed(self.without_effect)}; never quantised"
            )
        return lines


# Looked up row by row, or left out of importance matrices unless asked for.
_UNCOLLECTED = rules.EMBEDDINGS | {rules.HEAD}


def convert(
    source: Path,
    out: Path,
    *,
    recipe: str | None = None,
    options: Options | None = None,
    type_name: str | None = None,
    imatrix: Path | None = None,
    calibration: Path | None = None,
    calibrated: Path | None = None,
    observed: Path | None = None,
    type_for: Sequence[tuple[str, str]] = (),
    keep: Sequence[str] = (),
    threads: int = 0,
    ctx: int | None = None,
    seed: int | None = None,
    device: str = "cpu",
    matrices: Path | None = None,
    parse_special: bool = False,
    trust_remote_code: bool = False,
    dask: str | None = None,
    warn: Warn = warn,
) -> ConvertResult:
    """Converts a Hugging Face model directory, a model on the Hub (hub.parse) or an f16/bf16/f32 GGUF file to
    the GGUF file ``out``.

    recipe, options: how, see recipes/. type_name: short for options with only a type: a ggml type (fq4,
    q4_k, f16, ...), fq4_m, or one of llama-quantize's mixes (q4_k_m, iq4_xs, q4_0, ...), which
    llama-quantize makes itself unless a transform or gptq is asked for. imatrix: importance matrix of
    llama-imatrix. calibration: text to compute one from, or to calibrate on, by default the package's where
    one is needed. calibrated: folder of a finished calibration of this model, which then decides everything
    else. observed: folder of a finished observation of this model, used instead of observing it; what is said
    of the text beside it must be true of it. type_for: (pattern, type) pairs; keep: patterns of tensors that
    stay as they are (re.search, names). threads: 0 means all. ctx, seed: tokens per window of the calibration
    text and the seed of everything random, by default those of the observation, or 512 and 0. device,
    matrices, parse_special, dask: see calibrate.plan.Request. trust_remote_code: see hf.to_gguf. warn: gets
    one line at a time. Raises GgmlExtError; ``out`` then stays as it was.
    """
    started = time.monotonic()
    require_threads(threads)
    check_outputs(
        out,
        inputs=[source, imatrix, calibration, calibrated, observed, matrices],
        folders=[calibrated, observed],
    )
    source = hub.fetch(source)
    hf.require(source)
    if calibrated is not None:
        return _from_folder(source, calibrated, out, threads, started, warn)
    options = options or Options(type_name=type_name)
    method = recipes.resolve(recipe, options, importances=bool(imatrix or calibration or observed))
    method = recipes.with_matrices(method, options, matrices)
    request = rules.compile_rules(method.type_name, type_for, keep)
    recipes.check(method, request.type_for, text=bool(calibration or observed), imatrix=bool(imatrix))
    if imatrix is None and observed is None and (method.blockwise or ROUNDINGS[method.rounding].measures):
        calibration = text_or_default(calibration, warn)
    asked = Asked(calibration, options.samples, ctx, seed, parse_special)
    reading = settle(asked, observed)
    if method.blockwise:
        from ggml_ext.methods.calibrate.plan import Request
        from ggml_ext.methods.calibrate.run import calibrate, discard

        place = target(out)
        folder = place.with_name(f"{place.name}.calibration")
        wanted = Request(
            source,
            calibration,
            method,
            type_for,
            keep,
            reading.ctx,
            reading.seed,
            device,
            threads,
            matrices,
            reading.parse_special,
            trust_remote_code,
            observed,
            dask,
        )
        calibrate(wanted, folder, temporary=True, warn=warn)
        result = _from_folder(source, folder, out, threads, started, warn)
        discard(folder)
        return result
    seen = None if observed is None else open_finished(observed, source, asked, warn)
    for line in hf.remarks(source) if source.is_dir() else []:
        warn(line)
    with (
        work_folder(out) as work,
        _as_gguf(source, work, trust_remote_code=trust_remote_code) as model,
    ):
        opened = open_gguf(model)
        shapes = [tensor.shape for tensor in opened.tensors]
        matrix: Imatrix | None
        about: importance.Calibration | None
        if seen is not None:
            request = replace(request, no_matrices=seen.table.no_matrices)
            matrix, about = importance.of_observation(seen, calibration, work)
        elif calibration is None or imatrix is not None:
            matrix, about = None if imatrix is None else load(imatrix), None
        else:
            table = table_of(opened.path, reading.ctx)
            request = replace(request, no_matrices=table.no_matrices)
            files = [*hf.check(source), *small_files(source)] if source.is_dir() else opened.files
            matrix, about = importance.collect(
                opened.path,
                files,
                calibration,
                work,
                ctx=reading.ctx,
                threads=threads,
                parse_special=parse_special,
                warn=warn,
            )
        if request.base in rules.STOCK_MIXES:
            fallbacks = stock.quantize(opened, out, request, matrix, work=work, threads=threads)
        else:
            choices = rules.choose(shapes, opened.arch, request, native.block_size)
            fallbacks = {c.name: (c.fallback_from, c.target) for c in choices if c.fallback_from}
            encode.write(opened, out, choices, matrix, about, threads=threads)
    without_effect = rules.without_effect(shapes, opened.arch, request)
    result = _result(out, shapes, fallbacks, without_effect, matrix, time.monotonic() - started)
    for line in result.remarks():
        warn(line)
    return result


def _from_folder(
    source: Path, folder: Path, out: Path, threads: int, started: float, warn: Warn
) -> ConvertResult:
    """Writes ``out`` from a finished calibration of the model ``source``."""
    from ggml_ext.methods.calibrate import result as calibrated

    finished = calibrated.open_folder(folder, source)
    choices = [
        rules.Choice(t.name, finished.plan.types[t.name], finished.plan.fallbacks.get(t.name, ""))
        for t in finished.source.tensors
    ]
    about = importance.Calibration(
        finished.plan.text, finished.windows, finished.plan.ctx, finished.plan.seed
    )
    encode.write(finished.source, out, choices, None, about, prepared=finished.prepared, threads=threads)
    fallbacks = {c.name: (c.fallback_from, c.target) for c in choices if c.fallback_from}
    shapes = [tensor.shape for tensor in finished.source.tensors]
    result = _result(out, shapes, fallbacks, finished.plan.without_effect, None, time.monotonic() - started)
    for line in result.remarks():
        warn(line)
    return result


@contextmanager
def _as_gguf(source: Path, work: Path, *, trust_remote_code: bool) -> Iterator[Path]:
    """The source as a GGUF file. Errors about a temporary one name the directory that it was made from."""
    if not source.is_dir():
        yield source
        return
    model = work / "source.gguf"
    try:
        hf.to_gguf(source, model, trust_remote_code=trust_remote_code)
        yield model
    except GgmlExtError as exc:
        raise GgmlExtError(str(exc).replace(str(model), str(source))) from exc


def _result(
    out: Path,
    shapes: Sequence[rules.Shape],
    fallbacks: dict[str, tuple[str, str]],
    without_effect: list[str],
    matrix: Imatrix | None,
    seconds: float,
) -> ConvertResult:
    """Looks at the finished file, whoever wrote it. ``shapes``: the source's tensors."""
    tensors = open_gguf(out).tensors
    source_types = {shape.name: shape.type_name for shape in shapes}
    own = [tensor for tensor in tensors if tensor.name in source_types]  # the others are transforms
    weights: Counter[str] = Counter()
    for tensor in own:
        weights[tensor.type_name] += tensor.n_weights
    quantized = [tensor for tensor in own if tensor.type_name not in rules.FLOAT_TYPES]
    extra = sum(tensor.n_bytes for tensor in tensors if tensor.name not in source_types)
    n_quantized = sum(tensor.n_weights for tensor in quantized)
    without_importance = [
        tensor.name
        for tensor in quantized
        if matrix is not None
        and tensor.type_name != source_types[tensor.name]
        and tensor.name not in matrix.entries
    ]
    return ConvertResult(
        path=out,
        n_bytes=out.stat().st_size,
        n_tensors=len(tensors),
        weights=dict(weights.most_common()),
        bits_per_weight=8 * sum(tensor.n_bytes for tensor in tensors) / max(weights.total(), 1),
        quantized_bits_per_weight=(
            8 * (sum(tensor.n_bytes for tensor in quantized) + extra) / n_quantized if n_quantized else None
        ),
        seconds=seconds,
        fallbacks=fallbacks,
        without_importance=without_importance,
        without_effect=without_effect,
        raised=_raised(matrix, [t for t in quantized if t.type_name != source_types[t.name]]),
    )


def _raised(matrix: Imatrix | None, tensors: Sequence[Tensor]) -> dict[str, int]:
    counts = {} if matrix is None else {tensor.name: matrix.n_raised(tensor) for tensor in tensors}
    return {name: count for name, count in counts.items() if count}
