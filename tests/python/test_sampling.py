"""The fused sampler in Python: the same kept set as upstream's chain, the same text, the same draws by seed.

What would break these: a stage in another place or with another meaning than upstream's, a generator that a
clone or a chain shares, a Llama that goes on with its own sampler, an array read with the wrong type.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

import eval_models
import models
from ggml_ext import sampling
from ggml_ext.convert import convert
from ggml_ext.errors import GgmlExtError

N_VOCAB = 4000
PROMPTS = ("The function returns", "A class is", "import os\n")
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "top_k": {**OFF, "top_k": 17},
    "top_p": {**OFF, "top_p": 0.9},
    "min_p": {**OFF, "min_p": 0.02},
    "typical_p": {**OFF, "typical_p": 0.7},
    "off": {**OFF, "temperature": 1.3},
    "all": {"top_k": 900, "top_p": 0.8, "min_p": 0.001, "typical_p": 0.9, "temperature": 0.6},
    "min_keep": {**OFF, "top_p": 0.01, "min_keep": 12},
    "temperature first": {
        **OFF,
        "top_p": 0.7,
        "min_p": 0.01,
        "temperature": 1.7,
        "order": ("temperature", "min_p", "top_p"),
    },
    "greedy": {"temperature": 0.0},
}


def logits_of(seed: int, scale: float) -> NDArray[np.float32]:
    return (scale * np.random.default_rng(seed).standard_normal(N_VOCAB)).astype(np.float32)


def upstream_chain(
    *,
    temperature: float = 0.8,
    top_k: int = 40,
    top_p: float = 0.95,
    min_p: float = 0.05,
    typical_p: float = 1.0,
    min_keep: int = 1,
    order: tuple[str, ...] = tuple(sampling.STAGES),
) -> Any:
    """llama.cpp's samplers for the same parameters, without a draw."""
    from llama_cpp._internals import LlamaSampler

    chain = LlamaSampler()
    add: dict[str, Callable[[], None]] = {
        "top_k": lambda: chain.add_top_k(top_k),
        "typical_p": lambda: chain.add_typical(typical_p, min_keep),
        "top_p": lambda: chain.add_top_p(top_p, min_keep),
        "min_p": lambda: chain.add_min_p(min_p, min_keep),
        "temperature": lambda: chain.add_temp(temperature),
    }
    for name in order:
        add[name]()
    return chain


def upstream_kept(logits: NDArray[np.float32], **settings: Any) -> dict[int, float]:
    """Token -> probability of what upstream's chain leaves to its draw."""
    chain = upstream_chain(**settings)
    rows, _ = sampling.apply(logits, sampling.address(chain.sampler))
    chain.close()
    weights = np.exp(rows["logit"].astype(np.float64) - rows["logit"].max())
    shares = weights / weights.sum()
    return {int(token): float(p) for token, p in zip(rows["id"], shares, strict=True) if p > 0}


@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("name", SETTINGS)
def test_keeps_what_upstreams_chain_keeps(name: str, scale: float) -> None:
    for seed in range(5):
        logits = logits_of(seed, scale)
        expected = upstream_kept(logits, **SETTINGS[name])
        with sampling.fused(**SETTINGS[name], seed=1) as sampler:
            ids, probabilities = sampler.kept(logits)
            token = sampler.sample(logits)
        assert ids.dtype == np.int32
        assert probabilities.dtype == np.float32
        assert set(ids.tolist()) == set(expected)
        assert probabilities == pytest.approx([expected[int(i)] for i in ids], rel=1e-4)
        assert token in expected


def test_draws_follow_the_probabilities() -> None:
    logits = logits_of(1, 2.0)
    with sampling.fused(top_k=30, seed=11) as sampler:
        ids, probabilities = sampler.kept(logits)
        draws = [sampler.sample(logits) for _ in range(20_000)]
    counts = np.array([draws.count(int(i)) for i in ids])
    assert counts.sum() == len(draws), "nothing else is drawn"
    assert stats.chisquare(counts, len(draws) * probabilities.astype(np.float64)).pvalue > 1e-4


def test_greedy_is_the_largest_logit_and_ties_go_to_the_lower_id() -> None:
    logits = logits_of(2, 1.0)
    logits[[70, 3000]] = logits.max() + 1
    with sampling.fused(temperature=0) as sampler:
        assert {sampler.sample(logits) for _ in range(10)} == {70}


def draws(sampler: sampling.FusedSampler, count: int = 40) -> list[int]:
    logits = logits_of(3, 1.0)
    return [sampler.sample(logits) for _ in range(count)]


def test_a_seed_repeats_itself() -> None:
    with sampling.fused(seed=5) as one, sampling.fused(seed=5) as two, sampling.fused(seed=6) as other:
        first = draws(one)
        assert draws(two) == first
        assert draws(other) != first
        assert draws(one) != first, "the generator goes on"
        one.reset()
        assert draws(one) == first


