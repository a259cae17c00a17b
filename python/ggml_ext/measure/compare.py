"""One table for a base model and others: size, perplexity, KL divergence, top-1 agreement, speed.

These are the figures that llama.cpp asks for with a new quant type. A row is a plain dict, the JSON output is
the list of rows, the base first; docs/compare.md describes every key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.outputs import check_outputs, write_json
from ggml_ext.core.plots import require_matplotlib
from ggml_ext.gguf.header import read_header, value
from ggml_ext.gguf.inspect import InspectResult, inspect
from ggml_ext.gguf.shards import named_errors
from ggml_ext.measure import bench, report
from ggml_ext.measure.evaluate import Evaluation, Result
from ggml_ext.measure.layers import ModelErrors, choose_windows, layer_errors
from ggml_ext.measure.scoring import Difference, Divergence
from ggml_ext.runtime.cache_types import PLAIN, CacheTypes

Row = dict[str, Any]

DIVERGENCE_KEYS = tuple(field.name for field in fields(Divergence))
DIFFERENCE_KEYS = tuple(field.name for field in fields(Difference))
SPEED_KEYS = (
    "pp_tps", "tg_tps", "pp_spread", "tg_spread", "pp_ratio", "tg_ratio", "pp_samples", "tg_samples",
)  # fmt: skip

ERROR_METHOD = "cosines over the text, Student t"
"""How errors and intervals are estimated: standard_error.py, docs/compare.md."""

LAYER_WINDOWS = 8
"""Windows for the error per block: figures within a few per cent of the whole text's; see docs/compare.md."""

ORIGIN_KEYS = ("ggml_ext.", "quantize.")
"""Beginnings of the metadata keys that tell how a file was made."""


@dataclass(frozen=True)
class FileFacts:
    """What a model says about itself, all files of a split one together.

    bits_per_weight: over all tensors; bits_per_layer_weight: of a weight in the matrices of the layers, with
    what factors of transforms take, without embeddings, output head and vectors; types: weights per tensor
    type; origin: metadata on how it was made; tensor_errors: "kind" and "values", tensor -> error, as the
    file was made; None if it does not tell.
    """

    bytes: int
    bits_per_weight: float
    bits_per_layer_weight: float | None
    types: dict[str, int]
    origin: dict[str, Any]
    tensor_errors: dict[str, Any] | None


_BESIDE = re.compile(r"\.(fq_|kv_probe|kv_cq)")
"""Tensors of a block that are no weights of the model's own."""


def file_facts(path: Path) -> FileFacts:
    """Read the headers of the model's files, ``path`` the first. Raises GgmlExtError if it is no sound GGUF
    model with tensors."""
    about = inspect(path)
    if about.parameters == 0:
        raise GgmlExtError(f"{path}: has no tensors; name a GGUF file with a model")
    layers = [tensor for tensor in about.tensors if tensor.name.startswith("blk.") and len(tensor.dims) > 1]
    weights = sum(tensor.weights for tensor in layers if not _BESIDE.search(tensor.name))
    with named_errors(path):
        origin = _origin(read_header(path).keys)
    return FileFacts(
        bytes=about.bytes,
        bits_per_weight=about.bits_per_weight,
        bits_per_layer_weight=8 * sum(tensor.bytes for tensor in layers) / weights if weights else None,
        types={kind.type: kind.weights for kind in sorted(about.types, key=lambda kind: -kind.weights)},
        origin=origin,
        tensor_errors=_tensor_errors(about),
    )


def _origin(keys: Mapping[str, bytes]) -> dict[str, Any]:
    """The numbers and strings among the keys that ORIGIN_KEYS name; lists are about tensors or blocks."""
    values = {name: value(entry) for name, entry in keys.items() if name.startswith(ORIGIN_KEYS)}
    return {name: found for name, found in values.items() if not isinstance(found, list)}


def _tensor_errors(about: InspectResult) -> dict[str, Any] | None:
    """The keys ggml_ext.error.* (docs/gguf.md), None for a file without them."""
    errors = about.ext.errors if about.ext is not None else None
    if errors is None:
        return None
    if not all(map(math.isfinite, errors.values)):
        raise GgmlExtError(f"{about.path}: key ggml_ext.error.values holds NaN or Inf; convert it again")
    return {"kind": errors.kind, "values": dict(zip(errors.tensors, errors.values, strict=True))}


