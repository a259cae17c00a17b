"""Every architecture that llama.cpp runs: loaded, rounded, and what the observer says about its graph.

The oracle of the sums is llama-imatrix over the same tokens, which finds its values node by node.
"""

from __future__ import annotations

import random
import string
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from arch_models import NAMES, WRITTEN, ArchModel
from ggml_ext import tools
from ggml_ext.convert import convert
from ggml_ext.llama import Model
from ggml_ext.source import Tensor, open_gguf
from observed import Float, ObservedModel, SiteSums

CTX, WINDOWS = 64, 2
BYTES_PER_TOKEN = 5
"""Of upstream's "test" tokenizer."""

IMATRIX_CRASHES = {"glm5-next-moe"}
"""llama-imatrix reads the name of a node's first source, and here are nodes that have none."""


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest, architectures: dict[str, ArchModel]) -> ArchModel:
    return architectures[request.param]


def test_names(architectures: dict[str, ArchModel]) -> None:
    assert sorted(architectures) == sorted(NAMES)
    for name, model in architectures.items():
        assert open_gguf(model.path).arch == model.arch, name
    assert {model.arch for model in architectures.values()} >= {"gemma4", "llama", "mamba"}
    assert len(WRITTEN) == 3


def logits_of(path: Path) -> Float:
    """Logits [CTX, vocabulary] of random tokens."""
    with Model(path, threads=1) as loaded:
        loaded.start(n_ctx=CTX, n_seq=1, n_batch=CTX)
        tokens = np.random.default_rng(0).integers(0, loaded.n_vocab, CTX).astype(np.int32)
        positions = np.arange(CTX, dtype=np.int32)
        logits = loaded.decode(tokens, positions, np.zeros_like(positions), np.ones(CTX, np.bool_))
        assert logits.shape == (CTX, loaded.n_vocab)
        return logits.copy()


def test_it_gives_finite_logits(model: ArchModel) -> None:
    logits = logits_of(model.path)
    assert np.isfinite(logits).all()
    assert np.ptp(logits) > 0.1


def test_it_is_rounded(model: ArchModel, tmp_path: Path) -> None:
    remarks: list[str] = []
    out = tmp_path / "out.gguf"
    result = convert(model.path, out, type_name="q4_0", threads=1, warn=remarks.append)
    assert all("rows do not fit the blocks" in line for line in remarks)
    assert result.weights["q4_0"] > 0
    assert np.isfinite(logits_of(out)).all()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many tokens as the windows hold."""
    letters = random.Random(3).choices(string.ascii_lowercase, k=BYTES_PER_TOKEN * CTX * WINDOWS)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(letters))
    return path
