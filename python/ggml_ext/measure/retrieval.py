"""How often models find in a long text what they are asked for, and what a base's full cache finds.

A case (tasks/cases.py) is decoded as a client would: the text in batches, then the question with its answer.
It counts as right where every token of the answer is the most likely one after those before it, which is what
greedy generation gives. The question comes in a batch of its own, so that whatever happens to the
cache before it happens without knowing it; or, on request, in the last batch of the text.

All models get the same cases, so differences are paired. A length at which the base itself finds less than
GATE of a task is not counted: what is lost there says nothing of the cache.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.outputs import check_outputs, write_json
from ggml_ext.core.plots import require_matplotlib
from ggml_ext.core.progress import Advance, track
from ggml_ext.measure import retrieval_report
from ggml_ext.measure.journal import Journal
from ggml_ext.measure.proportion import Share, difference, mean, share
from ggml_ext.measure.report import Row
from ggml_ext.measure.scoring import score
from ggml_ext.measure.subjects import Journalled, Subject, check_vocabulary, read_text
from ggml_ext.measure.tasks.cases import Case, Spec, Tokenize, make_case
from ggml_ext.measure.tasks.filler import Filler, made_sentences, text_sentences
from ggml_ext.measure.tasks.templates import HELD_OUT, TASKS
from ggml_ext.measure.windows import BATCH_TOKENS
from ggml_ext.runtime.cache_types import PLAIN, CacheTypes
from ggml_ext.runtime.llama import Model

FORMAT = 1
"""Version of what the journal holds; raise it when scores change their meaning."""

GATE = 0.9
"""Score of the base from which on a task at a length is counted."""

MAX_LENGTH = 1 << 20
"""Most tokens of a text: no model reads more, and a text is made before any model is asked."""

RECORD = np.dtype([("right", "?"), ("nats", "<f8")])
"""One answered case: whether all tokens are right, and their mean -ln p."""

_MADE_SEED = 20  # of the made language's text, another than those of training


@dataclass(frozen=True)
class Grid:
    """``lengths`` in tokens; ``depths``: number of places, in the middles of as many equal parts of the text;
    ``cases`` of every task at every length and depth."""

    lengths: tuple[int, ...]
    depths: int
    cases: int

    @property
    def places(self) -> list[float]:
        """The depths, 0 to 1."""
        return [(i + 0.5) / self.depths for i in range(self.depths)]

    def specs(self) -> list[Spec]:
        """All cases, by length, so that a length has one context."""
        return [
            Spec(task, length, depth, seed)
            for length in sorted(set(self.lengths))
            for task in TASKS
            for depth in self.places
            for seed in range(self.cases)
        ]


def parse_lengths(text: str) -> tuple[int, ...]:
    """Lengths "512,1024" of up to MAX_LENGTH tokens. Raises GgmlExtError."""
    try:
        lengths = tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1:
        raise GgmlExtError(f"--lengths {text}: no numbers of tokens; write them as 512,1024,2048")
    if max(lengths) > MAX_LENGTH:
        raise GgmlExtError(f"--lengths {text}: {max(lengths)} is beyond {MAX_LENGTH}; ask for shorter texts")
    return lengths


def _tokenizer(model: Model) -> Tokenize:
    return lambda text: model.tokenize(text.encode())


def make_cases(model: Model, text: Path | None, grid: Grid) -> list[Case]:
    """All cases of ``grid`` around ``text`` (None: the made language) in the tokens of ``model``.

    Raises GgmlExtError naming the text.
    """
    tokenize = _tokenizer(model)
    if text is None:
        most = max(grid.lengths)
        sentences = made_sentences(max(2000, most), np.random.default_rng(_MADE_SEED))
    else:
        sentences = text_sentences(read_text(text)[0].decode("utf-8", "replace"))
    extra = len(tokenize(""))
    try:
        filler = Filler.of(sentences, lambda sentence: len(tokenize(sentence)) - extra)
        return [make_case(spec, filler, tokenize, HELD_OUT) for spec in grid.specs()]
    except GgmlExtError as error:
        raise GgmlExtError(f"{text or 'the made text'}: {error}") from error


def answer(model: Model, case: Case, batch: int, *, together: bool = False) -> NDArray[np.void]:
    """Decode ``case`` in an empty cache, ``batch`` tokens at a time; a RECORD.

    ``together``: the question follows the text within a batch. Raises GgmlExtError for logits that are no
    numbers.
    """
    model.clear()
    tokens = np.concatenate([case.text, case.asked])
    # The token before one that is looked for gives it; the last of all gives nothing.
    gives = np.concatenate([np.zeros(len(case.text) - 1, np.bool_), case.answers, [False]])
    positions = np.arange(len(tokens), dtype=np.int32)
    edges = [0, len(tokens) - 1] if together else [0, len(case.text), len(tokens) - 1]
    rows: list[NDArray[np.float32]] = []
    for begin, end in pairwise(edges):
        for start in range(begin, end, batch):
            part = slice(start, min(start + batch, end))
            sequence = np.zeros(part.stop - start, np.int32)
            rows.append(model.decode(tokens[part], positions[part], sequence, gives[part]).copy())
    found, wanted = np.concatenate(rows), case.asked[case.answers]
    nats = float(score(found, wanted, threads=1)["nll"].mean())
    if not np.isfinite(nats):
        raise GgmlExtError(f"{model.path}: gives NaN or infinite logits; make it anew")
    return np.array([(np.array_equal(found.argmax(axis=1), wanted), nats)], RECORD)


class Judgement(Journalled):
    """Asks a base and models the same cases. Use it in ``with``."""

    def __init__(
        self,
        base: Path,
        models: Sequence[Path],
        text: Path | None,
        grid: Grid,
        *,
        threads: int | None = None,
        cache: CacheTypes = PLAIN,
        together: bool = False,
    ) -> None:
        """Make the cases. ``cache``: of the models; the base keeps f16. Raises GgmlExtError on files that
        cannot be used, a text too short for a length and models with different tokenizers."""
        self.base, self.models = Subject(base, PLAIN), [Subject(path, cache) for path in models]
        self.grid, self.threads, self.together = grid, threads, together
        with Model(base, weights=False) as model:
            if model.adds_eos:
                raise GgmlExtError(f"{base}: ends every text with EOS, so it cannot be asked anything")
            n_vocab = model.n_vocab
            self.cases = make_cases(model, text, grid)
        shortest = Grid((min(grid.lengths),), grid.depths, grid.cases)
        tokens = _tokens(self.cases)
        for path in {*models} - {base}:
            with Model(path, weights=False) as model:
                # Cases are in the order of their lengths.
                again = _tokens(make_cases(model, text, shortest))
                check_vocabulary(model, again, base, n_vocab, tokens[: len(again)])
        digest = hashlib.sha256(tokens.tobytes()).hexdigest()
        super().__init__(Journal({"retrieval": FORMAT, "cases": digest, "together": together}, 1, RECORD))

    def run(self) -> list[NDArray[np.void]]:
        """RECORDs [cases] of the base, then of every model; those that the journal lacks are asked."""
        subjects = [self.base, *self.models]
        pending = list(dict.fromkeys(subjects))
        done = [self._records(subject) for subject in pending]
        if any(done):
            print(
                f"resuming: {sum(map(len, done))} of {len(pending) * len(self.cases)} cases are answered",
                file=sys.stderr,
            )
        left = sum(_length(case) for records in done for case in self.cases[len(records) :])
        with track(left, "asking", "tok") as advance:
            for subject in pending:
                if len(self._records(subject)) < len(self.cases):
                    self._ask(subject, advance)
        return [np.concatenate(self._records(subject)) for subject in subjects]

    def _ask(self, subject: Subject, advance: Advance) -> None:
        """Answer the cases that ``subject`` lacks, with a context of each length."""
        outputs = max(int(case.answers.sum()) for case in self.cases)
        started, batch = 0, 0
        with Model(subject.path, threads=self.threads) as model:
            for case in self.cases[len(self._records(subject)) :]:
                length = case.spec.length
                if length != started:
                    started, batch = length, min(BATCH_TOKENS, length)
                    model.check_ctx(length, "--lengths")
                    model.start(n_ctx=length, n_seq=1, n_batch=batch, n_outputs=outputs, cache=subject.cache)
                self._keep(subject, answer(model, case, batch, together=self.together))
                advance(_length(case))


def _tokens(cases: Sequence[Case]) -> NDArray[np.int32]:
    """All tokens of ``cases``, one behind the other."""
    return np.concatenate([np.concatenate([case.text, case.asked]) for case in cases])


def _length(case: Case) -> int:
    return len(case.text) + len(case.asked)


def _share_keys(key: str, found: Share | None) -> Row:
    return {
        key: None if found is None else found.value,
        f"{key}_se": None if found is None else found.error,
        f"{key}_ci95": None if found is None else found.ci95,
    }


def _figures(own: NDArray[np.void], base: NDArray[np.void] | None) -> Row:
    """Figures of RECORDs [n], against the ``base``'s of the same cases; null where there are none."""
    empty = len(own) == 0
    nats, nats_error = (None, None) if empty else mean(own["nats"])
    more, more_error = (None, None) if empty or base is None else mean(own["nats"] - base["nats"])
    versus = None if empty or base is None else difference(own["right"], base["right"])
    return {
        "cases": len(own),
        **_share_keys("score", None if empty else share(own["right"])),
        **_share_keys("score_diff", versus),
        "nats": nats,
        "nats_se": nats_error,
        "nats_diff": more,
        "nats_diff_se": more_error,
    }


