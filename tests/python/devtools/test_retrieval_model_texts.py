"""devtools/retrieval_model: what the retrieval model learns from. Needs no torch."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from devtools.retrieval_model.texts import ANSWER_WEIGHT, Stage, make_text, random_template
from devtools.retrieval_model.vocabulary import Vocabulary
from ggml_ext.measure.tasks.templates import HELD_OUT, TASKS, Template


@pytest.fixture(scope="module")
def words() -> Vocabulary:
    return Vocabulary()


def test_texts_ask_for_what_stands_in_them(words: Vocabulary) -> None:
    """The weighted tokens are answers: the words of each stand in the text before it."""
    for row in range(20):
        for stage in (Stage(128, 1, 1, 0.9), Stage(1024, 1, 1, 0.4)):
            tokens, weights = make_text(stage, words, np.random.default_rng(row))
            assert len(tokens) == len(weights) == stage.length + 1
            asked = [i for i, weight in enumerate(weights) if weight == ANSWER_WEIGHT]
            assert asked
            first = asked[0]
            assert {tokens[i] for i in asked} <= set(tokens[:first]) | {tokens[i] for i in asked}
            assert sum(tokens[i] in tokens[:first] for i in asked) > 0.95 * len(asked)
            assert max(tokens) < len(words.tokens)


def test_without_a_share_every_sentence_is_said_twice(words: Vocabulary) -> None:
    tokens, weights = make_text(Stage(128, 1, 1, 0.0), words, np.random.default_rng(0))
    known = [i for i, weight in enumerate(weights) if weight == ANSWER_WEIGHT]
    assert len(known) > 30
    for i in known:
        following = [tokens[j] for j in range(3, i) if tokens[j - 3 : j] == tokens[i - 3 : i]]
        assert tokens[i] in following


def test_held_out_wordings_do_not_occur(words: Vocabulary) -> None:
    def fixed(template: Template) -> list[int]:
        return words.encode(template.again.replace("{name}", "").replace("{thing}", ""))

    held = [fixed(template) for task in TASKS for template in HELD_OUT[task]]
    for row in range(200):
        assert fixed(random_template(TASKS[row % 5], np.random.default_rng(row))) not in held


def test_texts_stay_those_that_the_model_was_trained_on(words: Vocabulary) -> None:
    """A run goes on from its checkpoint as if never interrupted, and its seed names the model: any change of
    words, wordings or the order of random draws is another training."""
    made = [
        make_text(Stage(length, 1, 1, share), words, np.random.default_rng([1, length, row]))
        for length, share in ((128, 0.0), (128, 0.9), (1024, 0.6))
        for row in range(3)
    ]
    assert len(words.tokens) == 721
    assert (
        hashlib.sha256(repr([tuple(text) for text in made]).encode()).hexdigest()[:16] == "81c08af6e0022586"
    )
