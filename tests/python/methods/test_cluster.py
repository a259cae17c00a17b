"""Blocks on a Dask cluster of worker processes on this machine.

What would break these: bytes that depend on who makes a block, a worker's death that loses more than the
block it was at, a command that waits for ever where nobody works.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from distributed import Client

import models
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.methods.calibrate import cluster
from ggml_ext.methods.calibrate.plan import Request
from ggml_ext.methods.calibrate.run import calibrate
from ggml_ext.recipes import Method

METHOD = Method("q4_0", "none", "gptq", samples=4)


@contextmanager
def dask_cluster(workers: int, folder: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler's address and its workers, each a process of one thread that nobody starts again."""
    place = folder / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    command += ["--port", "0", "--no-dashboard", "--scheduler-file", str(place), "--host", "127.0.0.1"]
    running = [_started(command, folder)]
    try:
        for _ in range(600):
            if place.exists() and place.stat().st_size:
                break
            time.sleep(0.1)
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(place)]
        worker += ["--nthreads", "1", "--no-dashboard", "--no-nanny", "--local-directory", str(folder)]
        mine = [_started(worker, folder) for _ in range(workers)]
        running += mine
        with Client(scheduler_file=str(place)) as client:
            if workers:
                client.wait_for_workers(workers, timeout=60)
            address = client.scheduler.address
        yield address, mine
    finally:
        for process in reversed(running):
            process.kill()
            process.wait()


def _started(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with (folder / "dask.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> Request:
    torch.set_num_threads(1)
    text = tmp_path_factory.mktemp("text") / "text"
    text.write_text(models.TEXT * 8)
    source = models.llama_gguf(tmp_path_factory.getbasetemp())
    return Request(source, text, METHOD, ctx=48, threads=1)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def quiet(_line: str) -> None:
    pass


def with_dask(request: Request, address: str) -> Request:
    return Request(**{**vars(request), "dask": address})


@pytest.fixture(scope="module")
def alone(request_: Request, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("alone") / "folder"
    calibrate(request_, folder, warn=quiet)
    return files(folder)


def test_any_number_of_workers_gives_the_same_bytes(
    request_: Request, alone: dict[str, bytes], tmp_path: Path
) -> None:
    """Three workers, then two of them, then one."""
    with dask_cluster(3, tmp_path) as (address, workers):
        for left in (3, 2, 1):
            folder = tmp_path / f"{left}"
            calibrate(with_dask(request_, address), folder, warn=quiet)
            assert files(folder) == alone, f"{left} workers"
            workers[left - 1].kill()
            workers[left - 1].wait()


def test_a_worker_that_dies_loses_nothing(request_: Request, alone: dict[str, bytes], tmp_path: Path) -> None:
    """One of two is killed while it works at a block."""
    folder = tmp_path / "folder"
    with dask_cluster(2, tmp_path) as (address, workers):
        with Client(address) as client:
            client.run(_slow_blocks)
        killer = subprocess.Popen(["sh", "-c", f"sleep 2; kill -9 {workers[0].pid}"])
        calibrate(with_dask(request_, address), folder, warn=quiet)
        assert killer.wait() == 0
        assert workers[0].wait(timeout=30) == -signal.SIGKILL
        assert workers[1].poll() is None
    assert files(folder) == alone


def _slow_blocks() -> None:
    """In a worker: a block takes seconds longer, so that it can be killed at one."""
    import time as clock

    from ggml_ext.methods.calibrate import cluster as here

    work = here.calibrate_block

    def slow(*arguments: object) -> dict[str, float]:
        clock.sleep(4)
        return work(*arguments)  # type: ignore[arg-type]

    here.calibrate_block = slow


def test_nobody_answers(request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 1)
    with pytest.raises(
        GgmlExtError, match=r"--dask tcp://127\.0\.0\.1:9: no scheduler answers .*; start one"
    ):
        calibrate(with_dask(request_, "tcp://127.0.0.1:9"), tmp_path / "folder", warn=quiet)


def test_no_worker_and_then_the_same_command_goes_on(
    request_: Request, alone: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_LOOK_SECONDS", 0.2)
    monkeypatch.setattr(cluster, "_PATIENCE_SECONDS", 1)
    with (
        dask_cluster(0, tmp_path) as (address, _),
        pytest.raises(GgmlExtError, match="has no workers; start some with dask worker"),
    ):
        calibrate(with_dask(request_, address), tmp_path / "folder", warn=quiet)
    calibrate(request_, tmp_path / "folder", warn=quiet)
    assert files(tmp_path / "folder") == alone
    assert not psutil.Process().children()


def test_a_worker_of_another_version_is_refused(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dask_cluster(1, tmp_path) as (address, _):
        versions = cluster.plans.versions()
        monkeypatch.setattr(cluster.plans, "versions", lambda: {**versions, "numpy": "0.1"})
        with pytest.raises(GgmlExtError, match=r"a worker on .* has numpy .*, not 0\.1; install"):
            calibrate(with_dask(request_, address), tmp_path / "folder", warn=quiet)