def make_row(
    evaluation: Evaluation,
    result: Result,
    facts: FileFacts,
    text: Path,
    speed: Row | None,
    errors: ModelErrors | None,
    cache: CacheTypes,
) -> Row:
    """The JSON row of one model; every key is present, null where nothing was measured."""
    divergence = result.divergence.as_dict() if result.divergence is not None else {}
    rival = None if result.rival is None else evaluation.models[result.rival].path
    difference = None if result.rival is None else result.differences[result.rival]
    return {
        "model": str(result.model),
        **cache.as_json(),
        "bytes": facts.bytes,
        "bits_per_weight": facts.bits_per_weight,
        "bits_per_layer_weight": facts.bits_per_layer_weight,
        "types": facts.types,
        "origin": facts.origin,
        "ppl": result.perplexity.ppl,
        "ppl_se": result.perplexity.ppl_se,
        "ppl_ci95": result.perplexity.ppl_ci95,
        "ppl_se_independent": result.perplexity.ppl_se_independent,
        **{key: divergence.get(key) for key in DIVERGENCE_KEYS},
        "rival": None if rival is None else str(rival),
        **{key: None if difference is None else getattr(difference, key) for key in DIFFERENCE_KEYS},
        "differences": None
        if result.divergence is None
        else [
            None if other is None else {"model": str(subject.path), **other.as_dict()}
            for subject, other in zip(evaluation.models, result.differences, strict=True)
        ],
        "error_method": ERROR_METHOD,
        "error_df": result.perplexity.error_df,
        **{key: (speed or {}).get(key) for key in SPEED_KEYS},
        "embedding_error": None if errors is None else errors.embedding,
        "layers": None
        if errors is None
        else [{"block": i, **vars(layer)} for i, layer in enumerate(errors.layers)],
        "tensor_errors": facts.tensor_errors,
        "text": str(text),
        "text_sha256": evaluation.text_sha256,
        "ctx": evaluation.ctx,
        "windows": evaluation.n_windows,
        "tokens_scored": result.perplexity.count,
    }


def compare(
    base: Path,
    models: Sequence[Path],
    text: Path,
    *,
    ctx: int = 512,
    threads: int | None = None,
    rounds: int = bench.ROUNDS,
    layers: int = LAYER_WINDOWS,
    cache: CacheTypes = PLAIN,
    json_out: Path | None = None,
    report_out: Path | None = None,
    plot_out: Path | None = None,
    deliver: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Measure ``base`` and ``models`` on ``text`` and write the files that are asked for.

    ``rounds``: rounds of speed measurements; ``layers``: windows for the error per block, which is that of
    the weights alone; 0 for none. ``cache``: of the models; the base's is f16 and whole. Speeds are not
    measured with a budget, since they would be those of other ubatches. ``deliver``: gets the rows. If it or
    a file fails, the scores stay on disk and the same call goes on from them. Returns the rows, the base
    first. Raises GgmlExtError before any long work if an input cannot be read or an output cannot be written.
    """
    check_outputs(json_out, report_out, plot_out, inputs=[base, *models, text])
    if plot_out is not None:
        require_matplotlib()
    with Evaluation(base, models, text, ctx=ctx, threads=threads, cache=cache) as evaluation:
        paths = [base, *models]
        facts = [file_facts(path) for path in paths]
        results = evaluation.run()
        errors: list[ModelErrors | None] = [None] * len(models)
        if layers:
            chosen = choose_windows(evaluation.windows, layers)
            errors = layer_errors(base, models, chosen, threads=threads)
        caches = [PLAIN, *[cache] * len(models)]
        speeds: Sequence[Row | None] = [None] * len(paths)
        if rounds and not cache.kv:
            speeds = bench.as_rows(bench.bench(paths, rounds=rounds, threads=threads, caches=caches))
        rows = [
            make_row(evaluation, result, fact, text, speed, error, types)
            for result, fact, speed, error, types in zip(
                results, facts, speeds, [None, *errors], caches, strict=True
            )
        ]
        if json_out is not None:
            write_json(json_out, rows)
        if report_out is not None:
            report.write_report(report_out, rows, threads=threads, rounds=rounds)
        if plot_out is not None:
            report.write_plot(plot_out, rows)
        if deliver is not None:
            deliver(rows)
        evaluation.finish()
    return rows
