"""compare: rows, files, and the command line around it."""

from __future__ import annotations

import io
import json
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type
from rich.console import Console

from eval_models import make_model, text_of
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.measure import bench, report
from ggml_ext.measure.compare import compare, file_facts
from interrupts import INTERRUPTED

REQUIRED = (
    "model", "bytes", "bits_per_weight", "ppl", "ppl_se", "kld", "kld_se", "top1", "pp_tps", "tg_tps",
    "ppl_ci95", "kld_ci95", "kld_se_independent", "rival", "kld_diff", "kld_diff_se", "kld_diff_resolved",
    "differences", "error_df", "error_method",
)  # fmt: skip
CTX = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-f16.gguf, tiny-Q8_0.gguf, tiny-Q4_0.gguf, text.txt."""
    made = tmp_path_factory.mktemp("compare")
    make_model(made / "tiny-f16.gguf")
    make_model(made / "tiny-Q8_0.gguf", kind=Type.Q8_0)
    make_model(made / "tiny-Q4_0.gguf", kind=Type.Q4_0)
    (made / "text.txt").write_text(text_of(600))
    return made


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ggml_ext.cli.entry", *map(str, arguments)], capture_output=True, text=True
    )


def compare_arguments(folder: Path) -> list[object]:
    models = [folder / f"tiny-{name}.gguf" for name in ("f16", "Q8_0", "Q4_0")]
    return ["compare", *models, "-f", folder / "text.txt", "--ctx", CTX]


def test_command_writes_table_json_report_and_plot(folder: Path, tmp_path: Path) -> None:
    out = [tmp_path / name for name in ("out.json", "out.md", "out.png")]
    done = cli(
        *compare_arguments(folder), "--rounds", 2, "--json", out[0], "--report", out[1], "--plot", out[2]
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(out[0].read_text())
    assert [Path(row["model"]).name for row in rows] == ["tiny-f16.gguf", "tiny-Q8_0.gguf", "tiny-Q4_0.gguf"]
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert set(REQUIRED) <= rows[0].keys()
    base, q8, q4 = rows
    assert base["kld"] is None
    assert base["top1"] is None
    assert 0 < q8["kld"] < q4["kld"]
    assert q4["top1"] < q8["top1"] <= 1
    assert all(
        row["ppl"] > 1 and row["ppl_se"] > 0 and row["pp_tps"] > 0 and row["tg_tps"] > 0 for row in rows
    )
    assert_differences(base, q8, q4)
    assert [row["bytes"] for row in rows] == [Path(row["model"]).stat().st_size for row in rows]
    assert base["pp_ratio"] == base["tg_ratio"] == 1.0
    assert all(len(row["pp_samples"]) == 2 for row in rows)
    assert out[2].read_bytes().startswith(b"\x89PNG")
    text = out[1].read_text()
    for row, name in zip(rows, ("f16", "Q8_0", "Q4_0"), strict=True):
        assert f"| {name} | " in text
        assert f"{row['ppl']:.3f} ± {row['ppl_se']:.3f}" in text
        assert f"{row['ppl']:.3f} ± {row['ppl_se']:.3f}" in done.stdout
    difference = f"+{q4['kld_diff']:.6f} ± {q4['kld_diff_se']:.6f}"
    assert difference in text
    assert difference in done.stdout
    assert "are resolved" in text
    assert base["text_sha256"] in text
    assert "llama-bench -m MODEL -p 512 -n 128" in text
    assert done.stdout.splitlines()[-1].startswith("compared 2 models with ")
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]


def assert_differences(base: dict[str, Any], best: dict[str, Any], other: dict[str, Any]) -> None:
    """Paired, against the model with the next lower KL divergence, and against every other one."""
    for row in (base, best):
        assert row["rival"] is None
        assert row["kld_diff"] is None
    assert base["differences"] is None
    assert other["rival"] == best["model"]
    assert other["kld_diff"] == pytest.approx(other["kld"] - best["kld"])
    assert other["ln_ppl_diff"] == pytest.approx(other["ln_ppl_ratio"] - best["ln_ppl_ratio"])
    assert other["kld_diff_resolved"]
    assert other["kld_diff_ci95"][0] > 0
    assert best["differences"][0] is None
    assert best["differences"][1]["model"] == other["model"]
    assert best["differences"][1]["kld_diff"] == pytest.approx(-other["kld_diff"])
    for row in (best, other):
        low, high = row["kld_ci95"]
        assert (low + high) / 2 == pytest.approx(row["kld"])
        assert (high - low) / 2 == pytest.approx(1.959964 * row["kld_se"])
        assert row["error_df"] >= 1


def test_a_difference_that_is_none_is_not_resolved(folder: Path, tmp_path: Path) -> None:
    """Two equal files: the table, the report and the plot must not rank them."""
    twin = tmp_path / "tiny-twin.gguf"
    twin.write_bytes((folder / "tiny-Q4_0.gguf").read_bytes())
    models = [folder / "tiny-Q4_0.gguf", twin]
    rows = compare(folder / "tiny-f16.gguf", models, folder / "text.txt", ctx=CTX, rounds=0, layers=0)
    assert [row["rival"] for row in rows] == [None, None, str(models[0])]
    assert rows[2]["kld_diff"] == pytest.approx(0, abs=1e-9)
    assert not rows[2]["kld_diff_resolved"]
    names = report.short_names(rows)
    sentence = (
        f"Not resolved on this text (95 % interval of the difference holds 0): {names[2]} and {names[1]}"
    )
    assert sentence in report.resolution(rows)
    assert sentence in report.markdown(rows, threads=None, rounds=0)


def test_a_text_of_one_window_has_no_errors(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text((folder / "text.txt").read_text()[:230])
    out = tmp_path / "out.json"
    base, other = folder / "tiny-f16.gguf", folder / "tiny-Q4_0.gguf"
    done = cli("compare", base, other, "-f", tmp_path / "one.txt", "--ctx", CTX, "--rounds", 0, "--json", out)
    assert done.returncode == 0, done.stderr
    assert "too short to tell errors" in done.stdout
    rows = json.loads(out.read_text())
    assert rows[1]["windows"] == 1
    assert rows[1]["kld_se"] is None
    assert rows[1]["kld_ci95"] is None
    assert rows[1]["kld_se_independent"] > 0


def test_figures_that_were_not_measured_are_null(folder: Path) -> None:
    rows = compare(
        folder / "tiny-f16.gguf", [folder / "tiny-Q4_0.gguf"], folder / "text.txt", ctx=CTX, rounds=0
    )
    assert [row["pp_tps"] for row in rows] == [None, None]
    assert rows[1]["kld"] > 0
    assert " - " in report.markdown(rows, threads=None, rounds=0)


def test_bits_per_weight(folder: Path) -> None:
    facts = file_facts(folder / "tiny-Q4_0.gguf")
    matrices = 2 * 384 * 64 + 4 * 64 * 64 - 2 * 64 * 32 + 3 * 64 * 128
    assert facts.types == {"Q4_0": matrices, "F32": 3 * 64}
    assert facts.bits_per_weight == pytest.approx((4.5 * matrices + 32 * 192) / (matrices + 192))
    assert facts.bits_per_layer_weight == 4.5


def test_bits_per_weight_of_fq4(tmp_path: Path) -> None:
    from ggml_ext.gguf import ext as gguf_ext

    kind = gguf_ext.FQ4
    import gguf
    import numpy as np

    path = tmp_path / "fq4.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((4, 2 * 138), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    facts = file_facts(path)
    assert facts.types == {"FQ4": 4 * 512}
    assert facts.bits_per_weight == 4.3125


def row(name: str, bits: float, kld: float | None) -> dict[str, Any]:
    return {
        "model": f"{name}.gguf", "bits_per_weight": bits, "kld": kld, "types": {"FQ4": 1},
        "kld_ci95": None if kld is None else (kld - 0.02, kld + 0.02),
        "rival": "m0.gguf", "kld_diff_ci95": (-0.001, 0.002), "kld_diff_resolved": False,
        "text": "t", "tokens_scored": 1, "ctx": 64,
    }  # fmt: skip


def test_plot_of_crowded_and_equal_points(tmp_path: Path) -> None:
    """Labels find a place even where points coincide; a divergence of 0 has none on a log scale."""
    rows = [row("base", 16, None), *(row(f"m{i}", 4.5, 0.01) for i in range(9)), row("same", 16, 0.0)]
    report.write_plot(tmp_path / "plot.png", rows)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("stems", "expected"),
    [
        (["m-8b-f16", "m-8b-Q4_0", "m-8b-Q4_K_M"], ["f16", "Q4_0", "Q4_K_M"]),
        (["Q4_0", "Q4_K_M"], ["Q4_0", "Q4_K_M"]),
        (["m.Q4_0", "m.Q4_K_M"], ["Q4_0", "Q4_K_M"]),
        (["a", "b"], ["a", "b"]),
        (["only-one"], ["only-one"]),
    ],
)
def test_short_names(stems: list[str], expected: list[str]) -> None:
    rows = [{"model": f"folder/{stem}.gguf"} for stem in stems]
    assert report.short_names(rows) == expected or len(set(stems)) == 1


def test_outputs_are_checked_before_the_work(folder: Path, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere" / "out.json"
    done = cli(*compare_arguments(folder), "--json", missing)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"ggml-ext: error: {missing}: the folder {missing.parent} does not exist; create it first"
    ]


def limited(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line where no file can grow beyond 100 bytes."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100, 100))
    call = [sys.executable, "-B", "-m", "ggml_ext.cli.entry", *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, preexec_fn=limit)


def test_full_disk_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "out.json"
    out.parent.mkdir()
    done = limited(
        "perplexity", folder / "tiny-f16.gguf", "-f", folder / "text.txt", "--ctx", CTX, "--json", out
    )
    assert done.returncode == 1
    assert "this run cannot be resumed" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"ggml-ext: error: cannot write: {out} (File too large)")
    assert list(out.parent.iterdir()) == []


def test_full_disk_for_scratch(folder: Path) -> None:
    done = limited(*compare_arguments(folder), "--rounds", 0)
    assert done.returncode == 1
    assert "of base logits; set TMPDIR" in done.stderr.splitlines()[-1]


def test_output_must_be_a_file(folder: Path, tmp_path: Path) -> None:
    for path in (tmp_path, "/dev/null"):
        done = cli("bench", folder / "tiny-f16.gguf", "--json", path)
        assert done.stderr == f"ggml-ext: error: {path}: is no regular file; name a file to write\n"


def test_errors_are_one_line_with_status_1(folder: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "cut.gguf"
    truncated.write_bytes((folder / "tiny-f16.gguf").read_bytes()[:-9000])
    text = folder / "text.txt"
    for arguments in (
        ["perplexity", truncated, "-f", text],
        ["perplexity", folder / "none.gguf", "-f", text],
        ["perplexity", folder / "tiny-f16.gguf", "-f", tmp_path / "none.txt"],
        ["compare", folder / "tiny-f16.gguf", truncated, "-f", text],
        ["bench", folder / "none.gguf"],
        ["bench", truncated, "--rounds", 1],
        ["run", "no-such-tool"],
        ["inspect", truncated],
    ):
        done = cli(*arguments)
        assert done.returncode == 1, arguments
        assert done.stderr.startswith("ggml-ext: error: "), done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_wrong_usage_has_status_2() -> None:
    for arguments in (
        ["perplexity"],
        ["compare", "a", "b", "-f", "c", "--ctx", "x"],
        ["nonsense"],
        ["convert", "a", "-o", "b", "--type-for", "c"],
    ):
        done = cli(*arguments)
        assert done.returncode == 2, arguments
        assert "Traceback" not in done.stderr


def test_version_and_help() -> None:
    assert cli("--version").stdout.startswith("ggml-ext ")
    for command in ("convert", "perplexity", "compare", "bench", "inspect", "build", "doctor"):
        assert cli(command, "--help").returncode == 0


def test_run_passes_arguments_and_exit_status() -> None:
    assert "usage" in cli("run", "llama-bench", "--help").stdout
    assert cli("run", "llama-bench", "--no-such-option").returncode == 1


def test_doctor_finds_the_build() -> None:
    done = cli("doctor", "--json")
    found = {check["name"]: check["state"] for check in json.loads(done.stdout)}
    assert found["libraries"] == found["bindings"] == found["tools"] == found["GGUF extension"] == "ok"
    assert {found["GPU"], found["NVIDIA device"], found["ggml-ext build --cuda"]} <= {"ok", "missing"}


@pytest.mark.parametrize("command", ["perplexity", "compare", "bench"])
def test_interrupt(folder: Path, tmp_path: Path, command: str) -> None:
    """Ctrl-C ends long work with status 130, one line and no file."""
    text, out = tmp_path / "long.txt", tmp_path / "out.json"
    text.write_text(text_of(400_000))
    model = folder / "tiny-f16.gguf"
    arguments = {
        "perplexity": ["perplexity", model, "-f", text],
        "compare": ["compare", model, folder / "tiny-Q4_0.gguf", "-f", text, "--rounds", 0],
        "bench": ["bench", model, "--rounds", 1000],
    }[command]
    child = subprocess.Popen(
        [sys.executable, "-m", "ggml_ext.cli.entry", *map(str, arguments), "--json", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    started = time.monotonic()
    while not list(tmp_path.glob("cache/evaluate/*/*.scores")) and time.monotonic() - started < 60:
        time.sleep(0.1)
        if command == "bench" and time.monotonic() - started > 4:
            break
    assert child.poll() is None, "too short to be interrupted"
    child.send_signal(signal.SIGINT)
    try:
        stdout, stderr = child.communicate(timeout=30)
    except (
        subprocess.TimeoutExpired
    ):  # CPython drops what is raised in the hooks of a fork, of which bench has many
        child.send_signal(signal.SIGINT)
        stdout, stderr = child.communicate(timeout=30)
        stderr = stderr[stderr.index("KeyboardInterrupt") :]
    assert child.returncode in INTERRUPTED, stderr
    assert stdout == ""
    assert stderr.splitlines()[-1] == "ggml-ext: interrupted"
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".json", ".part")] == []


def test_bench_alternates_and_pairs(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    models = [folder / "tiny-f16.gguf", folder / "tiny-Q4_0.gguf"]
    order = []
    speeds = iter([(100.0, 10.0), (200.0, 30.0), (400.0, 60.0), (200.0, 20.0), (50.0, 5.0), (100.0, 15.0)])

    def measure(model: Path, *_: object) -> tuple[float, float]:
        order.append(model.stem)
        return next(speeds)

    monkeypatch.setattr(bench, "_measure", measure)
    first, second = bench.as_rows(bench.bench(models, rounds=3))
    assert order == ["tiny-f16", "tiny-Q4_0", "tiny-Q4_0", "tiny-f16", "tiny-f16", "tiny-Q4_0"]
    assert first["pp_samples"] == [100.0, 200.0, 50.0]
    assert second["tg_samples"] == [30.0, 60.0, 15.0]
    assert (first["pp_tps"], second["pp_tps"], second["tg_tps"]) == (100.0, 200.0, 30.0)
    assert (second["pp_ratio"], second["tg_ratio"]) == (2.0, 3.0)
    assert first["pp_spread"] == pytest.approx((150.0 - 75.0) / 2)


def test_brackets_in_names_are_printed() -> None:
    """rich takes "[q4]" in a plain string for markup and drops it."""
    speeds = dict.fromkeys(("pp_tps", "tg_tps", "pp_spread", "tg_spread", "pp_ratio", "tg_ratio"), 1.0)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.speed_table([{"model": "model[q4].gguf", **speeds}]))
    assert "[q4]" in console.export_text()


def test_bench_reports_what_llama_bench_says(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    with pytest.raises(GgmlExtError, match=r"broken\.gguf: llama-bench cannot measure it: .*load"):
        bench.bench([broken], rounds=1)
