"""scripts/train_retrieval_model.py: texts, steps, resuming, and a file that llama.cpp computes alike."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.measure.tasks.templates import HELD_OUT, TASKS
from ggml_ext.runtime.llama import Model

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def script(repo_root: Path) -> Any:
    spec = importlib.util.spec_from_file_location(
        "train_retrieval_model", repo_root / "scripts" / "train_retrieval_model.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module


def small(script: Any) -> Any:
    return script.Shape(hidden=64, layers=2, heads=4, kv_heads=2, ffn=64)


def trainer(script: Any, path: Path, steps: int = 6) -> Any:
    return script.Training(small(script), (script.Stage(128, 2, steps, 0.9),), 3, path)


def test_texts_ask_for_what_stands_in_them(script: Any) -> None:
    """The weighted tokens are answers: the words of each stand in the text before it."""
    words = script.Vocabulary()
    for row in range(20):
        for stage in (script.Stage(128, 1, 1, 0.9), script.Stage(1024, 1, 1, 0.4)):
            tokens, weights = script.make_text(stage, words, np.random.default_rng(row))
            assert len(tokens) == len(weights) == stage.length + 1
            asked = [i for i, weight in enumerate(weights) if weight == 1.0]
            assert asked
            first = asked[0]
            assert {tokens[i] for i in asked} <= set(tokens[:first]) | {tokens[i] for i in asked}
            assert sum(tokens[i] in tokens[:first] for i in asked) > 0.95 * len(asked)
            assert max(tokens) < len(words.tokens)


def test_held_out_wordings_do_not_occur(script: Any) -> None:
    words = script.Vocabulary()

    def fixed(template: Any) -> list[int]:
        encoded: list[int] = words.encode(template.again.replace("{name}", "").replace("{thing}", ""))
        return encoded

    held = [fixed(template) for task in TASKS for template in HELD_OUT[task]]
    for row in range(200):
        assert fixed(script.random_template(TASKS[row % 5], np.random.default_rng(row))) not in held


def test_tokens_and_logits_are_llama_cpps(script: Any, tmp_path: Path) -> None:
    training = trainer(script, tmp_path / "checkpoint.pt")
    for parameter in training.model.blk.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    script.write_gguf(tmp_path / "m.gguf", training.model, training.words)
    text = " The pass key is lamp river stone. What is it? The names in order are: bell, boat."
    with Model(tmp_path / "m.gguf", threads=1) as model:
        tokens = model.tokenize(text.encode())
        assert tokens.tolist() == [training.words.bos, *training.words.encode(text)]
        model.start(n_ctx=64, n_seq=1, n_batch=64)
        positions = np.arange(len(tokens), dtype=np.int32)
        logits = model.decode(tokens, positions, 0 * positions, positions >= 0)
        expected = training.model(torch.tensor(tokens[None].astype(np.int64)))[0].detach().numpy()
        assert np.abs(logits - expected).max() < 0.02 * np.abs(expected).max()


def test_a_resumed_run_is_the_run(script: Any, tmp_path: Path) -> None:
    whole = trainer(script, tmp_path / "whole.pt")
    whole.run()
    part = trainer(script, tmp_path / "part.pt")
    for _ in range(3):
        part.train_step()
    part.save()
    again = trainer(script, tmp_path / "part.pt")
    again.load()
    again.run()
    assert again.step == 6
    for name, values in whole.model.state_dict().items():
        assert torch.equal(values, again.model.state_dict()[name])
    with pytest.raises(GgmlExtError, match="of a run with other options"):
        trainer(script, tmp_path / "part.pt", steps=7).load()


def test_a_stopped_run_saves_and_says_so(script: Any, tmp_path: Path) -> None:
    stopped = trainer(script, tmp_path / "stopped.pt")
    stopped.stopped = True
    with pytest.raises(GgmlExtError, match=r"stopped at step 1; the same command goes on from .*stopped.pt"):
        stopped.run()
    assert (tmp_path / "stopped.pt").exists()


def test_steps_of_newton_and_schulz_give_singular_values_near_one(script: Any) -> None:
    for shape in ((16, 64), (64, 16)):
        made = script.orthogonal(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))
        values = torch.linalg.svdvals(made)
        assert made.shape == shape
        assert values.min() > 0.5
        assert values.max() < 1.3
