"""The fused sampler in a Llama of the bindings: upstream's text, the same text by seed, what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import eval_models
import models
from ggml_ext.convert import convert
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.runtime import sampling

PROMPTS = ("The function returns", "A class is", "import os\n")


@pytest.fixture(scope="module")
def model(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.getbasetemp() / "pydoc-8m-f16.gguf"
    if not path.exists():
        convert(repo_root / "tests" / "models" / "pydoc-8m", path, type_name="f16")
    return path


def open_llama(path: Path) -> Any:
    from llama_cpp import Llama

    return Llama(str(path), n_ctx=256, n_threads=1, verbose=False, seed=1)


@pytest.fixture(scope="module")
def llama(model: Path) -> Iterator[Any]:
    found = open_llama(model)
    yield found
    found.close()


def text_of(llama: Any, prompt: str, **settings: Any) -> str:
    llama.reset()  # a prefix that stays in the KV cache changes the last bits of the logits
    found: str = llama.create_completion(prompt, max_tokens=40, **settings)["choices"][0]["text"]
    return found


def tokens_of(llama: Any, prompt: str, count: int = 40, **settings: Any) -> list[int]:
    llama.reset()
    tokens = llama.tokenize(prompt.encode())
    return list(itertools.islice(llama.generate(tokens, **settings), count))


def test_greedy_text_is_upstreams(llama: Any) -> None:
    for prompt in PROMPTS:
        stock = tokens_of(llama, prompt, temp=0.0)
        assert len(set(stock)) > 5, "a text of one token would be equal for nothing"
        with sampling.fused(temperature=0) as sampler, sampler.installed(llama):
            assert tokens_of(llama, prompt, temp=0.9) == stock


def test_greedy_text_of_other_models_is_upstreams(
    shared_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    books = tmp_path_factory.getbasetemp() / "books-8m-f16.gguf"
    convert(shared_dir / "models" / "books-8m", books, type_name="f16")
    for path in (books, models.llama_gguf(tmp_path_factory.getbasetemp())):
        found = open_llama(path)
        stock = tokens_of(found, "The quick", temp=0.0)
        with sampling.fused(temperature=0) as sampler, sampler.installed(found):
            assert tokens_of(found, "The quick") == stock
        found.close()


def test_text_repeats_with_a_seed(llama: Any) -> None:
    with sampling.fused(temperature=1.0, seed=3) as sampler, sampler.installed(llama):
        first = text_of(llama, PROMPTS[0])
        second = text_of(llama, PROMPTS[0])
        sampler.reset()
        assert text_of(llama, PROMPTS[0], seed=99, temperature=0.0) == first, "the sampler's parameters count"
        assert second != first


def test_a_stream_is_drawn_by_it(llama: Any) -> None:
    with sampling.fused(temperature=1.0, seed=3) as sampler, sampler.installed(llama):
        whole = text_of(llama, PROMPTS[1])
        sampler.reset()
        llama.reset()
        parts = llama.create_completion(PROMPTS[1], max_tokens=40, stream=True)
        assert "".join(part["choices"][0]["text"] for part in parts) == whole


def test_draws_are_those_of_the_logits(llama: Any) -> None:
    """The very tokens that sample gives for the logits that llama.cpp computed."""
    import llama_cpp.llama_cpp as api

    from ggml_ext.runtime.llama import view

    with sampling.fused(temperature=1.0, seed=8) as sampler, sampler.installed(llama):
        tokens = tokens_of(llama, PROMPTS[2], 20)
    with sampling.fused(temperature=1.0, seed=8) as sampler:
        llama.reset()
        llama.eval(llama.tokenize(PROMPTS[2].encode()))
        for token in tokens:
            row = view(api.llama_get_logits_ith(llama.ctx, -1), np.float32, llama.n_vocab())
            assert sampler.sample(row) == token
            llama.eval([token])


def test_the_block_ends(llama: Any) -> None:
    stock = tokens_of(llama, PROMPTS[0], temp=0.0)
    with sampling.fused(temperature=2.0, seed=1) as sampler:
        with sampler.installed(llama):
            hot = tokens_of(llama, PROMPTS[0])
            with sampling.fused(temperature=0) as inner, inner.installed(llama):
                assert tokens_of(llama, PROMPTS[0]) == stock
            sampler.reset()
            assert tokens_of(llama, PROMPTS[0]) == hot
        assert hot != stock
        with pytest.raises(RuntimeError, match="the caller's"), sampler.installed(llama):
            raise RuntimeError("the caller's")
    assert tokens_of(llama, PROMPTS[0], temp=0.0) == stock


def test_what_a_call_asks_for_acts_before_it(llama: Any) -> None:
    from llama_cpp import LlamaGrammar, LogitsProcessorList

    grammar = LlamaGrammar.from_string("root ::= [0-9]+", verbose=False)
    with sampling.fused(temperature=0) as sampler:
        plain = tokens_of(llama, PROMPTS[0], temp=0.0)
        stock = tokens_of(llama, PROMPTS[0], temp=0.0, repeat_penalty=3.0, presence_penalty=1.0)
        assert stock != plain
        seen: list[int] = []

        def ban(tokens: NDArray[np.intc], scores: NDArray[np.float32]) -> NDArray[np.float32]:
            seen.append(len(tokens))
            scores[plain[0]] = -np.inf
            return scores

        with sampler.installed(llama):
            assert tokens_of(llama, PROMPTS[0], repeat_penalty=3.0, presence_penalty=1.0) == stock
            assert text_of(llama, PROMPTS[0], grammar=grammar).strip("0123456789") == ""
            banned = tokens_of(llama, PROMPTS[0], 10, logits_processor=LogitsProcessorList([ban]))
            biased = text_of(llama, PROMPTS[0], logit_bias={llama.token_eos(): 100.0})
        assert plain[0] not in banned
        assert len(seen) >= 10
        assert biased == ""


def test_mirostat_is_refused(llama: Any) -> None:
    with sampling.fused() as sampler, sampler.installed(llama):
        with pytest.raises(GgmlExtError, match="mirostat_mode=2 while a fused sampler is installed"):
            text_of(llama, PROMPTS[0], mirostat_mode=2)
        assert text_of(llama, PROMPTS[0])


def test_a_model_of_nan_raises(tmp_path: Path) -> None:
    found = open_llama(eval_models.make_model(tmp_path / "nan.gguf", nan=True))
    with sampling.fused() as sampler, sampler.installed(found):
        for settings in ({}, {"repeat_penalty": 1.1}):
            with pytest.raises(GgmlExtError, match="no token can be drawn: a logit is NaN"):
                tokens_of(found, "the of and", **settings)
    found.close()


def test_installing_elsewhere_is_refused() -> None:
    with (
        sampling.fused() as sampler,
        pytest.raises(GgmlExtError, match=r"no Llama .*; give a llama_cpp.Llama"),
        sampler.installed(object()),
    ):
        pass
