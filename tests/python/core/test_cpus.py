"""How many threads a container allows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ggml_ext.core import cpus
from ggml_ext.core.cpus import quota
from ggml_ext.measure import bench


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_no_control_groups_no_quota(tmp_path: Path) -> None:
    assert quota(tmp_path) is None
    assert quota(write(tmp_path, {"proc/self/cgroup": "0::/\nnonsense\n"})) is None


def test_version_2_takes_the_least_of_all_levels(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/system.slice/job.scope\n",
            "sys/fs/cgroup/system.slice/job.scope/cpu.max": "max 100000\n",
            "sys/fs/cgroup/system.slice/cpu.max": "250000 100000\n",
            "sys/fs/cgroup/cpu.max": "800000 100000\n",
        },
    )
    assert quota(root) == 2.5


def test_version_2_in_a_container_that_sees_only_its_own_group(tmp_path: Path) -> None:
    for path in ("/", "/docker/0123/../../x", "/kubepods/pod1/c"):
        root = write(
            tmp_path, {"proc/self/cgroup": f"0::{path}\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}
        )
        assert quota(root) == 1.5


def test_version_1(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "12:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n1:name=systemd:/\n0::/x\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    )
    assert quota(root) == 4.0
    write(root, {"sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "50000\n"})
    assert quota(root) == 0.5


@pytest.mark.parametrize("text", ["", "max", "a b", "0 100000", "100 0", "-1 100000"])
def test_odd_limits_are_none(tmp_path: Path, text: str) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": text})
    assert quota(root) is None


@pytest.mark.parametrize(("limit", "count"), [(0.5, 1), (1.9, 1), (3.0, 3), (64.0, 8), (None, 8)])
def test_threads_stay_within_the_quota(
    monkeypatch: pytest.MonkeyPatch, limit: float | None, count: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    monkeypatch.setattr(cpus, "quota", lambda: limit)
    assert cpus.processors() == count
    assert 1 <= cpus.physical_cores() <= count


def test_tools_are_told_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's own defaults know nothing of quotas."""
    monkeypatch.setattr(cpus, "physical_cores", lambda: 3)
    monkeypatch.setattr(bench.tools, "find", Path)
    call = bench.command(Path("m.gguf"), prompt=1, generate=1, threads=None)
    assert call[call.index("-t") + 1] == "3"
