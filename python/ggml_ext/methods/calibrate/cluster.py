"""A calibration's blocks on a Dask cluster.

The scheduler sends numbers of blocks, no data: every worker reads the model, the observation and the plan,
and writes the block's file, under the same paths as the command itself (one machine, or a disk that all of
them share). So a worker that dies has lost the block it was at, which goes to another one, and a block's
bytes do not depend on who made it.
"""

from __future__ import annotations

import asyncio
import importlib
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.source import open_gguf
from ggml_ext.methods.calibrate import given
from ggml_ext.methods.calibrate import plan as plans
from ggml_ext.methods.calibrate.allocate import allocated
from ggml_ext.methods.calibrate.blocks import Work, calibrate_block
from ggml_ext.methods.calibrate.device import bound_threads
from ggml_ext.methods.calibrate.plan import Request
from ggml_ext.methods.model_sites import ModelSites
from ggml_ext.observe.reader import Observation

_CONNECT_SECONDS = 20
_LOOK_SECONDS = 5
_PATIENCE_SECONDS = 60  # without any worker


@dataclass(frozen=True)
class _Task:
    """What a worker needs to know, as it travels. ``threads``: of a worker."""

    folder: str
    model: str
    observation: str
    matrices: str | None
    versions: tuple[tuple[str, str], ...]
    threads: int


def calibrate_blocks(
    request: Request, work: Work, missing: Sequence[int]
) -> Iterator[tuple[int, dict[str, float]]]:
    """The blocks with the errors of their matrices, as they are done, by the workers of ``request.dask``.

    Raises GgmlExtError where Dask is missing, nobody answers, no worker is left, or a worker cannot do a
    block.
    """
    try:
        dask: Any = importlib.import_module("distributed")
    except ImportError as exc:
        raise GgmlExtError("--dask: Dask is not installed; pip install 'ggml-ext[dask]'") from exc
    task = _Task(
        str(work.folder.resolve()),
        str(work.model.source.path.resolve()),
        str(work.seen.folder.resolve()),
        None if request.matrices is None else str(request.matrices.resolve()),
        tuple(sorted(plans.versions().items())),
        request.threads or 1,
    )
    try:
        client = dask.Client(request.dask, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError) as exc:
        raise GgmlExtError(
            f"--dask {request.dask}: no scheduler answers ({exc}); start one with dask scheduler, and "
            "workers with dask worker"
        ) from exc
    with client:
        waiting = {client.submit(_on_worker, task, index, pure=False): index for index in missing}
        try:
            while waiting:
                for future in _finished(dask, client, list(waiting), request.dask):
                    index = waiting.pop(future)
                    yield index, _result(dask, future, index)
        finally:
            client.cancel(list(waiting))


def _finished(dask: Any, client: Any, futures: list[Any], address: str | None) -> list[Any]:
    """The futures that are done, at least one. Raises GgmlExtError where nobody works at them."""
    alone = 0
    while True:
        try:
            return list(dask.wait(futures, timeout=_LOOK_SECONDS, return_when="FIRST_COMPLETED").done)
        except asyncio.TimeoutError:
            alone = 0 if client.scheduler_info()["workers"] else alone + 1
        if alone * _LOOK_SECONDS >= _PATIENCE_SECONDS:
            raise GgmlExtError(
                f"--dask {address}: has no workers; start some with dask worker {address} --nthreads 1, and "
                "the same command goes on"
            )


def _result(dask: Any, future: Any, index: int) -> dict[str, float]:
    try:
        errors: dict[str, float] = future.result()
    except dask.KilledWorker as exc:
        raise GgmlExtError(
            f"block {index}: its workers ended, one after the other; look at their logs, for memory above all"
        ) from exc
    return errors


def _on_worker(task: _Task, index: int) -> dict[str, float]:
    """One block, in the worker's process."""
    bound_threads(task.threads)
    return calibrate_block(_opened(task), index)


@lru_cache(maxsize=1)
def _opened(task: _Task) -> Work:
    """The work of a task, kept from one block to the next.

    Raises GgmlExtError for a folder that the worker does not see and for a worker with other versions of what
    the result depends on.
    """
    host, own = socket.gethostname(), plans.versions()
    other = [f"{name} {own[name]}, not {wanted}" for name, wanted in task.versions if own[name] != wanted]
    if other:
        raise GgmlExtError(f"a worker on {host} has {', '.join(other)}; install the same there")
    folder = Path(task.folder)
    plan = plans.load(folder)
    if plan is None:
        raise GgmlExtError(f"a worker on {host} does not see {folder}; workers need the same paths")
    plan, source = allocated(plan, folder), open_gguf(Path(task.model))
    seen = Observation(Path(task.observation))
    matrices = None
    if task.matrices is not None:
        matrices = given.in_gguf_order(given.load(Path(task.matrices)), source.path)
    return Work(folder, plan, ModelSites(source, seen.table, plan.types), seen, matrices, task.threads)
