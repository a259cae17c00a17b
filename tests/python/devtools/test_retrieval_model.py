"""scripts/train_retrieval_model.py: steps, resuming, stopping, and a file that llama.cpp computes alike."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from devtools.retrieval_model.__main__ import scaled
from devtools.retrieval_model.export import write_gguf
from devtools.retrieval_model.model import Shape
from devtools.retrieval_model.muon import orthogonal
from devtools.retrieval_model.texts import Stage
from devtools.retrieval_model.training import STAGES, Training
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.runtime.llama import Model


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def trainer(path: Path, steps: int = 6) -> Training:
    small = Shape(hidden=64, layers=2, heads=4, kv_heads=2, ffn=64)
    return Training(small, (Stage(128, 2, steps, 0.9),), 3, path)


def test_tokens_and_logits_are_llama_cpps(tmp_path: Path) -> None:
    training = trainer(tmp_path / "checkpoint.pt")
    for parameter in training.model.blk.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    write_gguf(tmp_path / "m.gguf", training.model, training.words)
    text = " The pass key is lamp river stone. What is it? The names in order are: bell, boat."
    with Model(tmp_path / "m.gguf", threads=1) as model:
        tokens = model.tokenize(text.encode())
        assert tokens.tolist() == [training.words.bos, *training.words.encode(text)]
        model.start(n_ctx=64, n_seq=1, n_batch=64)
        positions = np.arange(len(tokens), dtype=np.int32)
        logits = model.decode(tokens, positions, 0 * positions, positions >= 0)
        expected = training.model(torch.tensor(tokens[None].astype(np.int64)))[0].detach().numpy()
        assert np.abs(logits - expected).max() < 0.02 * np.abs(expected).max()


def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole.pt")
    whole.run()
    part = trainer(tmp_path / "part.pt")
    for _ in range(3):
        part.train_step()
    part.save()
    again = trainer(tmp_path / "part.pt")
    again.load()
    again.run()
    assert again.step == 6
    for name, values in whole.model.state_dict().items():
        assert torch.equal(values, again.model.state_dict()[name])
    with pytest.raises(GgmlExtError, match="of a run with other options"):
        trainer(tmp_path / "part.pt", steps=7).load()


def test_a_stopped_run_saves_and_says_so(tmp_path: Path) -> None:
    stopped = trainer(tmp_path / "stopped.pt")
    stopped.stopped = True
    with pytest.raises(GgmlExtError, match=r"stopped at step 1; the same command goes on from .*stopped.pt"):
        stopped.run()
    assert (tmp_path / "stopped.pt").exists()


def test_steps_of_newton_and_schulz_give_singular_values_near_one() -> None:
    for shape in ((16, 64), (64, 16)):
        made = orthogonal(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))
        values = torch.linalg.svdvals(made)
        assert made.shape == shape
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_a_scaled_run_has_every_stage() -> None:
    assert scaled(STAGES, 1.0) == list(STAGES)
    assert [stage.steps for stage in scaled(STAGES, 0.001)] == [1] * len(STAGES)


def test_the_script_runs_from_anywhere(repo_root: Path, tmp_path: Path) -> None:
    """Without the repository on Python's path; errors take one line."""
    script = repo_root / "scripts" / "train_retrieval_model.py"
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, script, "-o", "m.gguf", "--work", "file"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("train_retrieval_model.py: ")
    assert done.stderr.count("\n") == 1
