"""ggml-ext calibrate: solves and rounds a model block by block, in a folder that can be gone on with.

The hidden states that enter a block lie on disk. Every block is run once on them, unrounded, which gives its
statistics and the next block's hidden states; its transforms are solved, folded, and its matrices rounded.
What comes of it is one file per block. Memory holds one block, disk two sets of hidden states.

The folder: plan.json (calibration_plan.py), source.gguf (the float model, which convert reads too),
hidden-NNN.bin (hidden.py), block-NNN.safetensors (block_file.py), lock.
"""

from __future__ import annotations

import fcntl
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ggml_ext import __version__, hf, native, paths, recipes, rules, transforms
from ggml_ext import calibration_plan as plans
from ggml_ext.atomic import atomic_path
from ggml_ext.block_file import block_path, save
from ggml_ext.blocks import Block, BlockModel
from ggml_ext.blockwise import Job, encode_block
from ggml_ext.calibration_plan import Plan
from ggml_ext.errors import GgmlExtError
from ggml_ext.hidden import Hidden
from ggml_ext.importance import text_sha256
from ggml_ext.llama import Model
from ggml_ext.progress import track
from ggml_ext.recipes import Method
from ggml_ext.sites import ActivationSpec, SiteKind, SiteStats, SiteTransform, identity
from ggml_ext.source import Source, open_gguf
from ggml_ext.transforms import TransformRequest

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}

_BATCH_TOKENS = 4096  # hidden states that go through a block at a time

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """A calibration. ``text``: the calibration text. ``ctx``: tokens per window. ``device``: "cpu" or "cuda".
    ``dtype``: one of DTYPES, what the model computes in. ``threads``: 0 for all; the result does not depend
    on it where sums do not."""

    source: Path
    text: Path
    method: Method
    type_for: Sequence[tuple[str, str]] = ()
    keep: Sequence[str] = ()
    ctx: int = 512
    seed: int = 0
    device: str = "cpu"
    dtype: str = "f32"
    threads: int = 0


@dataclass(frozen=True)
class CalibrateResult:
    """``done``: blocks of this run. ``error``: mean relative error of their matrices' outputs, or None."""

    folder: Path
    plan: Plan
    done: int
    error: float | None
    seconds: float

    def summary(self) -> str:
        """One line for the end of the command."""
        error = "" if self.error is None else f", mean relative output error {self.error:.3g}"
        return (
            f"{self.folder}: {self.plan.blocks} blocks, {self.done} of them calibrated now, on "
            f"{self.plan.windows} windows of {self.plan.ctx} tokens{error}, {self.seconds:.1f} s"
        )


def _warn(line: str) -> None:
    print(f"ggml-ext: {line}", file=sys.stderr, flush=True)


def calibrate(request: Request, folder: Path, *, warn: Warn = _warn) -> CalibrateResult:
    """Calibrates into ``folder``, made if need be, or goes on with what it holds.

    Killed at any moment, the same call goes on and leaves the same files, byte for byte on the same machine
    with one thread. Raises GgmlExtError for what cannot be done, for a folder with another plan, and for one
    that another run is using.
    """
    started = time.monotonic()
    recipes.check(request.method, request.type_for, folder=request.source.is_dir(), text=True, imatrix=False)
    files = plans.model_files(request.source)
    sha256 = text_sha256(request.text)
    torch.manual_seed(request.seed)
    with _locked(folder):
        source = _float_model(request.source, folder)
        tokens = windows(source.path, request.text, request, warn)
        with _named_as(source.path, request.source):
            model = BlockModel(
                request.source, gguf=source, device=request.device, dtype=DTYPES[request.dtype]
            )
        plan = _plan(request, files, sha256, len(tokens), source, model)
        found = plans.load(folder)
        if found is None:
            plan.save(folder)
        else:
            plans.require_equal(found, plan, folder)
        for line in recipes.remarks(request.method, sorted(set(plan.types.values()))):
            warn(line)
        errors = _run(request, folder, plan, source, model, tokens, warn)
        done = len(errors)
    mean = float(np.mean([error for block in errors for error in block])) if done else None
    return CalibrateResult(folder, plan, done, mean, time.monotonic() - started)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder, for this process alone; leftovers of a killed run are removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as exc:
        raise GgmlExtError(f"{folder}: {exc.strerror}; choose another folder") from exc
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise GgmlExtError(f"{folder}: another run is using it; wait for it or stop it") from exc
        for leftover in folder.glob(".*.part"):
            leftover.unlink()
        yield


@contextmanager
def _named_as(made: Path, origin: Path) -> Iterator[None]:
    """Errors about a file that we made name what it was made from."""
    try:
        yield
    except GgmlExtError as exc:
        raise GgmlExtError(str(exc).replace(str(made), str(origin))) from exc


def _float_model(origin: Path, folder: Path) -> Source:
    """The model as float GGUF, made once per plan."""
    path = folder / plans.SOURCE
    with _named_as(path, origin):
        if plans.load(folder) is None or not path.is_file():
            with atomic_path(path) as temporary:
                hf.to_gguf(origin, temporary)
        return open_gguf(path)


