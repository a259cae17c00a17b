"""ggml-ext calibrate: solves and rounds a model block by block, in a folder that can be gone on with.

llama.cpp runs the model once over the text and sums what its matrices read (observe/), or has done so before.
From these figures
and the weights of the float GGUF file each block's transforms are solved, folded, and its matrices rounded.
What comes of it is one file per block. Memory holds one block. Before the first one a random transform has
to show that folding changes nothing (proof.py).

The folder: plan.json (plan.py), source.gguf (of a Hugging Face folder the float model),
observation/, block-NNN.safetensors and outside.safetensors (block_file.py), lock.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ggml_ext import recipes
from ggml_ext.core.atomic import atomic_path, work_folder
from ggml_ext.core.errors import GgmlExtError, Warn, listed, warn
from ggml_ext.core.outputs import check_folder
from ggml_ext.core.owned_folder import SOURCE, Held
from ggml_ext.core.progress import track
from ggml_ext.gguf.source import Source, open_gguf
from ggml_ext.gguf.transformed import require_plain
from ggml_ext.hf import folder as hf
from ggml_ext.methods.calibrate import given
from ggml_ext.methods.calibrate import plan as plans
from ggml_ext.methods.calibrate.allocate import choose_types, require_room
from ggml_ext.methods.calibrate.blocks import Work, calibrate_block, calibrate_outside, sample_rows
from ggml_ext.methods.calibrate.device import bound_threads, require_device
from ggml_ext.methods.calibrate.folder import OBSERVATION, held
from ggml_ext.methods.calibrate.plan import Plan, Request
from ggml_ext.methods.calibrate.proof import prove
from ggml_ext.methods.model_sites import ModelSites
from ggml_ext.observe import prepare, run
from ggml_ext.observe.reader import Observation
from ggml_ext.observe.reuse import Asked, open_finished, require_figures
from ggml_ext.observe.run import named_as
from ggml_ext.observe.samples import DEFAULT_TEXT, few_tokens, read_text


@dataclass(frozen=True)
class CalibrateResult:
    """``done``: blocks of this run. ``error``: mean relative error of their matrices' outputs, or None."""

    folder: Path
    plan: Plan
    windows: int
    done: int
    error: float | None
    seconds: float

    def summary(self) -> str:
        """One line for the end of the command."""
        error = "" if self.error is None else f", mean relative output error {self.error:.3g}"
        return (
            f"{self.folder}: {self.plan.blocks} blocks, {self.done} of them calibrated now, on "
            f"{self.windows} windows of {self.plan.ctx} tokens{error}, {self.seconds:.1f} s"
        )


def calibrate(
    request: Request, folder: Path, *, temporary: bool = False, warn: Warn = warn
) -> CalibrateResult:
    """Calibrates into ``folder``, made if need be, or goes on with what it holds.

    temporary: convert makes the folder and removes it with ``discard``. Killed at any moment, the same call
    goes on and leaves the same files, byte for byte on the same machine with one thread. Raises GgmlExtError
    for what cannot be done and for a folder with other files or another plan, or that another run is using.
    """
    started = time.monotonic()
    hf.require(request.source)
    inputs = [request.source, request.text, request.matrices, request.observed]
    check_folder(folder, inputs, folders=[request.observed])
    recipes.check(request.method, request.type_for, text=True, imatrix=False)
    require_device(request.device)
    bound_threads(request.threads)
    if request.source.is_dir():
        hf.check(request.source)
        for line in hf.remarks(request.source):
            warn(line)
    else:
        require_convertible(request)
    matrices = None if request.matrices is None else given.load(request.matrices)
    seen = open_observed(request, warn)
    content = b"" if request.text is None or seen is not None else read_text(request.text)
    sha256 = hashlib.sha256(content).hexdigest() if seen is None else seen.description.text
    with held(folder, temporary=temporary) as mine:
        source = _float_model(request, mine)
        if seen is None:
            with named_as(source.path, request.source):
                table = prepare.table_of(source.path, request.ctx)
            plan = plans.make(request, sha256, source, table)
        else:
            table = seen.table
            plan = plans.make(request, sha256, source, table, seen.description)
        found = plans.load(folder)
        if found is None:
            if matrices is not None:
                given.require_fit(matrices, ModelSites(source, table, plan.types))
            require_room(plan, source, table)
            plan.save(folder)
        else:
            plans.require_equal(found, plan, folder)
        if seen is None:
            seen = _observe(request, content, folder, source, warn)
        if plan.free and not content:
            content = read_text(request.text or DEFAULT_TEXT)
        plan = choose_types(plan, folder, source, seen, content, threads=request.threads, warn=warn)
        for line in recipes.remarks(request.method, sorted(set(plan.types.values()))):
            warn(line)
        if plan.without_grid:
            kinds = ", ".join(sorted({plan.types[name] for name in plan.without_grid}))
            warn(f"{plan.rounding} knows no levels of {kinds}: imatrix for {listed(plan.without_grid)}")
        errors = _run(request, folder, plan, source, seen, matrices, warn)
        done = len(errors)
    measured = [error for block in errors for error in block]
    mean = float(np.mean(measured)) if measured else None
    windows = seen.description.windows
    return CalibrateResult(folder, plan, windows, done, mean, time.monotonic() - started)


