"""The five retrieval tasks and their wordings. docs/retrieval.md describes them.

A wording states a fact inside the text and asks for it at its end in the words of the statement, so that the
answer continues the question. Words are common ones, and what is stated consists of words of the text around
it: nothing but the sentence itself tells that it matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

PASS_KEY, SEVERAL_KEYS, DISTRACTORS, LIST, CHAIN = "pass-key", "several-keys", "distractors", "list", "chain"

TASKS = (PASS_KEY, SEVERAL_KEYS, DISTRACTORS, LIST, CHAIN)

VALUE_WORDS = 4
"""Words of a value: an answer needs what several tokens left in the cache."""

LIST_WORDS = 6

STATEMENTS: Mapping[str, tuple[int, int]] = {
    PASS_KEY: (1, 1),
    SEVERAL_KEYS: (2, 8),
    DISTRACTORS: (2, 8),
    LIST: (1, 1),
    CHAIN: (3, 4),
}
"""Fewest and most statements of a task; texts get as many as may stand in them."""


@dataclass(frozen=True)
class Template:
    """``statement`` with the fields {thing}, {name}, {value}; ``question`` ends where the answer begins.

    A value that stands there twice is one that small models give exactly: what they get wrong of a value said
    once is a word that seldom follows the one before it.
    A chain's value is the next name. What a chain asks with next is the statement again, up to its value.
    """

    statement: str
    question: str

    @property
    def again(self) -> str:
        """The statement up to its first value."""
        return self.statement.partition(" {value}")[0]


@dataclass(frozen=True)
class Needles:
    """``statements``, the one that is asked for first; ``steps``: what is asked, and what has to follow after
    a blank. A later step goes on behind the right answer to the one before."""

    statements: tuple[str, ...]
    steps: tuple[tuple[str, str], ...]


_KEYED_TRAINING = (
    Template("In the {name} the {thing} is called {value}.", "In the {name} the {thing} is called"),
    Template("The {name} has the {thing}: {value}.", "What has it? The {name} has the {thing}:"),
    Template("To the {thing} by the {name} belong {value}.", "To the {thing} by the {name} belong"),
    Template("His {thing} about {name} said: {value}.", "What did it say? His {thing} about {name} said:"),
)
_KEYED_HELD_OUT = (
    Template(
        "The {thing} of the {name} is: {value}.",
        "What is the {thing} of the {name}? The {thing} of the {name} is:",
    ),
    Template(
        "For the {name} the {thing} was: {value}.",
        "What was it for the {name}? For the {name} the {thing} was:",
    ),
)

TRAINING: Mapping[str, tuple[Template, ...]] = {
    PASS_KEY: (
        Template("The secret word is {value}.", "What is the secret word? The secret word is"),
        Template("They told her the sign: {value}.", "They told her the sign:"),
        Template("You will need the code {value}.", "What will you need? You will need the code"),
        Template("At the gate say: {value}.", "At the gate say:"),
    ),
    SEVERAL_KEYS: _KEYED_TRAINING,
    DISTRACTORS: _KEYED_TRAINING,
    LIST: (
        Template("She bought {value}.", "What did she buy? She bought"),
        Template("On the table lay {value}.", "On the table lay"),
        Template("The old book names: {value}.", "What does the book name? The old book names:"),
    ),
    CHAIN: (
        Template("After the {name} comes the {value}.", "After the {name} comes the"),
        Template("The {name} belongs to {value}.", "Whose is it? The {name} belongs to"),
        Template("Behind the {name} stands {value}.", "Behind the {name} stands"),
    ),
}
"""What the retrieval model of scripts/train_retrieval_model.py is trained on."""

HELD_OUT: Mapping[str, tuple[Template, ...]] = {
    PASS_KEY: (
        Template("The pass key is: {value}. Remember: {value}.", "What is the pass key? The pass key is:"),
        Template(
            "Remember this answer: {value}. Remember: {value}.",
            "What was the answer? Remember this answer:",
        ),
    ),
    SEVERAL_KEYS: _KEYED_HELD_OUT,
    DISTRACTORS: _KEYED_HELD_OUT,
    LIST: (
        Template("The things on the list are: {value}.", "What is on it? The things on the list are:"),
        Template("The names in order are: {value}.", "Which names? The names in order are:"),
    ),
    CHAIN: (
        Template("The road from {name} leads to {value}.", "The road from {name} leads to"),
        Template("A letter of {name} speaks of {value}.", "A letter of {name} speaks of"),
    ),
}
"""What models are judged on. The made language, and so the retrieval model's vocabulary, has the words of all
wordings: others would ask for another training."""


def template_words(template: Template) -> set[str]:
    """The words of a wording, as spelled there, without fields and marks."""
    parts = [part.strip(".,:?") for part in f"{template.statement} {template.question}".split()]
    return {part for part in parts if not part.startswith("{")}


def make_needles(task: str, template: Template, words: Iterator[str], count: int) -> Needles:
    """``count`` statements of ``task`` with names and values out of ``words``, all different.

    distractors: every other statement has the same thing of another name, the rest another thing of the same
    name. chain: a statement leads to the next, and so do the steps.
    """

    def take(n: int) -> list[str]:
        return [next(words) for _ in range(n)]

    if task == CHAIN:
        pairs = list(pairwise(take(count + 1)))
        asked = [template.question, *[f". {template.again}"] * (count - 1)]
        return Needles(
            tuple(template.statement.format(name=name, value=value) for name, value in pairs),
            tuple((text.format(name=name), value) for text, (name, value) in zip(asked, pairs, strict=True)),
        )
    fields = {"name": next(words), "thing": next(words)}
    separator = ", " if task == LIST else " "
    answer = separator.join(take(LIST_WORDS if task == LIST else VALUE_WORDS))
    statements = [template.statement.format(**fields, value=answer)]
    for i in range(1, count):
        changed = "thing" if task == DISTRACTORS and i % 2 else "name"
        value = " ".join(take(VALUE_WORDS))
        statements.append(template.statement.format(**{**fields, changed: next(words)}, value=value))
    return Needles(tuple(statements), ((template.question.format(**fields), answer),))


def templates_words(*sets: Mapping[str, Sequence[Template]]) -> list[str]:
    """All words of sets of wordings, sorted."""
    found = {w for each in sets for group in each.values() for t in group for w in template_words(t)}
    return sorted(found)