def windows(model: Path, text: Path, request: Request, warn: Warn) -> NDArray[np.int64]:
    """Token windows int64 [n, ctx] of the text, n at most ``samples``, spread evenly over it.

    The text's tokens are cut into n equal parts and a window is drawn within each, so windows do not overlap.
    BOS stands at the start of each where the model wants one, as in llama-perplexity and in chat. Raises
    GgmlExtError for a text shorter than one window.
    """
    with Model(model, weights=False) as loaded:
        tokens = loaded.tokenize(text.read_bytes())
        bos = loaded.bos
    ctx, samples = request.ctx, request.method.samples
    n = min(samples, len(tokens) // ctx)
    if n == 0:
        raise GgmlExtError(
            f"{text}: only {len(tokens)} tokens, and a window needs {ctx}; "
            "give a longer text or a smaller --ctx"
        )
    if n < samples:
        warn(f"{text}: {len(tokens)} tokens give {n} windows of {ctx} tokens, not {samples}")
    random = np.random.default_rng(request.seed)
    edges = np.linspace(0, len(tokens), n + 1).astype(np.int64)
    starts = [int(random.integers(low, high - ctx + 1)) for low, high in pairwise(edges)]
    cut = np.stack([tokens[start : start + ctx] for start in starts]).astype(np.int64)
    if bos is not None:
        cut[:, 0] = bos
    return cut


def _plan(
    request: Request,
    files: list[list[Any]],
    sha256: str,
    n_windows: int,
    source: Source,
    model: BlockModel,
) -> Plan:
    method = request.method
    asked = rules.compile_rules(method.type_name, request.type_for, request.keep)
    shapes = [tensor.shape for tensor in source.tensors]
    choices = rules.choose(shapes, source.arch, asked, native.block_size)
    activation = recipes.ACTIVATIONS[method.activation]
    return Plan(
        source=files,
        text=sha256,
        samples=method.samples,
        windows=n_windows,
        ctx=request.ctx,
        seed=request.seed,
        base=method.type_name,
        types={choice.name: choice.target for choice in choices},
        fallbacks={choice.name: choice.fallback_from for choice in choices if choice.fallback_from},
        without_effect=rules.without_effect(shapes, source.arch, asked),
        transform=method.transform,
        transform_bits=method.transform_bits,
        rounding=method.rounding,
        activation=None if activation is None else list(activation),
        blocks=model.n_blocks,
        hidden=model.hidden_size,
        device=request.device,
        dtype=request.dtype,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    library = paths.library("ggml-base").resolve().stat()
    return {
        "ggml-ext": __version__,
        "library": f"{library.st_size} bytes of {library.st_mtime_ns}",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("numpy", "torch", "transformers")},
    }


def _run(
    request: Request,
    folder: Path,
    plan: Plan,
    source: Source,
    model: BlockModel,
    tokens: NDArray[np.int64],
    warn: Warn,
) -> list[list[float]]:
    """Does the blocks that are missing and returns the errors of their matrices."""
    missing = plan.missing(folder)
    errors: list[list[float]] = []
    shape = (plan.windows, plan.ctx, plan.hidden)
    states = [Hidden(folder, index, shape, DTYPES[plan.dtype]) for index in range(plan.blocks + 1)]
    if missing == []:
        return errors
    try:
        if missing[0] == 0 and not states[0].exists():
            with states[0].writing() as put:
                for batch in torch.from_numpy(tokens).split(_batch_size(plan.ctx)):
                    put(model.embed(batch))
        with track(len(missing), "calibration", "blocks") as advance:
            for index in missing:
                found = _block(request, folder, plan, source, model.load(index), states)
                errors.append(list(found.values()))
                worst = max(found, key=lambda name: found[name])
                advance(
                    1,
                    f"block {index}: mean error {np.mean(errors[-1]):.3g}, "
                    f"worst {worst.removeprefix(f'blk.{index}.')} {found[worst]:.3g}",
                )
    except KeyboardInterrupt:
        left = len(plan.missing(folder))
        warn(
            f"{folder}: {plan.blocks - left} of {plan.blocks} blocks are done; the same command goes on there"
        )
        raise
    return errors


def _batch_size(ctx: int) -> int:
    return max(1, _BATCH_TOKENS // ctx)


def _block(
    request: Request, folder: Path, plan: Plan, source: Source, block: Block, states: Sequence[Hidden]
) -> dict[str, float]:
    """Calibrates one block, writes its file, and returns the errors of its matrices."""
    before, after = states[block.index], states[block.index + 1]
    size = _batch_size(plan.ctx)
    torch.manual_seed(plan.seed)
    with after.writing() as put:
        stats = block.collect(before.batches(size), put)
    solved = _solve(request, plan, block, stats, before, after)
    packed, findings = encode_block(
        block.sites, stats, solved, source, Job(plan.types, plan.rounding, request.threads)
    )
    save(block_path(folder, block.index), packed, findings)
    before.remove()
    if block.index == plan.blocks - 1:
        after.remove()
    return findings.errors


def _solve(
    request: Request,
    plan: Plan,
    block: Block,
    stats: dict[SiteKind, SiteStats],
    before: Hidden,
    after: Hidden,
) -> dict[SiteKind, SiteTransform]:
    if plan.transform == "none":
        return {kind: identity(site.n) for kind, site in block.sites.items()}
    wanted = TransformRequest(
        name=plan.transform,
        types=plan.types,
        activation=ActivationSpec(*(plan.activation or ())),
        budget_bits=plan.transform_bits,
        seed=plan.seed,
    )
    solved = {kind: transforms.solve(site, stats[kind], wanted) for kind, site in block.sites.items()}
    return solved