def make_row(
    subject: Subject,
    specs: Sequence[Spec],
    own: NDArray[np.void],
    base: NDArray[np.void],
    *,
    is_base: bool,
) -> Row:
    """The JSON object of one model from RECORDs [cases] of its own and of the base (docs/retrieval.md)."""
    cells = []
    counted = np.zeros(len(specs), np.bool_)
    for task, length in dict.fromkeys((spec.task, spec.length) for spec in specs):
        at = np.array([(spec.task, spec.length) == (task, length) for spec in specs])
        counts = bool(base["right"][at].mean() >= GATE)
        counted |= at & counts
        depths = []
        for depth in dict.fromkeys(spec.depth for spec in specs):
            here = at & np.array([spec.depth == depth for spec in specs])
            depths.append({"depth": depth, "score": float(own["right"][here].mean())})
        figures = _figures(own[at], None if is_base else base[at])
        cells.append({"task": task, "length": length, "counted": counts, **figures, "depths": depths})
    whole = _figures(own[counted], None if is_base else base[counted])
    of_base, of_base_error = None, None
    if not is_base and counted.any():
        found = float(base["right"][counted].mean())
        of_base, of_base_error = whole["score"] / found, whole["score_diff_se"] / found
    return {
        "model": str(subject.path),
        **subject.cache.as_json(),
        **whole,
        "of_base": of_base,
        "of_base_se": of_base_error,
        "cells": cells,
    }


