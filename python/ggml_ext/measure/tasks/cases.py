"""From a task, a length and a depth to tokens: the text with its statements, the question, the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.measure.tasks.filler import Filler, plain_words
from ggml_ext.measure.tasks.templates import STATEMENTS, TASKS, Needles, Template, make_needles

NEEDLE_SHARE = 16
"""Statements take at most this part of the text, so that keeping them is no matter of bytes."""

_POOL_SHARE = 0.7
"""Of the sentences: those that surely stay in the text when statements have taken their room."""

Tokenize = Callable[[str], NDArray[np.int32]]
"""Tokens [n] of a text, BOS first where the model wants one."""


class Spec(NamedTuple):
    """``length``: tokens of text, question and answer together, at most; ``depth``: 0 to 1, where the
    statement that is asked for (of a chain the first) stands; ``seed``: of everything drawn."""

    task: str
    length: int
    depth: float
    seed: int


class Case(NamedTuple):
    """Token ids: the ``text`` [n], and behind it what is ``asked`` [q] with the right answers, which are the
    tokens that ``answers`` [q] tells."""

    spec: Spec
    text: NDArray[np.int32]
    asked: NDArray[np.int32]
    answers: NDArray[np.bool_]


def make_case(
    spec: Spec, filler: Filler, tokenize: Tokenize, templates: Mapping[str, Sequence[Template]]
) -> Case:
    """The case that ``spec`` names, the same for equal arguments.

    Names and values are words of the text around the statements. Raises GgmlExtError for a length too short
    for the task's fewest statements, a text without enough words or shorter than the length, and a tokenizer
    that joins the question to its answer.
    """
    random = np.random.default_rng([spec.seed, TASKS.index(spec.task), spec.length, round(1e6 * spec.depth)])
    extra = len(tokenize(""))
    window = filler.window(spec.length, random)
    sentences, counts = filler.sentences[window], filler.tokens[window]
    words = sorted(filler.common & plain_words(sentences[: int(_POOL_SHARE * len(sentences))]).keys())
    random.shuffle(words)
    options = templates[spec.task]
    template = options[int(random.integers(len(options)))]

    def count(text: str) -> int:
        return len(tokenize(f" {text}")) - extra

    needles, taken = _fitting(spec, template, words, count)
    room = spec.length - extra - sum(taken) - count(_asked(needles))
    kept = int(np.searchsorted(np.cumsum(counts), room, side="right"))
    others = random.random(len(taken) - 1)
    text = _with_statements(sentences[:kept], counts[:kept], needles.statements, [spec.depth, *others])
    return _tokenized(spec, text, needles, tokenize)


def _fitting(
    spec: Spec, template: Template, words: Sequence[str], count: Callable[[str], int]
) -> tuple[Needles, list[int]]:
    """As many statements as NEEDLE_SHARE allows, and the tokens of each."""
    fewest, most = STATEMENTS[spec.task]
    for number in range(most, fewest - 1, -1):
        try:
            needles = make_needles(spec.task, template, iter(words), number)
        except StopIteration:
            continue
        taken = [count(statement) for statement in needles.statements]
        if NEEDLE_SHARE * sum(taken) <= spec.length:
            return needles, taken
        if number == fewest:
            raise GgmlExtError(
                f"length {spec.length}: too short for the task {spec.task}, whose statements of {sum(taken)} "
                f"tokens are more than 1/{NEEDLE_SHARE} of it; use --lengths from {NEEDLE_SHARE * sum(taken)}"
            )
    raise GgmlExtError(
        f"the text has only {len(words)} different common words in {spec.length} tokens, too few for the "
        f"task {spec.task}; give another text"
    )


def _with_statements(
    sentences: Sequence[str], counts: NDArray[np.int64], statements: Sequence[str], depths: Sequence[float]
) -> list[str]:
    """``sentences`` with each statement before the sentence that is nearest to its depth in tokens."""
    starts = np.concatenate([[0], np.cumsum(counts)])
    places = [int(np.abs(starts - depth * starts[-1]).argmin()) for depth in depths]
    found = []
    for i in range(len(sentences) + 1):
        found += [text for text, place in zip(statements, places, strict=True) if place == i]
        found += sentences[i : i + 1]
    return found


def _asked(needles: Needles) -> str:
    """All steps with their answers."""
    return "".join(f"{text} {answer}" for text, answer in needles.steps)


def _tokenized(spec: Spec, sentences: Sequence[str], needles: Needles, tokenize: Tokenize) -> Case:
    """The whole is tokenized at once, as a user's prompt is; its parts must be the beginnings of it."""
    # A blank before the first word too: it is the same token there as everywhere else.
    text = f" {' '.join(sentences)}"
    so_far = f"{text} "
    whole = tokenize(so_far + _asked(needles))
    parts, cuts = [tokenize(text)], []
    for question, answer in needles.steps:
        parts += [tokenize(f"{so_far}{question}"), tokenize(f"{so_far}{question} {answer}")]
        cuts.append(slice(len(parts[-2]), len(parts[-1])))
        so_far += f"{question} {answer}"
    if not all(np.array_equal(whole[: len(part)], part) for part in parts):
        raise GgmlExtError(
            "the model's tokenizer joins words across blanks, so an answer has no tokens of its own; this "
            "model cannot be asked"
        )
    answers = np.zeros(len(whole), np.bool_)
    for cut in cuts:
        answers[cut] = True
    begin = len(parts[0])
    return Case(spec, parts[0], whole[begin:], answers[begin:])
