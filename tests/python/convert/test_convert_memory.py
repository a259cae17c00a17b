"""Memory of a conversion: bounded by the slab of rows in work, not by the model or its largest tensor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import models

# getrusage would count what the test's own process held when it started this one.
_CONVERT = """
import re, sys
from pathlib import Path
from ggml_ext.convert import convert
convert(Path(sys.argv[1]), Path(sys.argv[2]), type_name=sys.argv[3], threads=2)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def _peak(source: Path, out: Path, type_name: str) -> int:
    """MiB at most in memory while a process of its own converts the file."""
    command = [sys.executable, "-c", _CONVERT, source, out, type_name]
    done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    return int(done.stdout)


pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc (Linux)")


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    matrix = np.random.default_rng(7).standard_normal((2048, 1024), np.float32).astype(np.float16)
    peaks = {}
    for layers in (2, 64):
        tensors = {f"blk.{i}.ffn_up.weight": matrix for i in range(layers)}
        source = models.write_gguf(tmp_path / f"{layers}.gguf", tensors)
        peaks[layers] = _peak(source, tmp_path / "out.gguf", "bf16")
        assert source.stat().st_size > layers * matrix.nbytes
    print(f"peak RSS: {peaks[2]} MiB for 2 layers, {peaks[64]} MiB for 64 (256 MiB of weights)")
    assert peaks[64] < peaks[2] + 24


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    rows = np.random.default_rng(8).standard_normal((1024, 1024), np.float32).astype(np.float16)
    peaks = {}
    for count in (8, 24):
        tensors = {"blk.0.ffn_up.weight": np.tile(rows, (count, 1))}
        source = models.write_gguf(tmp_path / f"{count}.gguf", tensors)
        peaks[count] = _peak(source, tmp_path / "out.gguf", "fq4")
    print(f"peak RSS: {peaks[8]} MiB for a tensor of 16 MiB, {peaks[24]} MiB for one of 48 MiB")
    assert peaks[24] < peaks[8] + 24
