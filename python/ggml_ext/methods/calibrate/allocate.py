"""Types by what they cost: from the plan, the observation and the losses of single tensors to a type for
each.

In the calibration's folder losses.json has the losses of all tensors and types.json the types, once they are
chosen. Until then losses are in the user's cache, where another size of the same model finds them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ggml_ext.core.atomic import write_text
from ggml_ext.core.errors import GgmlExtError, Warn
from ggml_ext.core.registry import OWN_TYPES, ROUNDINGS, TRANSFORMS
from ggml_ext.gguf.source import Source, Tensor, read_floats, reading
from ggml_ext.methods.calibrate import loss_cache
from ggml_ext.methods.calibrate.plan import Plan
from ggml_ext.methods.model_sites import ModelSites
from ggml_ext.methods.rounding import Rounded, grid, round_matrix
from ggml_ext.methods.rounding.hessian import Hessian, choose_shrinkage
from ggml_ext.observe import samples
from ggml_ext.observe.layout import SAMPLE_ROWS
from ggml_ext.observe.reader import Observation
from ggml_ext.observe.sites import Table
from ggml_ext.runtime import native
from ggml_ext.types import losses
from ggml_ext.types.allocation import Option, TooSmallError, allocate

LOSSES, TYPES = "losses.json", "types.json"

_BY_IMPORTANCE = ("q2_k", "iq2_s", "iq3_xxs", "iq3_s", "q3_k")  # gptq does not know their levels
_CANDIDATES = (*OWN_TYPES, "iq4_nl", "iq4_xs", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k", "q8_0")

_SAMPLE_ROWS = 32  # of a tensor, whose errors stand for all of its rows'
_KEYS = 8192  # bytes of the keys that do not grow with the model
_TYPES = len(_BY_IMPORTANCE) + len(_CANDIDATES)
_SITE = 96  # bytes of a site's numbers, or of a factor's description


def candidates(tensor: Tensor, rounding: str, *, stock: bool) -> list[str]:
    """The types that a tensor can have: with a rounding that chooses codes those whose codes it can choose,
    and Q8_0."""
    every = _CANDIDATES if ROUNDINGS[rounding].otherwise else (*_BY_IMPORTANCE, *_CANDIDATES)
    return [
        name
        for name in every
        if tensor.row_length % native.block_size(name) == 0 and not (stock and name in OWN_TYPES)
    ]


def allocated(plan: Plan, folder: Path) -> Plan:
    """The plan with the types that were chosen in its folder. Raises GgmlExtError where they were not."""
    if not plan.free:
        return plan
    path = folder / TYPES
    try:
        chosen = json.loads(path.read_text(encoding="utf-8"))
        types = {name: str(chosen[name]) for name in plan.free}
        for name in set(types.values()):
            native.block_size(name)
    except (OSError, ValueError, TypeError, KeyError, native.UnknownTypeError) as exc:
        raise GgmlExtError(
            f"{path}: no choice of types ({exc}); go on with the command that began it"
        ) from exc
    fallbacks = {name: wanted for name, wanted in plan.fallbacks.items() if name not in types}
    return replace(plan, types={**plan.types, **types}, fallbacks=fallbacks)


def choose_types(
    plan: Plan,
    folder: Path,
    source: Source,
    seen: Observation,
    content: bytes,
    *,
    threads: int,
    warn: Warn,
) -> Plan:
    """The plan with a type for every tensor, of which those it leaves free share what the size leaves them.

    content: of the text whose windows the losses are measured on. Raises GgmlExtError for a size that is too
    small.
    """
    if not plan.free:
        return plan
    if not (folder / TYPES).is_file():
        tensors = [tensor for tensor in source.tensors if tensor.name in set(plan.free)]
        place = loss_cache.place(plan) or folder / LOSSES
        rounder, windows = _Rounder(plan, seen, threads), _windows(source, content, plan)
        try:
            known = losses.measure(source.path, tensors, rounder, windows, place, threads=threads, warn=warn)
        except KeyboardInterrupt:
            left = len(set(plan.free) - losses.load(place).kld.keys())
            warn(f"{left} of {len(plan.free)} tensors' losses are missing; the same command goes on there")
            raise
        known.save(folder / LOSSES)
        options = {tensor.name: _options(tensor, source, known.of, plan) for tensor in tensors}
        types = allocate(options, _room(plan, source, seen.table))
        write_text(folder / TYPES, json.dumps(types, indent=1) + "\n")
    return allocated(plan, folder)


def table_of(plan: Plan, folder: Path) -> Mapping[str, Mapping[str, float]]:
    """Tensor -> type -> loss, of a finished choice; empty where there was none."""
    if not plan.free:
        return {}
    known = losses.load(folder / LOSSES)
    types = {*_BY_IMPORTANCE, *_CANDIDATES}
    return {
        name: {kind: known.of(name, kind) for kind in sorted(known.error[name]) if kind in types}
        for name in plan.free
        if name in known.kld
    }


def _windows(source: Source, content: bytes, plan: Plan) -> NDArray[np.int32]:
    ctx = min(losses.CTX, plan.ctx)
    found = samples.windows(
        source.path,
        samples.DEFAULT_TEXT,
        ctx=ctx,
        samples=losses.WINDOWS,
        seed=plan.seed,
        content=content,
        parse_special=plan.parse_special,
        warn=lambda _line: None,
    )
    return found.astype(np.int32)


class _Rounder:
    """Rounds as the plan does, in the basis that the model has. Tensors that read the same inputs come one
    after the other and share their moments; experts have those of all. Where nothing is known of the inputs,
    to nearest."""

    def __init__(self, plan: Plan, seen: Observation, threads: int) -> None:
        self._plan, self._seen, self._threads = plan, seen, threads
        self._of: tuple[str, Hessian] | None = None

    def errors(self, tensor: Tensor) -> dict[str, float]:
        """See losses.Rounder; of some rows."""
        rows = some_rows(tensor, _SAMPLE_ROWS)
        types = {losses.PROBE, *candidates(tensor, self._plan.rounding, stock=self._plan.stock)}
        return {name: self._rounded(tensor, rows, name).error for name in sorted(types)}

    def probe(self, tensor: Tensor, rows: losses.Floats) -> losses.Floats:
        """See losses.Rounder."""
        data = self._rounded(tensor, rows, losses.PROBE).data
        return native.dequantize(losses.PROBE, data, tensor.row_length)

    def _rounded(self, tensor: Tensor, rows: losses.Floats, type_name: str) -> Rounded:
        hessian, method = self._hessian(tensor.name), self._plan.rounding
        if hessian is None:
            method = "rtn"
        elif ROUNDINGS[method].otherwise and not grid.supports(type_name):
            method = ROUNDINGS[method].otherwise
        return round_matrix(rows, type_name, method, hessian, threads=self._threads)

    def _hessian(self, tensor: str) -> Hessian | None:
        site = self._seen.site_of(tensor)
        if site is None:
            return None
        if self._of is None or self._of[0] != site.anchor:
            measured = torch.from_numpy(self._seen.moment(site)).double()
            sample = torch.from_numpy(self._seen.sample(site, SAMPLE_ROWS))
            shrinkage = choose_shrinkage(measured, round(self._seen.rows(site)), sample)
            self._of = site.anchor, Hessian(measured, shrinkage)
        return self._of[1]


def some_rows(tensor: Tensor, most: int) -> losses.Floats:
    """At most so many rows, from all over the tensor, float32 [rows, row length]."""
    every = -(-tensor.n_rows // most)
    with reading(tensor) as file:
        found = [read_floats(file, tensor, first, 1) for first in range(0, tensor.n_rows, every)]
    return np.concatenate(found)


def _options(tensor: Tensor, source: Source, loss: Callable[[str, str], float], plan: Plan) -> list[Option]:
    return [
        Option(name, _padded(tensor, name, source.alignment), loss(tensor.name, name))
        for name in candidates(tensor, plan.rounding, stock=plan.stock)
    ]


def _padded(tensor: Tensor, type_name: str, alignment: int) -> int:
    n_bytes = tensor.n_rows * native.row_size(type_name, tensor.row_length)
    return n_bytes + -n_bytes % alignment


def _room(plan: Plan, source: Source, table: Table) -> int:
    """Bytes for the tensors that the plan leaves free."""
    transforms = _Transforms.of(plan, source, table)
    free = set(plan.free)
    fixed = sum(
        _padded(tensor, plan.types[tensor.name], source.alignment)
        for tensor in source.tensors
        if tensor.name not in free
    )
    if plan.size is not None:
        return plan.size - fixed - transforms.factors - transforms.keys - _front(plan, source)
    assert plan.bpw is not None
    return int(plan.bpw * _n_weights(source) / 8) - fixed - transforms.factors


def _front(plan: Plan, source: Source) -> int:
    """Bytes in front of the tensors without what transforms add: a bound from above."""
    header = sum(map(len, source.keys.values()))
    header += sum(len(tensor.name) + 4 + 8 * (3 + len(tensor.dims)) for tensor in source.tensors)
    tables = sum(len(name) + 8 + 4 + 4 * _TYPES for name in plan.free)
    return header + tables + sum(len(name) + 8 + 4 for name in plan.types) + _KEYS


def _n_weights(source: Source) -> int:
    return sum(tensor.n_weights for tensor in source.tensors)


def require_room(plan: Plan, source: Source, table: Table) -> None:
    """Raises GgmlExtError for a size that not even the smallest types make."""
    if not plan.free:
        return
    tensors = [tensor for tensor in source.tensors if tensor.name in set(plan.free)]
    options = {its.name: _options(its, source, lambda *_: 0.0, plan) for its in tensors}
    room = _room(plan, source, table)
    try:
        allocate(options, room)
    except TooSmallError as exc:
        if plan.size is not None:
            asked, least = f"--size {plan.size}", f"{plan.size - room + exc.least} bytes"
        else:
            assert plan.bpw is not None
            bits = plan.bpw + 8 * (exc.least - room) / _n_weights(source)
            asked, least = f"--bpw {plan.bpw}", f"{bits:.3f} bits"
        raise GgmlExtError(
            f"{asked}: the smallest types make {least} of this model; ask for that or more"
        ) from exc


@dataclass(frozen=True)
class _Transforms:
    """What transforms add to a file, bounds from above. ``factors``: bytes of stored ones. ``keys``: of the
    table of sites and of the factors' descriptions."""

    factors: int = 0
    keys: int = 0

    @classmethod
    def of(cls, plan: Plan, source: Source, table: Table) -> _Transforms:
        if plan.transform == "none":
            return cls()
        model = ModelSites(source, table, plan.types)
        factors = keys = 0
        for index in range(plan.blocks):
            for site in model.block(index, weights=False).values():
                matrices = (*site.linears, *site.folded)
                n_weights = sum(linear.weight.numel() for linear in matrices)
                keys += (
                    4 * site.n + 4 * site.head_dim**2 + _SITE + sum(len(its.tensor) + 8 for its in matrices)
                )
                if TRANSFORMS[plan.transform].online and site.online:
                    assert plan.transform_bits is not None
                    factors += int(plan.transform_bits * n_weights / 8) + 2 * source.alignment
                    keys += 2 * (len(site.anchor) + _SITE)
        return cls(factors, keys)
