"""The fused sampler in Python: the same kept set as upstream's chain, the same text, the same draws by seed.

What would break these: a stage in another place or with another meaning than upstream's, a generator that a
clone or a chain shares, a Llama that goes on with its own sampler, an array read with the wrong type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.runtime import sampling

N_VOCAB = 4000
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
