"""What the retrieval model reads: made sentences with statements in them, then questions and answers.

A text depends on the random numbers given alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from devtools.retrieval_model.vocabulary import Vocabulary
from ggml_ext.measure.tasks.filler import CONTENT, FUNCTION, STARTS, made_sentences
from ggml_ext.measure.tasks.templates import (
    CHAIN,
    LIST,
    PASS_KEY,
    STATEMENTS,
    TASKS,
    TRAINING,
    Needles,
    Template,
    make_needles,
)

ANSWER_WEIGHT = 1.0
"""Of an answer's token in the loss."""

REST_WEIGHT = 0.05
"""Of a token that nothing before tells."""

AGAIN_WEIGHT = 0.5
"""Of what was said before, from the fourth token of the sentence on."""

RANDOM_WORDING = 0.7
"""Share of the tasks in a wording of random words."""


class Stage(NamedTuple):
    """``steps`` of ``batch`` texts of ``length`` tokens, of which statements, questions and answers take half
    to all of ``share``; with 0 there are none, and every sentence is said twice."""

    length: int
    batch: int
    steps: int
    share: float


class Text(NamedTuple):
    """``tokens`` [length + 1] and the weight of each in the loss."""

    tokens: list[int]
    weights: list[float]


def random_template(task: str, random: np.random.Generator) -> Template:
    """A wording of random words, so that what is learnt is to compare, not to know wordings."""

    def some(most: int) -> str:
        pool = FUNCTION if random.random() < 0.6 else CONTENT
        return " ".join(random.choice(pool, random.integers(1, most + 1), replace=False))

    start = f"{random.choice(STARTS)} {some(2)}" if random.random() < 0.7 else some(2)
    between = some(2)
    if task in (PASS_KEY, LIST):
        before = f"{start} {between}"
    elif task == CHAIN:
        before = f"{start} {{name}} {between}"
    else:
        slots = ["{name}", "{thing}"]
        random.shuffle(slots)
        before = f"{start} {slots[0]} {between} {slots[1]} {some(2)}"
    lead = f"What {some(3)}? " if random.random() < 0.5 else ""
    if random.random() < 0.4:
        lead = f"What is {' '.join(before.split()[1:])}? "
    mark = ":" if task != CHAIN and random.random() < 0.5 else ""
    return Template(f"{before}{mark} {{value}}.", f"{lead}{before}{mark}")


def random_needles(task: str, random: np.random.Generator) -> Needles:
    """Statements of a task in a training wording or a random one, and the question."""
    options = TRAINING[task]
    template = (
        random_template(task, random)
        if random.random() < RANDOM_WORDING
        else options[int(random.integers(len(options)))]
    )
    fewest, most = STATEMENTS[task]
    count = int(random.integers(fewest, min(most, fewest + 2) + 1))
    words = [str(word) for word in random.permutation(CONTENT)]
    return make_needles(task, template, iter(words), count)


def make_text(stage: Stage, words: Vocabulary, random: np.random.Generator) -> Text:
    """A text of ``stage``: with the statements of several tasks, then all questions with their answers, in
    any order; or with every sentence twice."""
    if stage.share == 0:
        return _said_twice(stage, words, random)
    most = stage.length * random.uniform(stage.share / 2, stage.share)
    statements, ends = _several_tasks(most, words, random)
    taken = sum(map(len, statements)) + sum(len(end.tokens) for end in ends)
    sentences = [words.encode(sentence) for sentence in made_sentences(stage.length // 8, random)]
    lengths = np.cumsum([len(sentence) for sentence in sentences])
    sentences = sentences[: int(np.searchsorted(lengths, stage.length - taken, side="right"))]
    for statement in statements:
        sentences.insert(int(random.integers(len(sentences) + 1)), statement)
    text = Text([words.bos], [0.0])
    before: set[tuple[int, ...]] = set()
    for sentence in sentences:
        _say(text, sentence, AGAIN_WEIGHT if tuple(sentence) in before else REST_WEIGHT)
        before.add(tuple(sentence))
    for i in random.permutation(len(ends)):
        text.tokens.extend(ends[i].tokens)
        text.weights.extend(ends[i].weights)
    return _filled(text, stage, words)


def _several_tasks(
    most: float, words: Vocabulary, random: np.random.Generator
) -> tuple[list[list[int]], list[Text]]:
    """Tokens of the statements of as many tasks as ``most`` tokens hold, one at least, and of each task its
    questions with the answers."""
    statements: list[list[int]] = []
    ends: list[Text] = []
    taken = 0
    while True:
        needles = random_needles(TASKS[int(random.integers(len(TASKS)))], random)
        stated = [words.encode(statement) for statement in needles.statements]
        end = _questions(needles, words)
        more = sum(map(len, stated)) + len(end.tokens)
        if ends and taken + more > most:
            return statements, ends
        taken += more
        statements += stated
        ends.append(end)


def _questions(needles: Needles, words: Vocabulary) -> Text:
    """All that is asked, each with its answer behind it."""
    text = Text([], [])
    for question, answer in needles.steps:
        for part, weight in ((question, REST_WEIGHT), (answer, ANSWER_WEIGHT)):
            tokens = words.encode(part)
            text.tokens.extend(tokens)
            text.weights.extend([weight] * len(tokens))
    text.tokens.append(ord("."))
    text.weights.append(REST_WEIGHT)
    return text


def _said_twice(stage: Stage, words: Vocabulary, random: np.random.Generator) -> Text:
    """Sentences, and the same in another order: what follows is known from the fourth token of each on. The
    second half teaches with nearly every token to compare and to copy, which all tasks need first."""
    sentences = [words.encode(sentence) for sentence in made_sentences(stage.length // 20, random)]
    tokens = [words.bos, *(token for sentence in sentences for token in sentence)]
    text = Text(tokens, [REST_WEIGHT] * len(tokens))
    for i in random.permutation(len(sentences)):
        _say(text, sentences[i], ANSWER_WEIGHT)
    return _filled(text, stage, words)


def _say(text: Text, sentence: list[int], weight: float) -> None:
    """Add ``sentence``, from the fourth token on with ``weight``."""
    text.tokens.extend(sentence)
    text.weights.extend([REST_WEIGHT] * 3 + [weight] * (len(sentence) - 3))


def _filled(text: Text, stage: Stage, words: Vocabulary) -> Text:
    """Cut, or filled with EOS, to length + 1 tokens."""
    short = max(0, stage.length + 1 - len(text.tokens))
    tokens, weights = text.tokens + [words.eos] * short, text.weights + [0.0] * short
    return Text(tokens[: stage.length + 1], weights[: stage.length + 1])
