"""The text around the statements: sentences of a file, or of a language made for the retrieval model.

The made language has the words below and the wordings' own, all equally likely within a kind, so that no
token is rarer in the text than in a statement. Three kinds of sentence: noise; facts in wordings that no task
has, as "The A with the B had C D E."; and earlier facts said again. Facts give a model something to recall in
texts without any task, so that statistics and probes can be fitted there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.measure.tasks.templates import HELD_OUT, TRAINING, templates_words

STARTS = (
    "The", "A", "In", "And", "But", "When", "They", "He", "She", "It", "Then", "One", "For", "This",
)  # fmt: skip

FUNCTION = (
    "the", "of", "and", "to", "in", "that", "is", "was", "he", "for", "it", "with", "as", "his", "on", "be",
    "at", "by", "had", "not", "but", "from", "she", "or", "an", "they", "which", "you", "were", "her", "all",
    "their", "there", "been", "if", "more", "when", "will", "would", "who", "so", "no", "out", "up", "into",
    "them", "then", "its", "only", "some", "could", "these", "two", "may", "do", "first", "any", "my", "now",
)  # fmt: skip

CONTENT = tuple(
    """
    apple arrow autumn baker basket bell bird blanket boat bone bottle branch bread bridge brother brush
    bucket butter button cabin candle captain carpet castle cat cattle chain chair cheese child church
    circle city clock cloth cloud coat coffee corner cotton country cousin cow cradle crown cup curtain
    daughter desert dinner doctor dog door dragon dress drum duck dust eagle ear earth egg engine
    evening eye face farm father feather fence field finger fire fish flag flame floor flour flower fog
    forest fox friend frog fruit garden gate ghost giant girl glass glove goat gold goose grain grass
    grave guest guitar hall hammer hand harbor hat hawk heart hill honey horn horse hospital hotel
    hunter ice iron island jacket jar jewel judge juice jungle kettle king kitchen kite knee knife
    knight ladder lady lake lamp lantern leaf leather lemon library light lily lion lock log machine
    maid map maple market mask master meadow meal meat medicine melon metal milk mill miner mirror money
    monkey moon morning moss mother mountain mouse mouth mud museum music nail neck needle nest net
    night north nurse nut oak ocean office oil onion orange owl oven page paint palace paper park path
    peach pearl pen pepper piano picture pig pillow pilot pipe pirate plant plate pocket poem poet pond
    pony potato powder priest prince prison purse queen rabbit rain rat raven ribbon rice ring river
    road robe rock roof room root rope rose sail sailor salt sand school sea seed shadow sheep shell
    shelf ship shirt shoe shop shore silk silver singer sister skin sky smoke snake snow soap soldier
    son song soup south spider spoon spring square stable stair star station statue steam steel step
    stick stone storm story stove straw stream street string sugar summer sun swan sweet sword table
    tailor tea teacher tent thread throne thunder tiger timber tobacco tooth torch tower town toy train
    tree trumpet tunnel turkey uncle valley vessel village violin voice wagon wall water wave wax
    weather wheel whistle widow wife wind window wine winter wire witch wolf wood wool world worm yard
    """.split()  # noqa: SIM905
)

FACT, SAID_AGAIN, COLON = 0.1, 0.1, 0.2
"""Shares of the sentences; of those that are noise, with a colon."""

COMMON = 3
"""A word of a statement stands in the whole text at least as often: rarer ones are often no single token."""

_OWNED, _HOLDS = ("with", "by", "from", "into"), ("had", "would", "may", "could")

MOST_WORDS = 60
"""Longer sentences of a file are cut."""

_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"[a-z]{4,}")


def vocabulary() -> list[str]:
    """Every word of the made language and of all wordings, sorted; marks are not among them."""
    return sorted({*STARTS, *FUNCTION, *CONTENT, *templates_words(TRAINING, HELD_OUT)})


def made_sentences(count: int, random: np.random.Generator) -> list[str]:
    """``count`` sentences of the made language, one text."""
    content, starts = np.array(CONTENT), np.array(STARTS)
    others = np.array(sorted({*FUNCTION, *templates_words(TRAINING, HELD_OUT)} - set(CONTENT)))
    facts: list[str] = []
    found: list[str] = []
    for _ in range(count):
        kind = random.random()
        if kind < SAID_AGAIN and facts:
            sentence = facts[random.integers(len(facts))]
        elif kind < SAID_AGAIN + FACT:
            thing, name, *values = content[random.choice(len(content), 5, replace=False, shuffle=False)]
            between, verb = _OWNED[random.integers(4)], _HOLDS[random.integers(4)]
            sentence = f"The {thing} {between} the {name} {verb} {' '.join(values)}."
            facts.append(sentence)
        else:
            length = int(random.integers(5, 13))
            words = np.where(
                random.random(length) < 0.5,
                content[random.integers(len(content), size=length)],
                others[random.integers(len(others), size=length)],
            )
            mark = ":" if random.random() < COLON else ""
            start = starts[random.integers(len(starts))]
            sentence = f"{start} {words[0]}{mark} {' '.join(words[1:])}."
        found.append(sentence)
    return found


def text_sentences(text: str) -> list[str]:
    """The sentences of a text, with single blanks, long ones in pieces of MOST_WORDS words."""
    found = []
    for sentence in _SENTENCE.split(text):
        words = sentence.split()
        found += [" ".join(words[i : i + MOST_WORDS]) for i in range(0, len(words), MOST_WORDS)]
    return found


def plain_words(sentences: Sequence[str]) -> Counter[str]:
    """How often each word of four or more small letters stands in ``sentences``, without function words and
    those of the wordings."""
    words = Counter(word for sentence in sentences for word in sentence.split() if _WORD.fullmatch(word))
    for word in (*FUNCTION, *templates_words(TRAINING, HELD_OUT)):
        words.pop(word, None)
    return words


@dataclass(frozen=True)
class Filler:
    """``sentences`` of one text and the number of tokens of each with the blank before it, [n] of int64.

    ``common``: its words that statements may have.
    """

    sentences: list[str]
    tokens: NDArray[np.int64]
    common: frozenset[str]

    @classmethod
    def of(cls, sentences: list[str], count: Callable[[str], int]) -> Filler:
        """``count``: tokens of a text."""
        tokens = np.array([count(f" {sentence}") for sentence in sentences], np.int64)
        words = plain_words(sentences)
        return cls(sentences, tokens, frozenset(word for word in words if words[word] >= COMMON))

    def window(self, tokens: int, random: np.random.Generator) -> slice:
        """Neighbouring sentences, as many as ``tokens`` hold, from a random place.

        Raises GgmlExtError where the whole text is shorter.
        """
        ends = np.cumsum(self.tokens)
        total = int(ends[-1]) if len(ends) else 0
        if total < tokens:
            raise GgmlExtError(
                f"the text has {total} tokens, fewer than the {tokens} that stand around a statement; give a "
                "longer text or smaller --lengths"
            )
        last = int(np.searchsorted(ends, total - tokens, side="right"))
        first = int(random.integers(last + 1))
        before = int(ends[first - 1]) if first else 0
        return slice(first, int(np.searchsorted(ends, before + tokens, side="right")))
