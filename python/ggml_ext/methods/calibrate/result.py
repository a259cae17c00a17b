"""A finished calibration's folder, as convert reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.owned_folder import SOURCE
from ggml_ext.gguf.source import Source, open_gguf
from ggml_ext.gguf.transformed import require_plain
from ggml_ext.methods.calibrate import plan as plans
from ggml_ext.methods.calibrate.allocate import allocated, table_of
from ggml_ext.methods.calibrate.block_file import FileSite, Stored, block_path, load, outside_path
from ggml_ext.methods.calibrate.folder import OBSERVATION
from ggml_ext.methods.calibrate.plan import Plan
from ggml_ext.observe import description as descriptions
from ggml_ext.types.encode import Prepared
from ggml_ext.types.rules import STOCK_MIXES


@dataclass(frozen=True)
class Calibrated:
    """``source``: the float model. ``windows``: of the text. ``prepared``: what takes the place of its
    tensors."""

    plan: Plan
    windows: int
    source: Source
    prepared: Prepared


def open_folder(folder: Path, model: Path) -> Calibrated:
    """Opens the finished calibration of ``model``, a Hugging Face folder or a GGUF file.

    Raises GgmlExtError for a folder that holds none, an unfinished one, that of another model, and
    for a model that require_plain refuses.
    """
    plan = plans.load(folder)
    if plan is None:
        raise GgmlExtError(f"{folder}: holds no calibration; make one with ggml-ext calibrate")
    missing = plan.missing(folder)
    if missing:
        raise GgmlExtError(
            f"{folder}: unfinished, {len(missing)} of {plan.blocks} blocks are missing; "
            "go on with the ggml-ext calibrate that began it"
        )
    if plan.lacks_outside(folder):
        raise GgmlExtError(
            f"{folder}: unfinished, {' and '.join(plan.outside)} is missing; "
            "go on with the ggml-ext calibrate that began it"
        )
    plans.require_model(plan, model, folder)
    plan = allocated(plan, folder)
    source = open_gguf(folder / SOURCE if model.is_dir() else model)
    require_plain(source)
    plans.require_tensors(plan, source, folder)
    tensors: dict[str, Stored] = {}
    sites: list[FileSite] = []
    errors: dict[str, float] = {}
    paths = [block_path(folder, index) for index in range(plan.blocks)]
    for path in [*paths, *([outside_path(folder)] if plan.outside else [])]:
        stored, findings = load(path)
        tensors |= stored
        sites += findings.sites
        errors |= findings.errors
    prepared = Prepared(
        tensors=tensors,
        mix=plan.base if plan.base in STOCK_MIXES else "",
        transform=plan.transform,
        rounding=plan.rounding,
        sites=sites,
        activation=plan.activation,
        errors=errors,
        losses=table_of(plan, folder),
    )
    return Calibrated(plan, _windows(plan, folder), source, prepared)


def _windows(plan: Plan, folder: Path) -> int:
    if plan.observed is not None:
        return plan.samples
    observed = descriptions.load(folder / OBSERVATION)
    if observed is None:
        raise GgmlExtError(f"{folder / OBSERVATION}: holds no observation; calibrate again")
    return observed.windows