def require_convertible(request: Request) -> None:
    """Raises GgmlExtError where the request's GGUF file holds what its method would make wrong."""
    source = open_gguf(request.source)
    require_plain(source)
    if request.method.transform == "none":
        return
    for part, what, command in (
        (".kv_probe", "probes of a KV cache, which read", "kv-probe"),
        (".kv_cq", "codebooks of a KV cache, which are of", "kv-codebook"),
    ):
        if any(part in tensor.name for tensor in source.tensors):
            raise GgmlExtError(
                f"{request.source}: has {what} what a transform changes; convert the model without them, "
                f"then give the result its own with {command}"
            )


def observation_of(request: Request, source: Path) -> prepare.Request:
    """What a calibration observes, on the float GGUF file ``source``."""
    assert request.text is not None
    return prepare.Request(
        source,
        request.text,
        samples=request.method.samples or None,
        ctx=request.ctx,
        seed=request.seed,
        threads=request.threads or None,
        parse_special=request.parse_special,
        trust_remote_code=request.trust_remote_code,
        sample_rows=sample_rows(recipes.ACTIVATIONS[request.method.activation]),
    )


def open_observed(request: Request, warn: Warn) -> Observation | None:
    """The observation that the request names, if any, with all that its method needs. Raises GgmlExtError."""
    if request.observed is None:
        return None
    method = request.method
    asked = Asked(
        request.text, method.samples or None, request.ctx, request.seed, parse_special=request.parse_special
    )
    seen = open_finished(request.observed, request.source, asked, warn)
    rows = sample_rows(recipes.ACTIVATIONS[method.activation])
    require_figures(seen, rows, f"a conversion by {method.describe()}")
    remark = few_tokens(seen.n_tokens, request.ctx, seen.table.widest)
    if remark is not None:
        warn(remark)
    return seen


def discard(folder: Path) -> None:
    """Removes the folder of a finished calibration if convert made it and no other run uses it."""
    with suppress(GgmlExtError, OSError), held(folder, temporary=True) as mine:
        if mine.disposable and (folder / OBSERVATION).is_dir():
            with suppress(GgmlExtError):
                run.discard(folder / OBSERVATION)
        mine.discard()


def _float_model(request: Request, mine: Held) -> Source:
    """The model as float GGUF: the source itself, or made once per plan."""
    if not request.source.is_dir():
        return open_gguf(request.source)
    path = mine.folder / SOURCE
    with named_as(path, request.source):
        if plans.load(mine.folder) is None or not path.is_file():
            with atomic_path(path) as temporary:
                hf.to_gguf(request.source, temporary, trust_remote_code=request.trust_remote_code)
                mine.note_source(temporary)
        return open_gguf(path)


def _observe(request: Request, content: bytes, folder: Path, source: Source, warn: Warn) -> Observation:
    """An observation within the calibration's folder."""
    with named_as(source.path, request.source):
        run.observe(
            observation_of(request, source.path),
            folder / OBSERVATION,
            warn=warn,
            temporary=True,
            content=content,
        )
    return Observation(folder / OBSERVATION)


def _run(
    request: Request,
    folder: Path,
    plan: Plan,
    source: Source,
    seen: Observation,
    matrices: given.Matrices | None,
    warn: Warn,
) -> list[list[float]]:
    """Does the blocks that are missing; returns the errors of their matrices."""
    model = ModelSites(source, seen.table, plan.types)
    for line in model.remarks(plan.transform):
        warn(line)
    missing = plan.missing(folder)
    if plan.transform != "none" and len(missing) == plan.blocks:
        with work_folder(folder / "proof") as room:
            prove(model, room, plan.transform, threads=request.threads)
    if matrices is not None:
        matrices = given.in_gguf_order(matrices, source.path)
    work = Work(folder, plan, model, seen, matrices, request.threads)
    errors: list[list[float]] = []
    try:
        with track(len(missing), "calibration", "blocks") as advance:
            for index, found in _blocks(request, work, missing):
                errors.append(list(found.values()))
                advance(1, _progress(index, found))
        if plan.lacks_outside(folder):
            calibrate_outside(work, source)
    except KeyboardInterrupt:
        left = len(plan.missing(folder))
        warn(
            f"{folder}: {plan.blocks - left} of {plan.blocks} blocks are done; the same command goes on there"
        )
        raise
    return errors


def _blocks(request: Request, work: Work, missing: Sequence[int]) -> Iterator[tuple[int, dict[str, float]]]:
    """The blocks, as they are done, with the errors of their matrices."""
    if request.dask:
        from ggml_ext.methods.calibrate.cluster import calibrate_blocks

        yield from calibrate_blocks(request, work, missing)
        return
    for index in missing:
        yield index, calibrate_block(work, index)


def _progress(index: int, errors: Mapping[str, float]) -> str:
    if not errors:
        return f"block {index}: nothing to round"
    worst = max(errors, key=lambda name: errors[name])
    return (
        f"block {index}: mean error {np.mean(list(errors.values())):.3g}, "
        f"worst {worst.removeprefix(f'blk.{index}.')} {errors[worst]:.3g}"
    )
