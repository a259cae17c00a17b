"""ggml-ext calibrate: solves and rounds a model block by block, in a folder that can be gone on with.

The hidden states that enter a block lie on disk. Every block is run once on them, unrounded, which gives its
statistics and the next block's hidden states; its transforms are solved, folded, and its matrices rounded.
What comes of it is one file per block. Memory holds one block, disk two sets of hidden states.

The folder: plan.json (calibration_plan.py), source.gguf (the float model, which convert reads too),
hidden-NNN.bin (hidden.py), block-NNN.safetensors (block_file.py), lock.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ggml_ext import calibration_plan as plans
from ggml_ext import given, hf, recipes, transforms
from ggml_ext import plan as cost
from ggml_ext.atomic import atomic_path
from ggml_ext.block_file import block_path, save
from ggml_ext.blocks import Block, BlockModel
from ggml_ext.blockwise import Job, encode_block
from ggml_ext.calibration_folder import held
from ggml_ext.calibration_plan import Plan, Request
from ggml_ext.device import bound_threads, require_device
from ggml_ext.errors import GgmlExtError, listed
from ggml_ext.hidden import Hidden
from ggml_ext.importance import read_text
from ggml_ext.outputs import check_folder
from ggml_ext.owned_folder import SOURCE, Held
from ggml_ext.progress import track
from ggml_ext.recipes import Method
from ggml_ext.rounding.learned import Learned, Matrix, refine_block
from ggml_ext.samples import enough, few_tokens, windows
from ggml_ext.sites import ActivationSpec, SiteKind, SiteStats, SiteTransform
from ggml_ext.skeleton import open_skeleton
from ggml_ext.source import Source, open_gguf
from ggml_ext.transforms import TransformRequest, fake_quant_activation

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}

_BATCH_TOKENS = 4096  # hidden states that go through a block at a time

Warn = Callable[[str], None]


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


def calibrate(
    request: Request, folder: Path, *, temporary: bool = False, warn: Warn = _warn
) -> CalibrateResult:
    """Calibrates into ``folder``, made if need be, or goes on with what it holds.

    temporary: convert makes the folder and removes it with ``discard``. Killed at any moment, the same call
    goes on and leaves the same files, byte for byte on the same machine with one thread. Raises GgmlExtError
    for what cannot be done and for a folder with other files or another plan, or that another run is using.
    """
    started = time.monotonic()
    hf.require(request.source)
    check_folder(folder, [request.source, request.text, request.matrices])
    recipes.check(request.method, request.type_for, folder=request.source.is_dir(), text=True, imatrix=False)
    require_device(request.device)
    bound_threads(request.threads)
    hf.check(request.source)
    for line in hf.remarks(request.source):
        warn(line)
    skeleton = open_skeleton(request.source)  # an unknown family is refused before the model is converted
    widest = cost.widest(skeleton)
    if not request.method.samples:
        method = replace(request.method, samples=enough(request.ctx, widest))
        request = replace(request, method=method)
    content = read_text(request.text)
    sha256 = hashlib.sha256(content).hexdigest()
    torch.manual_seed(request.seed)
    with held(folder, temporary=temporary) as mine:
        source = _float_model(request.source, mine, trust_remote_code=request.trust_remote_code)
        tokens = windows(
            source.path,
            request.text,
            content=content,
            ctx=request.ctx,
            samples=request.method.samples,
            seed=request.seed,
            warn=warn,
        )
        with _named_as(source.path, request.source):
            model = BlockModel(
                request.source, gguf=source, device=request.device, dtype=DTYPES[request.dtype]
            )
        plan = plans.make(
            request, sha256, len(tokens), source, blocks=model.n_blocks, hidden=model.hidden_size
        )
        found = plans.load(folder)
        if found is None:
            plan.save(folder)
        else:
            plans.require_equal(found, plan, folder)
        for line in recipes.remarks(request.method, sorted(set(plan.types.values()))):
            warn(line)
        remark = few_tokens(tokens.size, request.ctx, widest)
        if remark is not None and plan.rounding in ("gptq", "learned"):
            warn(remark)
        if plan.without_grid:
            kinds = ", ".join(sorted({plan.types[name] for name in plan.without_grid}))
            warn(f"{plan.rounding} knows no levels of {kinds}: imatrix for {listed(plan.without_grid)}")
        errors = _run(request, folder, plan, source, model, tokens, warn)
        done = len(errors)
    mean = float(np.mean([error for block in errors for error in block])) if done else None
    return CalibrateResult(folder, plan, done, mean, time.monotonic() - started)


@contextmanager
def _named_as(made: Path, origin: Path) -> Iterator[None]:
    """Errors about a file that we made name what it was made from."""
    try:
        yield
    except GgmlExtError as exc:
        raise GgmlExtError(str(exc).replace(str(made), str(origin))) from exc


def discard(folder: Path) -> None:
    """Removes the folder of a finished calibration if convert made it and no other run uses it."""
    with suppress(GgmlExtError, OSError), held(folder, temporary=True) as mine:
        mine.discard()


def _float_model(origin: Path, mine: Held, *, trust_remote_code: bool) -> Source:
    """The model as float GGUF, made once per plan."""
    path = mine.folder / SOURCE
    with _named_as(path, origin):
        if plans.load(mine.folder) is None or not path.is_file():
            with atomic_path(path) as temporary:
                hf.to_gguf(origin, temporary, trust_remote_code=trust_remote_code)
                mine.note_source(temporary)
        return open_gguf(path)


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
    for done in states[: missing[0]] if missing else states:
        done.remove()  # left by a run that was killed before it could
    if missing == []:
        return errors
    matrices = None if request.matrices is None else given.load(request.matrices, plan.blocks)
    try:
        if missing[0] == 0 and not states[0].exists():
            with states[0].writing() as put:
                for batch in torch.split(torch.from_numpy(tokens), batch_size(plan.ctx)):
                    put(model.embed(batch))
        with track(len(missing), "calibration", "blocks") as advance:
            for index in missing:
                found = _block(request, folder, plan, source, model.load(index), states, matrices)
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


def batch_size(ctx: int) -> int:
    """Windows that go through a block at a time."""
    return max(1, _BATCH_TOKENS // ctx)


def _block(
    request: Request,
    folder: Path,
    plan: Plan,
    source: Source,
    block: Block,
    states: Sequence[Hidden],
    matrices: given.Matrices | None,
) -> dict[str, float]:
    """Calibrates one block, writes its file, and returns the errors of its matrices."""
    before, after = states[block.index], states[block.index + 1]
    size = batch_size(plan.ctx)
    torch.manual_seed(plan.seed)
    with after.writing() as put:
        stats = block.collect(before.batches(size), put)
    device = torch.device(plan.device)
    if matrices is not None:
        solved = given.sites(matrices, block, clips=plan.activation is not None)
    else:
        solved = _solve(plan, block, stats)
    if matrices is None and trains(request.method):
        wanted = _transform_request(plan)
        solved = transforms.train(block, solved, before.on(device, 1), after.on(device, 1), wanted)

    def refine(matrices: Sequence[Matrix]) -> Learned:
        return refine_block(
            block,
            matrices,
            before.on(device, 1),
            after.on(device, 1),
            {kind: _rounding_of_inputs(transform, _activation(plan)) for kind, transform in solved.items()},
            seed=plan.seed,
        )

    learned = refine if plan.rounding == "learned" else None
    job = Job(plan.types, plan.rounding, request.threads, learned)
    packed, findings = encode_block(block.sites, stats, solved, source, job)
    if matrices is not None:
        packed |= given.cache_tensors(matrices, block)
    save(block_path(folder, block.index), packed, findings)
    before.remove()
    if block.index == plan.blocks - 1:
        after.remove()
    return findings.errors


def trains(method: Method) -> bool:
    """Whether the transforms are trained on the block's output after they have been solved."""
    return method.transform == "flatquant" and method.train_steps > 0


def _activation(plan: Plan) -> ActivationSpec:
    return ActivationSpec() if plan.activation is None else ActivationSpec(*plan.activation)


def _solve(plan: Plan, block: Block, stats: dict[SiteKind, SiteStats]) -> dict[SiteKind, SiteTransform]:
    wanted = _transform_request(plan)
    budgets = transforms.split_budget(block.sites, plan.transform_bits)
    return {
        kind: transforms.solve(site, stats[kind], replace(wanted, budget_bits=budgets[kind]))
        for kind, site in block.sites.items()
    }


def _transform_request(plan: Plan) -> TransformRequest:
    return TransformRequest(
        name=plan.transform,
        types=plan.types,
        activation=_activation(plan),
        rounding=plan.rounding,
        train_steps=plan.train_steps,
        seed=plan.seed,
    )


def _rounding_of_inputs(transform: SiteTransform, activation: ActivationSpec) -> Callable[[Tensor], Tensor]:
    """What rounding activations in the transformed basis does to them in their own."""

    def apply(x: Tensor) -> Tensor:
        return transform.invert(fake_quant_activation(transform.apply(x), activation, transform.clip))

    return apply
