"""A block's file: what is read from it is what was written, and equal content is equal bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ggml_ext.methods.calibrate.block_file import FileSite, Findings, Packed, load, save
from ggml_ext.runtime import native

CTX, SAMPLES = 32, 6


def test_a_block_file_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    rows = random.standard_normal((4, 256)).astype(np.float32)
    tensors = {
        name: Packed(kind, (256, 4), native.quantize(kind, rows))
        for name, kind in (("b", "fq4"), ("a", "f16"))
    }
    findings = Findings(
        (FileSite(("b", "a"), 1, clip=0.5, diagonal=(0.5, 2.0)),), {"b": 0.25}, {"attn_in": {"loss": 1.5}}
    )
    save(tmp_path / "x", tensors, findings)
    save(tmp_path / "y", dict(reversed(tensors.items())), findings)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    stored, found = load(tmp_path / "x")
    assert found == findings
    assert (stored["b"].type_name, stored["b"].dims) == ("fq4", (256, 4))
    np.testing.assert_array_equal(stored["b"].read(), tensors["b"].data)
