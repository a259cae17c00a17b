"""FQ4 weights in memory of their own: the same logits as from the mapped file, and a way back to it.

What would break these: a buffer that other weights get into, bytes that are not the file's, a buffer type
of ours that --no-repack leaves on, memory that --mlock leaves to be swapped.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

import models
from ggml_ext.convert import convert
from ggml_ext.gguf import ext as gguf_ext

LOGITS = Path(__file__).parents[1] / "logits.py"
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


def test_mlock_locks_the_weights(patched_lib_dir: Path, tmp_path: Path) -> None:
    """What is locked covers all weights, in our buffer as in upstream's."""
    extended = tmp_path / "fq4.gguf"
    convert(models.llama_gguf(tmp_path), extended, type_name="fq4")
    reader = gguf.GGUFReader(extended)
    weights = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    fq4 = sum(int(tensor.n_bytes) for tensor in reader.tensors if int(tensor.tensor_type) == gguf_ext.FQ4)
    assert fq4 > weights / 4, "too few FQ4 weights to tell"
    for options in ([], ["--no-repack"]):
        arguments = [patched_lib_dir, extended, tmp_path / "locked.npy", "--lock", *options]
        result = subprocess.run(
            [sys.executable, LOGITS, *arguments], capture_output=True, text=True, timeout=600, check=False
        )
        assert result.returncode == 0, result.stderr[-2000:]
        if "failed to mlock" in result.stderr:
            pytest.skip("this process may lock too little memory (ulimit -l)")
        assert int(result.stdout.split()[-1]) * 1024 >= weights, options
