"""FQ4 weights in memory of their own: the same logits as from the mapped file, and a way back to it.

What would break these: a buffer that other weights get into, bytes that are not the file's, a buffer type
of ours that --no-repack leaves on.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

import models
from ggml_ext.convert import convert

LOGITS = Path(__file__).with_name("logits.py")
BUFFER = "CPU_FQ4 model buffer size"


def logits(lib_dir: Path, model: Path, out: Path, *options: str) -> tuple[bytes, str]:
    result = subprocess.run(
        [sys.executable, LOGITS, lib_dir, model, out, *options],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    values = np.load(out)
    assert np.unique(values).size > 1000, "logits that hardly differ would compare equal for nothing"
    return values.tobytes(), result.stderr


def test_the_buffer_changes_no_bit(patched_lib_dir: Path, tmp_path: Path) -> None:
    base = models.llama_gguf(tmp_path)
    extended = tmp_path / "fq4.gguf"
    convert(base, extended, type_name="fq4")
    copied, log = logits(patched_lib_dir, extended, tmp_path / "copied.npy")
    assert BUFFER in log
    mapped, log = logits(patched_lib_dir, extended, tmp_path / "mapped.npy", "--no-repack")
    assert BUFFER not in log
    assert copied == mapped


def test_other_types_stay_out(patched_lib_dir: Path, tmp_path: Path) -> None:
    _, log = logits(patched_lib_dir, models.llama_gguf(tmp_path), tmp_path / "f16.npy")
    assert BUFFER not in log
