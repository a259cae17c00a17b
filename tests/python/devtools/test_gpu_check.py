"""scripts/gpu-check without a device: the CPU stands in for it, so that every step but the build and NVIDIA's
tools runs as it would; what it packs; errors in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from devtools import gpu_check
from devtools.cuda_compile.__main__ import n_cases
from devtools.gpu_check import checks, machine, pack, plan, programs, report, run
from devtools.gpu_check.plan import CheckError, Kernel, Ops
from devtools.gpu_check.state import FAILED, NOT_RUN, PASSED, Outcome, Run, figure

DEVICE = machine.Device("stand-in", "9.0", "1.0", 1000, "13.0")
ABOUT = {"commit": "0" * 12}
OUTCOME = Outcome("", NOT_RUN, "", 0.0)


def state(
    folder: Path,
    kernels: tuple[Kernel, ...] = (),
    steps: tuple[str, ...] = plan.STEPS,
    seconds: float = 300.0,
) -> Run:
    deadline = time.monotonic() + seconds
    return Run(folder, folder / "work", folder / "logs", DEVICE, kernels, steps, deadline)


def statuses(checked: Run) -> list[tuple[str, str]]:
    return [(outcome.name, outcome.status) for outcome in checked.outcomes]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, test_bin_dir: Path) -> None:
    """The CPU backend in the place of the device, and the programs of the test build."""

    def prepare(checked: Run, outcome: Outcome) -> str:
        checked.bin = test_bin_dir
        return "sm_00"

    monkeypatch.setattr(Run, "backend", property(lambda _: "CPU"))
    monkeypatch.setattr(programs, "prepare", prepare)
    monkeypatch.setattr(machine, "tool", lambda _: None)


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
    sorted(
        {ops for kernel in plan.KERNELS for ops in (*kernel.first, *kernel.ops, *kernel.sanitize)}, key=str
    ),
    ids=str,
)
def test_every_selection_has_cases(ops: Ops, test_bin_dir: Path) -> None:
    """Breaks when upstream or we rename parameters, so that a check would select nothing."""
    assert n_cases(test_bin_dir / "test-backend-ops", ops) > 0


def test_ops_and_report(tmp_path: Path, on_cpu: None) -> None:
    """Breaks if a failure ends the run, if the smallest cases do not come first, or if results wait for the
    end."""
    small, missing = Ops("EXT_SCALE_ADD", r"ne=\[1,"), Ops("EXT_SCALE_ADD", "ne=nothing")
    kernel = Kernel("scale_add", (small,), (missing, Ops("EXT_SCALE_ADD")), (small,), ("copy",), ("name",))
    checked = state(tmp_path, (kernel,), ("first", "ops", "profile", "memcheck"))
    results = tmp_path / "results.json"
    written: list[int] = []

    def save(now: Run) -> None:
        report.write(results, report.as_json(now, ABOUT))
        written.append(len(json.loads(results.read_text())["checks"]))

    checked.save = save
    run.everything(checked)
    assert statuses(checked) == [
        ("preflight", PASSED),
        (f"first scale_add: {small}", PASSED),
        (f"ops scale_add: {missing}", FAILED),
        ("ops scale_add: EXT_SCALE_ADD", PASSED),
        ("profile scale_add: name", NOT_RUN),
        ("compute-sanitizer", NOT_RUN),
    ]
    details = {outcome.name: outcome.detail for outcome in checked.outcomes}
    assert details["ops scale_add: EXT_SCALE_ADD"] == "6 of 6 cases"
    assert details["compute-sanitizer"].startswith("no compute-sanitizer")
    assert written == [1, 2, 3, 4, 5, 6]
    text = report.table(checked, ABOUT)
    assert "stand-in, compute capability 9.0, driver 1.0, CUDA 13.0, commit 000000000000" in text
    assert "FAILED: ops scale_add: EXT_SCALE_ADD ne=nothing: no case ran" in text
    found = json.loads(results.read_text())
    assert all(ratio["ratio"] is None and ratio["reached"] is None for ratio in found["ratios"])
    assert (tmp_path / "logs" / "ops-scale_add-EXT_SCALE_ADD.log").is_file()


def test_the_first_cases_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a kernel that fails could be blamed on another one: each is waited for, outside graphs."""
    asked: list[tuple[list[object], dict[str, str]]] = []

    def answer(
        self: Run, name: str, command: list[object], environment: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        asked.append((command, environment))
        return subprocess.CompletedProcess([], 0, "1/1 tests passed\n", "")

    monkeypatch.setattr(Run, "command", answer)
    checked = state(tmp_path)
    for alone in (True, False):
        checked.check("x", partial(checks.cases, checked, Ops("MUL_MAT", "", "half"), alone))
    assert [outcome.status for outcome in checked.outcomes] == [PASSED, PASSED]
    blocking = {"CUDA_LAUNCH_BLOCKING": "1", "GGML_CUDA_DISABLE_GRAPHS": "1"}
    assert [environment for _, environment in asked] == [
        {"GGML_EXT_ATTN": "half", **blocking},
        {"GGML_EXT_ATTN": "half"},
    ]
    assert ["-j" in command for command, _ in asked] == [False, True]


def test_only(tmp_path: Path, on_cpu: None) -> None:
    kernels, steps = plan.chosen(["sample", "ops"])
    assert ([kernel.name for kernel in kernels], steps) == (["sample"], ("ops",))
    assert plan.chosen([]) == (plan.KERNELS, plan.STEPS)
    assert plan.chosen(["bench"]) == (plan.KERNELS, ("bench",))
    kernels, steps = plan.chosen(["scale_add", "first"])
    checked = state(tmp_path, kernels, steps)
    run.everything(checked)
    assert [name.split(" ")[0] for name, _ in statuses(checked)] == ["preflight", "first"]


def test_out_of_time_is_said(tmp_path: Path, on_cpu: None) -> None:
    checked = state(tmp_path, plan.chosen(["scale_add"])[0], seconds=-1.0)
    run.everything(checked)
    assert statuses(checked) == [("preflight", NOT_RUN)]


def test_a_program_is_killed_at_the_deadline(tmp_path: Path) -> None:
    checked = state(tmp_path, seconds=1.0)
    start = time.monotonic()
    done = checked.command("sleep", [sys.executable, "-c", "import time; time.sleep(60)"])
    assert done.returncode == 124
    assert time.monotonic() - start < 20


def test_failing_cases_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them, with their errors: in the results, and the first ones on the screen."""
    text = "  MUL_MAT(type_a=fq4,m=16): [MUL_MAT] NMSE = 0.900000000 > 0.000500000 \x1b[1;31mFAIL\x1b[0m\n"
    text += "  CPY(type_src=fq4): [CPY] NaN at index 3 FAIL\n"
    text += "  5/6 tests passed\n"
    text += "  MUL_MAT(type_a=fq4,m=17): not supported [CUDA0] \n"
    assert checks.parse_ops(text) == (5, 6, 1)
    assert checks.parse_ops("no such program") == (0, 0, 0)
    failing: list[dict[str, Any]] = [
        {"case": "MUL_MAT(type_a=fq4,m=16)", "nmse": 0.9},
        {"case": "CPY(type_src=fq4)", "nmse": None},
    ]
    assert checks.parse_failing(text) == failing

    def body(outcome: Outcome) -> str:
        outcome.failing = failing * 11
        raise CheckError("5 of 6 cases")

    checked = state(tmp_path)
    assert not checked.check("ops x", body)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        "gpu-check:     NMSE 0.9: MUL_MAT(type_a=fq4,m=16)",
        "gpu-check:     no NMSE: CPY(type_src=fq4)",
    ]
    assert lines[-1] == "gpu-check:     and 2 more, in the results"
    assert len(report.as_json(checked, ABOUT)["checks"][0]["failing"]) == 22


def test_figures() -> None:
    line = {"part": "fq4_mul_mat", "shape": "n=1", "contender": "fq4", "bytes": 31.65e6, "ops": 1.2e8}
    text = figure({**line, "seconds": [1e-5, 1.5e-5, 9.0]})
    assert text == "fq4_mul_mat n=1, fq4: 15.00 us, 2110 GB/s, 8.00 TOPS"
    bare = {"part": "models", "shape": "tg128", "contender": "fq4", "seconds": [2e-3]}
    assert figure(bare) == "models tg128, fq4: 2000.00 us"


def test_later_figures_replace_earlier_ones(tmp_path: Path) -> None:
    checked = state(tmp_path)
    line = {"part": "copy", "shape": "s", "contender": "copy", "seconds": [1.0]}
    checked.measure([line, {**line, "contender": "other"}])
    checked.measure([{**line, "seconds": [2.0]}])
    assert [(m["contender"], m["seconds"]) for m in checked.measured] == [("other", [1.0]), ("copy", [2.0])]


def test_profiles() -> None:
    text = '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    text += '"0","kernel","Duration","us","9.31"\n"0","kernel","Achieved Occupancy","%","48.2"\n'
    assert checks.parse_profile(text) == {"Duration": "9.31 us", "Achieved Occupancy": "48.2 %"}
    assert checks.parse_profile("==ERROR== ERR_NVGPUCTRPERM\n") == {}


def test_a_refused_sanitizer_is_asked_once(
    tmp_path: Path, on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = tmp_path / "tool"
    refusing.write_text("#!/bin/sh\necho 'Error: this device is not supported'\n")
    refusing.chmod(0o755)
    monkeypatch.setattr(machine, "tool", lambda _: refusing)
    checked = state(tmp_path, plan.KERNELS, ("memcheck", "racecheck", "profile"))
    run.everything(checked)
    asked = [(outcome.name.split(" ")[0], outcome.status, outcome.detail) for outcome in checked.outcomes[1:]]
    refusal = (NOT_RUN, "Error: this device is not supported")
    assert asked == [("profile", *refusal), ("compute-sanitizer", *refusal)]


def test_perplexity(tmp_path: Path, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the limit is not applied, or if the two places are the same run."""
    asked: list[str] = []
    values = {"cpu": 12.0, "cuda": 12.0}

    def answer(
        self: Run, name: str, command: list[object], environment: object = None
    ) -> subprocess.CompletedProcess[str]:
        place = name.split()[-1]
        asked.append(place)
        assert ("--device" in command) == (place == "cpu")
        return subprocess.CompletedProcess([], 0, f"Final estimate: PPL = {values[place]:.4f} +/- 0.1\n", "")

    monkeypatch.setattr(Run, "command", answer)
    checked = state(tmp_path)
    assert (
        checks.perplexity(checked, Path("m.gguf"), "q8_0", "half", OUTCOME)
        == "CUDA 12.0000, CPU 12.0000, +0.000 %"
    )
    values["cuda"] = 12.03
    with pytest.raises(CheckError, match=r"\+0.250 %; at most 0.2 %"):
        checks.perplexity(checked, Path("m.gguf"), "q8_0", "half", OUTCOME)
    assert asked == ["cpu", "cuda"] * 2
    with pytest.raises(CheckError, match="ggml_abort"):
        checks.parse_perplexity("loading\nCUDA error: ggml_abort\n")


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


def test_packed_programs(tmp_path: Path, test_bin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come out as they went in, run, and give way to a build where they do not."""
    archive = tmp_path / programs.BINARIES
    built = tmp_path / "built"
    built.mkdir()
    for path in test_bin_dir.iterdir():
        if path.name == "bench_device" or path.name.startswith("libggml"):
            (built / path.name).symlink_to(path)
    (built / "CMakeCache.txt").write_text("not packed")
    pack._write_programs(built, archive)
    with tarfile.open(archive) as tar:
        names = {name.removeprefix("bin/") for name in tar.getnames()}
        sizes = {Path(member.name).name: member.size for member in tar.getmembers()}
    assert names == {path.name for path in built.iterdir()} - {"CMakeCache.txt"}
    assert 0 < sizes["bench_device"] < (test_bin_dir / "bench_device").stat().st_size

    monkeypatch.setattr(Run, "backend", property(lambda _: "CPU"))
    checked = state(tmp_path)
    assert programs.prepare(checked, OUTCOME) == "packed programs"
    assert checked.bin == tmp_path / "work" / "prebuilt" / "bin"

    (checked.bin / "bench_device").write_text("#!/bin/sh\necho 'error: no kernel image'; exit 1\n")
    monkeypatch.setattr(programs, "_built", lambda _: test_bin_dir)
    assert programs.prepare(checked, OUTCOME).startswith("built for 90a in ")
    assert checked.bin == test_bin_dir


def test_no_device(tmp_path: Path, repo_root: Path) -> None:
    """One line and status 1, before anything is packed."""
    command = [sys.executable, "-m", "devtools.gpu_check", "--root", str(repo_root)]
    env = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(repo_root)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("gpu-check: error: no nvidia-smi on the PATH")
    assert done.stderr.count("\n") == 1


def test_unknown_kernel() -> None:
    with pytest.raises(CheckError, match="--only: no nonsense; choose from scale_add"):
        plan.chosen(["nonsense"])
