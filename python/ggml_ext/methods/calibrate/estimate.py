"""What a calibration will take. Observing is timed on the model itself (observe/estimate.py); the rates of
solving and rounding come from small matrices, extrapolated by their operation counts, good to a factor of
two or so."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from ggml_ext import recipes
from ggml_ext.core.owned_folder import SOURCE
from ggml_ext.core.progress import duration_text, size_text
from ggml_ext.gguf.source import open_gguf
from ggml_ext.hf import folder as hf
from ggml_ext.methods import transforms
from ggml_ext.methods.calibrate import given
from ggml_ext.methods.calibrate.device import require_device
from ggml_ext.methods.calibrate.folder import OBSERVATION
from ggml_ext.methods.calibrate.plan import Request
from ggml_ext.methods.calibrate.run import observation_of, open_observed, require_convertible
from ggml_ext.methods.rounding import round_matrix
from ggml_ext.methods.rounding.hessian import Hessian
from ggml_ext.methods.sites import ActivationSpec, Linear, Site, SiteStats
from ggml_ext.observe import estimate as observing
from ggml_ext.observe.layout import FLOAT
from ggml_ext.runtime.llama import Model
from ggml_ext.types import losses
from ggml_ext.types.mixes import BODY

_N = 512  # order of the matrices that rates are measured on
_WORKSPACE = 1 << 29  # Python, torch and its kernels' buffers
_COPIES = 3  # of a block's matrices: as they are, transformed, encoded
_SQUARES = 9  # n x n float64 matrices while the widest site is solved and rounded
_BITS = 6.5625  # per weight in block files at most: Q6_K
_LOSS_TOKENS = losses.WINDOWS * losses.CTX


@dataclass(frozen=True)
class Estimate:
    """``memory``: bytes at the peak, on the device that computes. ``disk``: what -> bytes, all of it at once.
    ``free``: bytes free on that disk. ``seconds``: stage -> time."""

    folder: Path
    device: str
    memory: int
    disk: dict[str, int]
    free: int
    seconds: dict[str, float]

    def table(self) -> Table:
        """The figures as a terminal table."""
        table = Table("", "what", "needs")
        table.add_row("memory", f"peak on {self.device}", size_text(self.memory))
        for what, n_bytes in self.disk.items():
            table.add_row("disk", what, size_text(n_bytes))
        table.add_row("disk", "all of it", size_text(sum(self.disk.values())))
        for stage, seconds in self.seconds.items():
            table.add_row("time", stage, duration_text(seconds))
        table.add_row("time", "all stages", duration_text(sum(self.seconds.values())))
        return table

    def summary(self) -> str:
        """One line for the end of the command."""
        needed = sum(self.disk.values())
        enough = (
            "" if needed <= self.free else f", of which only {size_text(self.free)} are free: make room first"
        )
        return (
            f"{self.folder}: would take {size_text(self.memory)} of memory, {size_text(needed)} of "
            f"disk{enough}, about {duration_text(sum(self.seconds.values()))}; nothing was written"
        )


def estimate(request: Request, folder: Path) -> Estimate:
    """Estimates the calibration of ``request`` into ``folder``; nothing of it stays.

    Raises GgmlExtError as the calibration itself would for options, model, text and matrices that are none.
    """
    method = request.method
    hf.require(request.source)
    recipes.check(method, request.type_for, text=True, imatrix=False)
    require_device(request.device)
    if not request.source.is_dir():
        require_convertible(request)
    if request.matrices is not None:
        given.load(request.matrices)
    finished = open_observed(request, _silent)
    if finished is None:
        seen = observing.estimate(observation_of(request, request.source), folder / OBSERVATION, warn=_silent)
        sizes, memory, disk, seconds = seen.sizes, seen.memory, seen.disk, {"observing": seen.seconds}
        whole, token = seen.mapped, seen.forward / (seen.windows * seen.ctx)
    else:
        made = finished.folder / SOURCE if request.source.is_dir() else request.source
        sizes, memory, seconds = observing.sizes_of(finished.table, open_gguf(made)), 0, {}
        disk = {SOURCE: made.stat().st_size} if request.source.is_dir() else {}
        whole = sum(path.stat().st_size for path in open_gguf(made).files)
        token = _pass(made, request.threads) / _LOSS_TOKENS if method.allocates else 0.0
    rounding = sizes.weights * _rounding(method, request.threads) / _N**2
    if method.allocates:
        seconds["losses"] = (sizes.matrices + 2) * _LOSS_TOKENS * token + rounding
        memory = max(memory, whole + _WORKSPACE)
    if method.transform != "none":
        # The solver multiplies matrices of order n with factors of order sqrt(n).
        width = sizes.squares**0.5 / max(sizes.sites, 1) ** 0.5
        seconds["transforms"] = _solving(method) * sizes.squares / _N**2 * (width / _N) ** 0.5
    seconds["rounding"] = rounding
    # What is outside the blocks is rounded in slabs, whose bytes are put together.
    matrices = max(_COPIES * FLOAT * sizes.block, int(2 * _BITS / 8 * sizes.outside))
    solving = _WORKSPACE + matrices + _SQUARES * 8 * sizes.widest**2
    return Estimate(
        folder=folder,
        device=request.device,
        memory=max(memory, solving),
        disk={**disk, "block files": int(sizes.weights * _BITS / 8)},
        free=observing.free_bytes(folder),
        seconds=seconds,
    )


def _silent(_line: str) -> None:
    """The calibration itself says it."""


def _timed(work: Callable[[], object]) -> float:
    """Seconds of one call, the first not counted."""
    work()
    calls, started = 0, time.monotonic()
    while time.monotonic() - started < 0.2:
        work()
        calls += 1
    return (time.monotonic() - started) / calls


def _pass(model: Path, threads: int) -> float:
    """Seconds in which the model reads the windows that losses are measured on."""
    with Model(model, threads=threads or None) as loaded:
        loaded.start(n_ctx=losses.CTX, n_seq=losses.WINDOWS, n_batch=_LOSS_TOKENS)
        positions = np.tile(np.arange(losses.CTX, dtype=np.int32), losses.WINDOWS)
        sequences = np.repeat(np.arange(losses.WINDOWS, dtype=np.int32), losses.CTX)
        tokens = np.zeros(_LOSS_TOKENS, np.int32)

        def read() -> None:
            loaded.clear()
            loaded.run(tokens, positions, sequences)

        return _timed(read)


def _moments() -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and weights of plausible shape: [2 n, n] and [n, n]."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(2 * _N, _N, generator=random), torch.randn(_N, _N, generator=random)


def _solving(method: recipes.Method) -> float:
    """Seconds to solve the transform of one site with _N channels and one matrix."""
    x, w = _moments()
    hessian = x.T @ x / len(x)
    site = Site("probe", _N, (Linear("probe.weight", w),), None)
    stats = SiteStats(hessian, x.abs().amax(0), x, len(x))
    activation = recipes.ACTIVATIONS[method.activation]
    request = transforms.TransformRequest(
        method.transform, {"probe.weight": "q4_0"}, rounding=method.rounding
    )
    if activation is not None:
        request = replace(request, activation=ActivationSpec(*activation))
    started = time.monotonic()
    transforms.solve(site, stats, request)
    return time.monotonic() - started


def _rounding(method: recipes.Method, threads: int) -> float:
    """Seconds to round a matrix of _N x _N weights to the method's type."""
    x, w = _moments()
    hessian = (x.T @ x / len(x)).double()
    type_name = BODY.get(method.type_name, method.type_name)
    return _timed(
        lambda: round_matrix(w.numpy(), type_name, method.rounding, Hessian(hessian), threads=threads)
    )
