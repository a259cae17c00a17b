"""The fused sampler inside llama.cpp's graph (llama_set_sampler): the tokens that it draws from the logits.

What would break these: parameters, seeds or rows of another sequence, a random number more or less per token,
a sampler whose op llama.cpp leaves out, logits that are changed on the way to the op.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggml_ext.convert import convert
from ggml_ext.runtime import sampling

PROMPTS = ("The function returns", "A class is", "import os\n", "for i in range")
SETTINGS: tuple[dict[str, Any], ...] = (
    {"seed": 1},
    {"seed": 2, "top_k": 0, "top_p": 0.9, "min_p": 0.0, "temperature": 1.3},
    {"seed": 3, "top_k": 7, "top_p": 1.0, "min_p": 0.2, "temperature": 1.0},
    {"seed": 4, "temperature": 0.0},
)
STEPS = 24


@pytest.fixture(scope="module")
def model(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import llama_cpp.llama_cpp as api

    path = tmp_path_factory.getbasetemp() / "pydoc-8m-f16.gguf"
    if not path.exists():
        convert(repo_root / "tests" / "models" / "pydoc-8m", path, type_name="f16")
    api.llama_backend_init()
    found = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    assert found
    yield found
    api.llama_model_free(found)


def prompt_of(model: Any, text: str) -> list[int]:
    import llama_cpp.llama_cpp as api

    tokens = (api.llama_token * 64)()
    data = text.encode()
    count = api.llama_tokenize(api.llama_model_get_vocab(model), data, len(data), tokens, 64, True, False)
    assert count > 0
    return list(tokens[:count])


def chain_of(settings: dict[str, Any]) -> Any:
    """A chain that holds nothing but the fused sampler."""
    import llama_cpp.llama_cpp as api

    chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
    with sampling.fused(**settings) as sampler:
        sampler.add_to(chain)
    return chain


class Sequences:
    """One context that generates for all prompts at once, by the samplers in its graph or from its logits."""

    def __init__(self, model: Any, settings: tuple[dict[str, Any], ...], backend: bool) -> None:
        import llama_cpp.llama_cpp as api

        self.api, self.model, self.backend = api, model, backend
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = 512, len(settings)
        params.n_threads = params.n_threads_batch = 1
        params.kv_unified = True
        self.context = api.llama_init_from_model(model, params)
        self.n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self.batch = api.llama_batch_init(512, 0, 1)
        self.chains = [chain_of(one) for one in settings] if backend else []
        self.samplers = [] if backend else [sampling.fused(**one) for one in settings]
        for i, chain in enumerate(self.chains):
            assert api.llama_set_sampler(self.context, i, chain)

    def close(self) -> None:
        self.api.llama_batch_free(self.batch)
        self.api.llama_free(self.context)
        for chain in self.chains:
            self.api.llama_sampler_free(chain)
        for sampler in self.samplers:
            sampler.close()

    def draw(self, sequence: int, row: int) -> int:
        if self.backend:
            token = int(self.api.llama_get_sampled_token_ith(self.context, row))
            assert token >= 0, "the graph has drawn it"
            assert self.api.llama_sampler_sample(self.chains[sequence], self.context, row) == token
            return token
        logits = np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, row), (self.n_vocab,))
        return self.samplers[sequence].sample(logits.copy())

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in prompts]
        ahead, positions = prompts, [0] * len(prompts)
        for _ in range(STEPS):
            rows = []
            self.batch.n_tokens = 0
            for sequence, tokens in enumerate(ahead):
                for i, token in enumerate(tokens):
                    at = self.batch.n_tokens
                    self.batch.token[at], self.batch.pos[at] = token, positions[sequence] + i
                    self.batch.n_seq_id[at], self.batch.seq_id[at][0] = 1, sequence
                    self.batch.logits[at] = i == len(tokens) - 1
                    self.batch.n_tokens += 1
                rows.append(self.batch.n_tokens - 1)
                positions[sequence] += len(tokens)
            assert self.api.llama_decode(self.context, self.batch) == 0
            ahead = [[self.draw(sequence, row)] for sequence, row in enumerate(rows)]
            for tokens, (token,) in zip(found, ahead, strict=True):
                tokens.append(token)
        return found


def generate(model: Any, settings: tuple[dict[str, Any], ...], *, backend: bool) -> list[list[int]]:
    sequences = Sequences(model, settings, backend)
    try:
        return sequences.generate([prompt_of(model, text) for text in PROMPTS])
    finally:
        sequences.close()


def test_draws_what_it_draws_from_the_logits(model: Any) -> None:
    expected = generate(model, SETTINGS, backend=False)
    assert generate(model, SETTINGS, backend=True) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS), "sequences differ"


def test_a_seed_repeats_itself(model: Any) -> None:
    first = generate(model, SETTINGS, backend=True)
    assert generate(model, SETTINGS, backend=True) == first
    others = tuple({**one, "seed": one["seed"] + 10} for one in SETTINGS)
    other = generate(model, others, backend=True)
    assert [a == b for a, b in zip(first, other, strict=True)] == [False, False, False, True], (
        "greedy has no draw"
    )


def test_a_chain_in_another_order_stays_on_the_processor(model: Any) -> None:
    import llama_cpp.llama_cpp as api

    params = api.llama_context_default_params()
    params.n_ctx = 64
    context = api.llama_init_from_model(model, params)
    chain = chain_of({"seed": 1, "order": ("temperature", "top_p"), "top_p": 0.9})
    api.llama_set_sampler(context, 0, chain)
    tokens = prompt_of(model, PROMPTS[0])
    batch = api.llama_batch_get_one((ctypes.c_int32 * len(tokens))(*tokens), len(tokens))
    assert api.llama_decode(context, batch) == 0
    assert api.llama_get_sampled_token_ith(context, -1) == -1, "nothing drawn in the graph"
    assert api.llama_sampler_sample(chain, context, -1) >= 0
    api.llama_free(context)
    api.llama_sampler_free(chain)
