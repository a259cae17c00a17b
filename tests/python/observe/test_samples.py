"""Windows of a text: spread over it, drawn by the seed, as many as there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.observe.samples import windows

CTX, SAMPLES = 32, 6


CTX = 32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def text(base: Path) -> Path:
    path = base / "samples.txt"
    path.write_text(models.TEXT * 6)
    return path


def test_windows_are_spread_over_the_text(base: Path, text: Path) -> None:
    model = models.llama_gguf(base)
    lines: list[str] = []

    def cut(samples: int, seed: int = 0, ctx: int = CTX) -> Any:
        return windows(model, text, ctx=ctx, samples=samples, seed=seed, warn=lines.append)

    few = cut(3)
    assert few.shape == (3, CTX)
    assert (few[:, 0] == 1).all(), "BOS"
    np.testing.assert_array_equal(few, cut(3))
    assert (few != cut(3, seed=1)).any()
    assert not lines
    many = cut(10_000)
    assert len(many) < 10_000
    assert "not 10000" in lines[0]
    with pytest.raises(GgmlExtError, match=r"only \d+ tokens, and a window needs 100000"):
        cut(1, ctx=100_000)