def test_without_a_seed_samplers_differ() -> None:
    with sampling.fused() as one, sampling.fused() as two:
        first, seed = draws(one), one.seed
        assert draws(two) != first
        with sampling.fused(seed=seed) as same, one.clone() as clone:
            assert draws(same) == first
            assert clone.seed == seed
        one.reset()
        assert one.seed != seed
        assert draws(one) != first


def test_a_clone_goes_on_from_the_same_state() -> None:
    sampler = sampling.fused(seed=9)
    draws(sampler)
    clone = sampler.clone()
    expected = draws(sampler)
    sampler.close()
    assert draws(clone) == expected
    clone.close()


def test_in_a_chain_it_draws_as_by_itself() -> None:
    from llama_cpp._internals import LlamaSampler

    with sampling.fused(seed=4, top_k=200) as sampler:
        chain = LlamaSampler()
        chain.add_logit_bias(N_VOCAB, {7: 3.0})
        sampler.add_to(chain)
        logits = logits_of(6, 1.0)
        biased = logits.copy()
        biased[7] += 3.0
        for _ in range(40):
            rows, selected = sampling.apply(logits, sampling.address(chain.sampler))
            assert rows["id"][selected] == sampler.sample(biased)
        chain.close()
        assert draws(sampler), "the chain freed a clone"


def test_adding_to_no_chain_is_refused() -> None:
    from llama_cpp import llama_cpp as api
    from llama_cpp._internals import LlamaSampler

    closed = LlamaSampler()
    closed.close()
    single = api.llama_sampler_init_greedy()
    with sampling.fused() as sampler:
        for wrong in (closed, None, single):
            with pytest.raises(GgmlExtError, match=r"no sampler chain: .*; give an open"):
                sampler.add_to(wrong)
    api.llama_sampler_free(single)


GOOD = logits_of(1, 1.0)


def spoiled(value: float, where: int | slice = 5) -> NDArray[np.float32]:
    logits = GOOD.copy()
    logits[where] = value
    return logits


WRONG = {
    "float64": (GOOD.astype(np.float64), "wrong logits: float64 [4000]"),
    "two dimensions": (GOOD.reshape(2, -1), "wrong logits: float32 [2, 2000]"),
    "stride": (GOOD[::2], "wrong logits: float32 [2000]; give float32 [n_vocab] in C order"),
    "empty": (GOOD[:0], "wrong logits: float32 [0]"),
    "NaN": (spoiled(np.nan), "no token can be drawn: a logit is NaN"),
    "Inf": (spoiled(np.inf), "no token can be drawn"),
    "nothing": (spoiled(-np.inf, slice(None)), "no token can be drawn"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_logits_are_refused(case: str) -> None:
    logits, message = WRONG[case]
    for temperature in (0.0, 0.8):
        with sampling.fused(temperature=temperature, seed=1) as sampler:
            for call in (sampler.sample, sampler.kept):
                with pytest.raises(GgmlExtError) as caught:
                    call(logits)
                assert message in str(caught.value)
            assert 0 <= sampler.sample(GOOD) < N_VOCAB, "still usable"


def test_tokens_at_minus_infinity_are_never_drawn() -> None:
    logits = np.full(N_VOCAB, -np.inf, np.float32)
    logits[[3, 900]] = 0.0
    with sampling.fused(**OFF, seed=1) as sampler:
        assert {sampler.sample(logits) for _ in range(100)} == {3, 900}
        ids, probabilities = sampler.kept(logits)
        assert ids[probabilities > 0].tolist() == [3, 900]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": float("nan")}, "temperature is nan; give a finite number"),
        ({"top_p": float("inf")}, "top_p is inf"),
        ({"top_k": 2**31}, "top_k is 2147483648; give a number from"),
        ({"min_keep": -1}, "min_keep is -1"),
        ({"seed": 2**32 - 1}, "seed is 4294967295"),
        ({"seed": -1}, "seed is -1"),
        ({"order": ("top_k", "top_n_sigma")}, "unknown stage: top_n_sigma; there are: top_k, typical_p"),
        ({"order": ("top_k", "top_p", "top_k")}, "a stage stands twice in the order top_k, top_p, top_k"),
    ],
)
def test_wrong_parameters_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GgmlExtError) as caught:
        sampling.fused(**settings)
    assert message in str(caught.value)


def test_a_closed_sampler_says_so() -> None:
    sampler = sampling.fused()
    sampler.close()
    sampler.close()
    calls: tuple[Callable[[], Any], ...] = (
        lambda: sampler.sample(GOOD),
        lambda: sampler.kept(GOOD),
        lambda: sampler.seed,
        sampler.reset,
        sampler.clone,
        lambda: sampler.add_to(upstream_chain()),
    )
    for call in calls:
        with pytest.raises(GgmlExtError, match=r"the sampler is closed; make another"):
            call()


# --- in a Llama ---


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

    from ggml_ext.llama import view

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
