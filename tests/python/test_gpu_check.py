"""scripts/gpu-check without a device: the CPU stands in for it, so that every step but the build and the
sanitizers runs as it would; what it packs; errors in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from ggml_ext import gpu_check
from ggml_ext.cuda_compile.__main__ import n_cases
from ggml_ext.gpu_check import machine, pack, plan, report, run
from ggml_ext.gpu_check.plan import CheckError, Kernel, Ops

DEVICE = machine.Device("stand-in", "9.0", "1.0", 1000, "13.0")
ABOUT = {"commit": "0" * 12}


def state(folder: Path, kernels: tuple[Kernel, ...] = (), seconds: float = 300.0) -> run.Run:
    return run.Run(folder, folder / "work", DEVICE, kernels, True, time.monotonic() + seconds)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, test_bin_dir: Path) -> None:
    """The CPU backend in the place of the device, and the programs of the test build."""
    monkeypatch.setattr(run.Run, "backend", property(lambda _: "CPU"))
    monkeypatch.setattr(run.Run, "bin", property(lambda _: test_bin_dir))
    monkeypatch.setattr(run, "_build", lambda _: "sm_00")


def test_the_folder_of_a_run_needs_no_package(tmp_path: Path) -> None:
    """Breaks if a module that is packed imports ggml_ext or a library."""
    folder = tmp_path / "gpu_check"
    folder.mkdir()
    for path in Path(gpu_check.__file__).parent.glob("*.py"):
        if path.name != "pack.py":
            (folder / path.name).write_bytes(path.read_bytes())
    command = [sys.executable, "-I", "-S", "-c"]
    command += [
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import gpu_check.__main__ as m; m.main()"
    ]
    done = subprocess.run([*command, "--root", str(tmp_path), "--list"], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines() == plan.device_tests()


@pytest.mark.parametrize(
    "ops",
    sorted({ops for kernel in plan.KERNELS for ops in (*kernel.ops, *kernel.sanitize)}, key=str),
    ids=str,
)
def test_every_selection_has_cases(ops: Ops, test_bin_dir: Path) -> None:
    """Breaks when upstream or we rename parameters, so that a check would select nothing."""
    assert n_cases(test_bin_dir / "test-backend-ops", ops) > 0


def test_ops_and_report(tmp_path: Path, on_cpu: None) -> None:
    kernel = Kernel("scale_add", (Ops("EXT_SCALE_ADD"), Ops("EXT_SCALE_ADD", "ne=nothing")), ())
    checked = state(tmp_path, (kernel,))
    run.everything(checked)
    found = {outcome.name: (outcome.status, outcome.detail) for outcome in checked.outcomes}
    assert found == {
        "build": (run.PASSED, "sm_00"),
        "ops scale_add: EXT_SCALE_ADD": (run.PASSED, "6 of 6 cases"),
        "ops scale_add: EXT_SCALE_ADD ne=nothing": (run.FAILED, "no case ran"),
    }
    text = report.table(checked, ABOUT)
    assert "stand-in, compute capability 9.0, driver 1.0, CUDA 13.0, commit 000000000000" in text
    assert "FAILED: ops scale_add: EXT_SCALE_ADD ne=nothing: no case ran" in text
    report.write(tmp_path / "results.json", report.as_json(checked, ABOUT))
    results = json.loads((tmp_path / "results.json").read_text())
    assert [check["status"] for check in results["checks"]] == [run.PASSED, run.PASSED, run.FAILED]
    assert all(ratio["ratio"] is None and ratio["reached"] is None for ratio in results["ratios"])


def test_out_of_time_is_said(tmp_path: Path, on_cpu: None) -> None:
    checked = state(tmp_path, plan.chosen(["scale_add"]), seconds=-1.0)
    run.everything(checked)
    assert [(outcome.name, outcome.status) for outcome in checked.outcomes] == [("build", run.NOT_RUN)]


def test_a_program_is_killed_at_the_deadline(tmp_path: Path) -> None:
    checked = state(tmp_path, seconds=1.0)
    start = time.monotonic()
    done = checked.command("sleep", [sys.executable, "-c", "import time; time.sleep(60)"])
    assert done.returncode == 124
    assert time.monotonic() - start < 20


def test_failing_cases_are_named() -> None:
    text = "  MUL_MAT(type_a=fq4,m=16): [MUL_MAT] NMSE = 0.9 > 0.0005 \x1b[1;31mFAIL\x1b[0m\n"
    text += "  5/6 tests passed\n"
    text += "  MUL_MAT(type_a=fq4,m=17): not supported [CUDA0] \n"
    assert run.parse_ops(text) == (5, 6, 1)
    assert run.parse_ops("no such program") == (0, 0, 0)


def test_perplexity(tmp_path: Path, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the limit is not applied, or if the two places are the same run."""
    asked: list[str] = []
    values = {"cpu": 12.0, "cuda": 12.0}

    def answer(
        self: run.Run, name: str, command: list[object], environment: object = None
    ) -> subprocess.CompletedProcess[str]:
        place = name.split()[-1]
        asked.append(place)
        assert ("--device" in command) == (place == "cpu")
        return subprocess.CompletedProcess([], 0, f"Final estimate: PPL = {values[place]:.4f} +/- 0.1\n", "")

    monkeypatch.setattr(run.Run, "command", answer)
    checked = state(tmp_path)
    assert run._perplexity(checked, Path("m.gguf"), "q8_0") == "CUDA 12.0000, CPU 12.0000, +0.000 %"
    values["cuda"] = 12.03
    with pytest.raises(CheckError, match=r"\+0.250 %; at most 0.2 %"):
        run._perplexity(checked, Path("m.gguf"), "q8_0")
    assert asked == ["cpu", "cuda"] * 2
    with pytest.raises(CheckError, match="ggml_abort"):
        run.parse_perplexity("loading\nCUDA error: ggml_abort\n")


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