def judge(
    base: Path,
    models: Sequence[Path],
    text: Path | None,
    grid: Grid,
    *,
    threads: int | None = None,
    cache: CacheTypes = PLAIN,
    together: bool = False,
    json_out: Path | None = None,
    plot_out: Path | None = None,
    deliver: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Ask ``base`` and ``models`` the cases of ``grid`` and write the files that are asked for.

    ``deliver``: gets the rows. If it or a file fails, the answers stay on disk and the same call goes on from
    them. Returns the rows, the base first. Raises GgmlExtError before any long work if an input cannot be
    used or an output cannot be written.
    """
    check_outputs(json_out, plot_out, inputs=[base, *models, text])
    if plot_out is not None:
        require_matplotlib()
    with Judgement(base, models, text, grid, threads=threads, cache=cache, together=together) as judgement:
        found = judgement.run()
        specs = [case.spec for case in judgement.cases]
        about = {"text": None if text is None else str(text), "question": "with" if together else "after"}
        rows = [
            {**make_row(subject, specs, own, found[0], is_base=i == 0), **about}
            for i, (subject, own) in enumerate(zip([judgement.base, *judgement.models], found, strict=True))
        ]
        if json_out is not None:
            write_json(json_out, rows)
        if plot_out is not None:
            retrieval_report.write_plot(plot_out, rows)
        if deliver is not None:
            deliver(rows)
        judgement.finish()
    return rows
