"""plan.json: everything that a calibration's result depends on, written before its first block.

A folder goes on with the plan it has or not at all: block files of two plans are never mixed.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ggml_ext import __version__, recipes
from ggml_ext.core import owned_folder, paths
from ggml_ext.core.atomic import write_text
from ggml_ext.core.errors import GgmlExtError, listed
from ggml_ext.core.facts import UINT32, made_of
from ggml_ext.core.owned_folder import PLAN
from ggml_ext.core.registry import ROUNDINGS, TRANSFORMS
from ggml_ext.gguf.source import Source, Tensor
from ggml_ext.hf import model_files
from ggml_ext.methods.calibrate.block_file import block_path, outside_path
from ggml_ext.methods.model_sites import ModelSites
from ggml_ext.methods.rounding import grid
from ggml_ext.methods.transforms import official
from ggml_ext.observe.description import Description
from ggml_ext.observe.sites import Table
from ggml_ext.recipes import Method
from ggml_ext.runtime import native
from ggml_ext.types import mixes, rules

_MOST_BLOCKS = 2**16


@dataclass(frozen=True)
class Request:
    """A calibration of a Hugging Face folder or a float GGUF file. ``text``: the calibration text. ``ctx``:
    tokens per window. ``device``: "cpu" or "cuda", where transforms are solved. ``threads``: 0 for all; the
    result does not depend on it where sums do not. ``matrices``: transforms that the official FlatQuant code
    saved, a file flat_matrices.pth or its folder, to use instead of solved ones. ``parse_special``: see
    samples.windows. ``trust_remote_code``: see hf.to_gguf. ``observed``: folder of a finished observation to
    use, of the same text, windows and seed; ``text`` may be None then. ``dask``: address of a scheduler whose
    workers do the blocks."""

    source: Path
    text: Path | None
    method: Method
    type_for: Sequence[tuple[str, str]] = ()
    keep: Sequence[str] = ()
    ctx: int = 512
    seed: int = 0
    device: str = "cpu"
    threads: int = 0
    matrices: Path | None = None
    parse_special: bool = False
    trust_remote_code: bool = False
    observed: Path | None = None
    dask: str | None = None


@dataclass(frozen=True)
class Plan:
    """``source``: see model_files.of. ``text``: SHA-256. ``samples``: windows of ``ctx`` tokens, 0 for as
    many as the widest matrix asks for. ``base``: the type or mix that was asked for. ``types``: tensor ->
    type, all tensors of the model. ``fallbacks``: tensor -> type that did not fit its rows.
    ``without_effect``: tensors that --type-for names in vain. ``outside``: matrices
    outside the blocks that are rounded by what was observed. ``matrices``: SHA-256 of the transforms that
    were given, None where they are solved. ``activation``: bits and group, None for llama.cpp's own.
    ``free``: tensors whose types are chosen by what they cost, ``types`` having others until then; ``size``,
    ``bpw``, ``stock``: see recipes.Method.
    ``versions``: of the programs involved. ``observed``: see Description.digest, None for an observation of
    the calibration's own."""

    source: dict[str, str]
    text: str
    samples: int
    ctx: int
    seed: int
    parse_special: bool
    base: str
    types: dict[str, str]
    fallbacks: dict[str, str]
    without_effect: list[str]
    transform: str
    transform_bits: float | None
    matrices: str | None
    rounding: str
    activation: list[int] | None
    blocks: int
    device: str
    versions: dict[str, str] = field(default_factory=dict)
    observed: str | None = None
    outside: list[str] = field(default_factory=list)
    size: int | None = None
    bpw: float | None = None
    stock: bool = False
    free: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Writes the plan atomically."""
        write_text(folder / PLAN, json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")

    @property
    def without_grid(self) -> list[str]:
        """Matrices of a prescribed type that has no levels to choose from; importances round them instead."""
        if not ROUNDINGS[self.rounding].otherwise:
            return []
        return [
            name
            for name, kind in self.types.items()
            if (name.startswith("blk.") or name in self.outside)
            and kind not in rules.FLOAT_TYPES
            and not grid.supports(kind)
            and name not in self.free
        ]

    def missing(self, folder: Path) -> list[int]:
        """Blocks that have no checkpoint yet."""
        return [index for index in range(self.blocks) if not block_path(folder, index).is_file()]

    def lacks_outside(self, folder: Path) -> bool:
        """Whether what is outside of them has none yet."""
        return bool(self.outside) and not outside_path(folder).is_file()


def require_model(plan: Plan, model: Path, folder: Path) -> None:
    """Raises GgmlExtError, naming what differs, unless ``model`` is the folder or file of the plan in
    ``folder``, unchanged."""
    changed = model_files.changed(plan.source, model_files.of(model))
    if changed:
        raise GgmlExtError(
            f"{folder}: a calibration of another model than {model} ({changed}); give the one it was made "
            "of, as it was, or calibrate again"
        )


def make(
    request: Request, sha256: str, source: Source, table: Table, observed: Description | None = None
) -> Plan:
    """The plan of a request. sha256: of the text. source: the float model. table: its sites. observed: the
    observation to use, if there is one.

    Raises GgmlExtError for patterns that match nothing and types that the rounding does not know.
    """
    method = request.method
    asked = rules.compile_rules(method.type_name, request.type_for, request.keep)
    asked = replace(asked, no_matrices=table.no_matrices)
    shapes = [tensor.shape for tensor in source.tensors]
    choices = rules.choose(shapes, source.arch, asked, native.block_size)
    types = {choice.name: choice.target for choice in choices}
    _check_grid(method.type_name, method.rounding)
    activation = recipes.ACTIVATIONS[method.activation]
    return Plan(
        source=model_files.of(request.source),
        text=sha256,
        samples=method.samples if observed is None else observed.windows,
        ctx=request.ctx,
        seed=request.seed,
        parse_special=request.parse_special,
        base=method.type_name,
        types=types,
        fallbacks={choice.name: choice.fallback_from for choice in choices if choice.fallback_from},
        without_effect=rules.without_effect(shapes, source.arch, asked),
        outside=ModelSites(source, table, types).outside if ROUNDINGS[method.rounding].measures else [],
        size=method.size,
        bpw=method.bpw,
        stock=method.stock,
        free=rules.free(shapes, source.arch, asked, choices) if method.allocates else [],
        transform=method.transform,
        transform_bits=method.transform_bits,
        matrices=None if request.matrices is None else official.sha256(request.matrices),
        rounding=method.rounding,
        activation=None if activation is None else list(activation),
        blocks=source.n_blocks,
        device=request.device,
        versions=versions(),
        observed=None if observed is None else observed.digest,
    )


def _check_grid(base: str, rounding: str) -> None:
    """Refuses a main type that the rounding cannot choose codes of, before anything is computed."""
    type_name = mixes.BODY.get(base, base)
    if ROUNDINGS[rounding].otherwise and not grid.supports(type_name):
        raise GgmlExtError(
            f"--rounding {rounding}: knows no levels of type {type_name}; "
            f"it knows {', '.join(grid.names())}, for others use --rounding {ROUNDINGS[rounding].otherwise}"
        )


def versions() -> dict[str, str]:
    """Of the programs that a result depends on."""
    return {
        "ggml-ext": __version__,
        "library": model_files.short_sha256(paths.library("ggml-base")),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("numpy", "torch")},
    }


def require_tensors(plan: Plan, source: Source, folder: Path) -> None:
    """Raises GgmlExtError unless the plan in ``folder`` is of the blocks of its float model, with a type for
    every tensor that fits its rows."""
    problem = ""
    if plan.blocks != source.n_blocks or {tensor.name for tensor in source.tensors} != plan.types.keys():
        problem = "has other tensors"
    else:
        odd = [tensor.name for tensor in source.tensors if not _fits(tensor, plan.types[tensor.name])]
        problem = f"has impossible types for {listed(odd)}" if odd else ""
    if problem:
        raise GgmlExtError(
            f"{folder / PLAN}: {problem}, it is not of {source.path}; delete the folder and calibrate again"
        )


def _fits(tensor: Tensor, type_name: str) -> bool:
    try:
        return tensor.row_length % native.block_size(type_name) == 0
    except native.UnknownTypeError:
        return False


def load(folder: Path) -> Plan | None:
    """The folder's plan, None if it has none. Raises GgmlExtError for one that is no plan."""

    def parse(facts: dict[str, Any]) -> Plan:
        plan = made_of(Plan, facts)
        if not all(number in UINT32 for number in (plan.samples, plan.ctx, plan.seed)):
            raise ValueError("impossible numbers")
        if not 0 <= plan.blocks <= _MOST_BLOCKS:
            raise ValueError(f"{plan.blocks} blocks")
        activation = None if plan.activation is None else tuple(plan.activation)
        known = plan.rounding in ROUNDINGS and plan.transform in TRANSFORMS
        if not known or activation not in recipes.ACTIVATIONS.values():
            raise ValueError("unknown rounding, transform or activations")
        return plan

    return owned_folder.load_plan(folder, parse, "calibrate again")


def is_plan(folder: Path) -> bool:
    """Whether the folder's plan.json is a plan of this version."""
    try:
        return load(folder) is not None
    except GgmlExtError:
        return False


def require_equal(found: Plan, wanted: Plan, folder: Path) -> None:
    """Raises GgmlExtError, naming what differs, unless the two plans are the same."""
    model_files.require_equal_plans(asdict(found), asdict(wanted), "source", f"{folder}: holds a calibration")
