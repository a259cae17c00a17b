"""llama-quantize's own mixes (Q4_K_M, IQ4_XS, Q4_0, ...), made by llama-quantize itself.

So a stock file that ggml-ext makes holds, tensor for tensor, the bytes of the one that llama.cpp makes.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from pathlib import Path

from ggml_ext.core import process
from ggml_ext.core.atomic import atomic_path
from ggml_ext.core.cpus import processors
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.progress import track
from ggml_ext.core.registry import OWN_TYPES, SOURCE_TYPES
from ggml_ext.gguf.imatrix import Imatrix
from ggml_ext.gguf.source import Source, float_slabs
from ggml_ext.runtime import native, tools
from ggml_ext.types import rules

_FALLBACK = re.compile(r"warning: (\S+) .*?required for type\s+(\w+)\).*?-> falling back to\s+(\w+)")


def quantize(
    source: Source, out: Path, request: rules.Rules, matrix: Imatrix | None, *, work: Path, threads: int = 0
) -> dict[str, tuple[str, str]]:
    """Runs llama-quantize and returns its fallbacks: tensor -> (wanted type, used type).

    ``work``: a folder for temporary files. Raises GgmlExtError with llama-quantize's reason.
    """
    own = next((type_name for _, type_name in request.type_for if type_name in OWN_TYPES), None)
    if own is not None:
        raise GgmlExtError(
            f"--type {request.base}: llama-quantize makes this mix and {own} is none of its types; "
            "use --type fq4 and name the exceptions with --type-for"
        )
    overrides = rules.overrides([tensor.shape for tensor in source.tensors], source.arch, request)
    _require_range(source, overrides)
    importances = None if matrix is None else _usable(matrix, source, work)
    command: list[str | Path] = [tools.find("llama-quantize")]
    if overrides:
        listing = work / "tensor-types.txt"
        lines = "".join(f"^{re.escape(name)}$={kind}\n" for name, kind in overrides.items())
        listing.write_text(lines, encoding="utf-8")
        command += ["--tensor-type-file", listing.resolve()]
    if importances is not None:
        command += ["--imatrix", importances.name]  # by name: the path lands in the file's metadata
    if {tensor.type_name for tensor in source.tensors} <= {*SOURCE_TYPES}:
        command.append("--allow-requantize")  # q8_0
    total = len(source.tensors)
    fallbacks: dict[str, tuple[str, str]] = {}
    with atomic_path(out) as temporary, track(total, out.name, "tensors") as advance:
        done = process.up_to(advance)

        def watch(output: str) -> None:
            fallbacks.update({name: (wanted, used) for name, wanted, used in _FALLBACK.findall(output)})
            done(max(map(int, re.findall(rf"\[\s*(\d+)/\s*{total}\]", output)), default=0))

        command += [source.path.absolute(), temporary.absolute(), request.base.upper()]
        command += [str(threads or processors())]
        folder = importances.parent if importances is not None else None
        finished = process.run(command, watch=watch, cwd=folder, env=tools.environment())
        if finished.status != 0:
            raise GgmlExtError(_reason(source, out, request, finished))
    return fallbacks


def _usable(matrix: Imatrix, source: Source, work: Path) -> Path:
    """The matrix's file, or one of that name in ``work`` where importances are too small for the encoders.

    Raises GgmlExtError for a matrix of another model, which is a remark of llama-quantize.
    """
    if not sum(matrix.n_raised(tensor) for tensor in source.tensors):
        return matrix.path.absolute()
    folder = work / "importances"
    folder.mkdir()
    matrix.write_usable(folder / matrix.path.name, source.tensors)
    return (folder / matrix.path.name).absolute()


def _require_range(source: Source, overrides: Mapping[str, str]) -> None:
    """Refuses weights that llama-quantize would clip without a word."""
    for tensor in source.tensors:
        largest = native.LARGEST.get(overrides.get(tensor.name, ""))
        if largest is None or tensor.type_name not in rules.FLOAT_TYPES:
            continue
        for first, rows in float_slabs(tensor):
            try:
                native.require_range(rows, first, largest)
            except GgmlExtError as exc:
                where = f"{tensor.path}: tensor {tensor.name}"
                raise GgmlExtError(f"{where} does not fit type {overrides[tensor.name]} ({exc})") from exc


def _reason(source: Source, out: Path, request: rules.Rules, finished: process.Finished) -> str:
    failed = re.findall(r"failed to quantize: (.*)", finished.output)
    last = failed[-1].strip() if failed else process.last_words(finished)
    if "iostream error" in last or finished.status == -signal.SIGXFSZ:
        return f"cannot write: {out}; free some space or choose another folder"
    if "requantizing" in last:
        return f"{source.path}: {last}; convert from an f32, f16, bf16 or q8_0 model"
    if "imatrix" in last or "importance matrix" in last:
        return f"--type {request.base}: {last}; add --calibration TEXT or --imatrix FILE"
    return f"{source.path}: llama-quantize failed ({last}); check the model with ggml-ext inspect"
