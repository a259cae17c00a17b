"""bench_device on the CPU: every part runs, agrees with the reference, and has the contenders to compare."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from devtools.gpu_check import plan

BENCH_PARTS = sorted({part for kernel in plan.KERNELS for part in kernel.bench} | {"copy"})


@pytest.mark.parametrize("part", BENCH_PARTS)
def test_bench_device(part: str, test_bin_dir: Path) -> None:
    """Breaks if a part lacks a contender that the plan compares, or computes something else than the CPU."""
    command = [str(test_bin_dir / "bench_device"), "--device", "CPU", "--quick", "--scale", "32", part]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_WAIT_POLICY": "passive"}
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines
    assert all(len(line["seconds"]) >= 3 and min(line["seconds"]) > 0 for line in lines)
    assert all(line["bytes"] > 0 and line["nmse"] <= 5e-4 for line in lines)
    found = {(line["part"], line["shape"], line["contender"]) for line in lines}
    for target in plan.TARGETS:
        if target.part == part:
            assert {(part, target.shape, name) for name in (target.contender, target.over) if name} <= found


def test_bench_device_writes_models_that_run(
    tmp_path: Path, test_bin_dir: Path, patched_bin_dir: Path
) -> None:
    model = tmp_path / "model.gguf"
    command = [
        str(test_bin_dir / "bench_device"),
        "--model",
        str(model),
        "fq4",
        "2",
        "--transforms",
        "--scale",
        "16",
    ]
    subprocess.run(command, check=True)
    bench = [
        str(patched_bin_dir / "llama-bench"),
        "-m",
        str(model),
        "-p",
        "8",
        "-n",
        "2",
        "-r",
        "1",
        "-o",
        "json",
    ]
    done = subprocess.run(bench, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {test["n_prompt"] for test in json.loads(done.stdout)} == {8, 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "no part nonsense"),
        (["--device", "CUDA7", "copy"], "no device CUDA7"),
        (["--device"], "--device needs a value"),
    ],
)
def test_bench_device_errors(arguments: list[str], message: str, test_bin_dir: Path) -> None:
    if "CUDA7" not in arguments:
        arguments = [*arguments, *([] if arguments == ["--device"] else ["--device", "CPU"])]
    done = subprocess.run([str(test_bin_dir / "bench_device"), *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"bench_device: error: {message}\n")
