"""Every transform on every family: without rounding, the transformed file is the same function.

Tiny random models, all dtypes f32, clipping off. What would break these: a matrix that misses a transform or
gets it on the wrong side, a fold into the wrong rows or norm, a factor stored transposed, a router that sees
transformed activations, biases left as they were.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import models
import tiny_families as families
from ggml_ext import calibrate, recipes
from ggml_ext.convert import convert
from ggml_ext.header import read_header, value
from ggml_ext.recipes import Options

CTX, SAMPLES, STEPS = 32, 8, 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def text(base: Path) -> Path:
    path = base / "exactness.txt"
    path.write_text(models.TEXT * 4)
    return path


@pytest.fixture(scope="module")
def ggufs(base: Path) -> dict[str, Path]:
    names = list(families.CONFIGS)
    return dict(zip(names, families.family_ggufs(base, names), strict=True))


@pytest.mark.parametrize("transform", recipes.TRANSFORMS)
@pytest.mark.parametrize("family", families.CONFIGS)
def test_the_function_stays(
    family: str,
    transform: str,
    base: Path,
    text: Path,
    ggufs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibrate.hf, "to_gguf", lambda _folder, out: out.write_bytes(ggufs[family].read_bytes()))
    monkeypatch.setattr(calibrate, "TransformRequest", partial(calibrate.TransformRequest, steps=STEPS))
    torch.manual_seed(0)
    out = tmp_path / "m.gguf"
    # gptq runs block by block; with floats it has nothing to round, which the command line refuses.
    monkeypatch.setattr(recipes, "_check_blockwise", lambda *_arguments, **_options: None)
    rounding = "gptq" if transform == "none" else "rtn"
    convert(
        families.family_dir(base, family),
        out,
        options=Options("f32", transform, rounding, None, SAMPLES),
        calibration=text,
        ctx=CTX,
        warn=lambda _line: None,
    )
    keys = read_header(out).keys
    assert value(keys["ggml_ext.transform.name"]) == transform
    assert "ggml_ext.transform.clip" not in keys
    tokens = families.prompt()
    before, after = (families.llama_logits(path, tokens) for path in (ggufs[family], out))
    if transform == "none":
        np.testing.assert_array_equal(before, after)
    else:
        families.assert_same_logits(before, after)
        assert (before != after).any(), "equal bits: nothing was transformed"