def test_ratios(tmp_path: Path) -> None:
    """Speed over speed; for bytes, the rate over the copy's."""
    checked = state(tmp_path)
    shape = "m=14336 k=4096 n=1"
    checked.measured = [
        {"part": "copy", "shape": "512 MiB moved", "contender": "copy", "bytes": 4e9, "seconds": [1e-3]},
        {
            "part": "fq4_mul_mat",
            "shape": shape,
            "contender": "fq4",
            "bytes": 3e7,
            "seconds": [3e-5, 1e-5, 9.0],
        },
        {"part": "models", "shape": "tg128", "contender": "fq4", "seconds": [2.0]},
        {"part": "models", "shape": "tg128", "contender": "q4_0", "seconds": [3.0]},
    ]
    found = {ratio["target"]: (ratio["ratio"], ratio["reached"]) for ratio in report.ratios(checked)}
    assert found[f"fq4_mul_mat {shape}: fq4 / copy, bytes"] == (0.25, False)
    assert found["models tg128: fq4 / q4_0"] == (1.5, True)
    assert found["models tg128: fq4 / q4_K"] == (None, None)


def test_source_that_is_packed(repo_root: Path, tmp_path: Path) -> None:
    """Breaks if the packed tree still has patches to apply, lacks a hook, or carries other backends."""
    archive = tmp_path / "source.tar.gz"
    pack._write_source(repo_root, archive)
    with tarfile.open(archive) as tar:
        names = set(tar.getnames())
        series = tar.extractfile("ggml_ext/patches/series")
        hooked = tar.extractfile("llama.cpp/ggml/src/ggml-cuda/ggml-cuda.cu")
        assert series is not None
        assert hooked is not None
        assert [line for line in series.read().splitlines() if not line.startswith(b"#")] == []
        assert b"ggml_ext_cuda_compute" in hooked.read()
    assert {"CMakeLists.txt", "cuda/ext-cuda.cu", "llama.cpp/tests/test-backend-ops.cpp"} <= names
    assert not [name for name in names if "/ggml-vulkan/" in name or name.endswith(".patch")]
    assert archive.stat().st_size < 10_000_000


def test_no_device(tmp_path: Path, repo_root: Path) -> None:
    """One line and status 1, before anything is packed."""
    command = [sys.executable, "-m", "ggml_ext.gpu_check", "--root", str(repo_root)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PATH": str(tmp_path)}
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("gpu-check: error: no nvidia-smi on the PATH")
    assert done.stderr.count("\n") == 1


def test_unknown_kernel() -> None:
    with pytest.raises(CheckError, match="no kernel nonsense; choose from scale_add"):
        plan.chosen(["nonsense"])
