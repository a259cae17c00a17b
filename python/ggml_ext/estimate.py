"""What a calibration will take: memory and disk from the configuration, time from rates measured here.

Rates come from small matrices in a few seconds: torch's products, the transform's solver, the rounding.
Solver and rounding are extrapolated by their operation counts, so times are good to a factor of two or so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from ggml_ext import hf, plan, recipes, transforms
from ggml_ext.calibrate import DTYPES, batch_size, trains
from ggml_ext.calibration_plan import Request
from ggml_ext.device import require_device
from ggml_ext.hidden import free_bytes
from ggml_ext.mixes import BODY
from ggml_ext.rounding import round_matrix
from ggml_ext.rounding.hessian import Hessian
from ggml_ext.samples import enough
from ggml_ext.sites import ActivationSpec, Linear, Site, SiteStats
from ggml_ext.skeleton import open_skeleton

_N = 512  # order of the matrices that rates are measured on
_LEARNED_STEPS = 200  # rounding.learned's default
_BACKWARD = 3  # a training step in forward passes


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
        table.add_row("memory", f"peak on {self.device}", _size(self.memory))
        for what, n_bytes in self.disk.items():
            table.add_row("disk", what, _size(n_bytes))
        table.add_row("disk", "all of it", _size(sum(self.disk.values())))
        for stage, seconds in self.seconds.items():
            table.add_row("time", stage, _duration(seconds))
        table.add_row("time", "all stages", _duration(sum(self.seconds.values())))
        return table

    def summary(self) -> str:
        """One line for the end of the command."""
        needed = sum(self.disk.values())
        enough = (
            "" if needed <= self.free else f", of which only {_size(self.free)} are free: make room first"
        )
        return (
            f"{self.folder}: would take {_size(self.memory)} of memory, {_size(needed)} of disk{enough}, "
            f"about {_duration(sum(self.seconds.values()))}; nothing was written"
        )


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def estimate(request: Request, folder: Path) -> Estimate:
    """Estimates the calibration of ``request`` into ``folder`` without writing anything.

    Counts the windows that the request asks for; a short text gives fewer. Raises GgmlExtError as the
    calibration itself would for options, model and family.
    """
    method = request.method
    hf.require(request.source)
    recipes.check(method, request.type_for, folder=request.source.is_dir(), text=True, imatrix=False)
    require_device(request.device)
    weights = hf.check(request.source)
    steps = _LEARNED_STEPS if method.rounding == "learned" else 0
    training = trains(method)
    steps += method.train_steps if training else 0
    dtype = DTYPES[request.dtype]
    found = plan.plan(
        request.source,
        samples=method.samples or enough(request.ctx, plan.widest(open_skeleton(request.source))),
        context=request.ctx,
        batch=batch_size(request.ctx),
        dtype=dtype,
        training=steps > 0,
    )
    device = torch.device(request.device)
    squares = found.statistics_macs / found.n_tokens  # sum over all sites of n^2
    forward = found.forward_macs * _seconds_per_mac(device, dtype)
    seconds = {"statistics": forward + found.statistics_macs * _seconds_per_mac(device, torch.float32)}
    if method.transform != "none":
        # The solver multiplies matrices of order n with factors of order sqrt(n).
        width = (squares / found.n_blocks / 4) ** 0.5
        seconds["transforms"] = _solving(method) * squares / _N**2 * (width / _N) ** 0.5
    if steps:
        seconds["training"] = steps * _BACKWARD * forward * request.ctx / found.n_tokens
    seconds["rounding"] = found.n_weights * _rounding(method, request.threads) / _N**2
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return Estimate(
        folder=folder,
        device=request.device,
        memory=found.peak,
        disk={
            "source.gguf": hf.n_float_bytes(request.source, weights),
            "hidden states": found.disk_activations,
            "block files": found.disk_checkpoints,
        },
        free=free_bytes(existing),
        seconds=seconds,
    )


def _timed(work: Callable[[], object]) -> float:
    """Seconds of one call, the first not counted."""
    work()
    calls, started = 0, time.monotonic()
    while time.monotonic() - started < 0.2:
        work()
        calls += 1
    return (time.monotonic() - started) / calls


def _seconds_per_mac(device: torch.device, dtype: torch.dtype) -> float:
    a = torch.ones(2 * _N, 2 * _N, device=device, dtype=dtype)

    def work() -> None:
        float((a @ a)[0, 0])  # waits for a GPU

    return _timed(work) / (2 * _N) ** 3


def _moments() -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and weights of plausible shape: [2 n, n] and [n, n]."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(2 * _N, _N, generator=random), torch.randn(_N, _N, generator=random)


def _solving(method: recipes.Method) -> float:
    """Seconds to solve the transform of one site with _N channels and one matrix."""
    x, w = _moments()
    hessian = x.T @ x / len(x)
    site = Site("attn_in", "probe", _N, (Linear("probe.weight", w, np.arange(_N)),), None)
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
    how = "gptq" if method.rounding == "learned" else method.rounding
    return _timed(lambda: round_matrix(w.numpy(), type_name, how, Hessian(hessian), threads=threads))
