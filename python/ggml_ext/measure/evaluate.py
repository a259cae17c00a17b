"""Perplexity and KL divergence of GGUF models over a text, window by window, in bounded memory.

The text is cut into windows of ``ctx`` tokens as llama-perplexity does (tools/perplexity/perplexity.cpp):
BOS replaces a window's first token where the model wants one, and only the second half of a window is
scored, so that every scored token has some context.

Models are compared to the base in groups of windows: the base's logits of one group go to an unnamed scratch
file as float32, then every model is loaded in turn and scored against them. So the base is evaluated
once, one model is in memory at a time, and the scratch file never exceeds ``windows.SCRATCH_BYTES``,
whatever the length of the text. Finished windows are journalled: an interrupted command resumes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.progress import Advance, track
from ggml_ext.measure.journal import Journal
from ggml_ext.measure.scoring import (
    SCORE,
    THREADS,
    BaseRows,
    Difference,
    Divergence,
    Perplexity,
    difference_of,
    divergence_of,
    perplexity_of,
    score,
)
from ggml_ext.measure.standard_error import Interval, TextErrors
from ggml_ext.measure.subjects import Journalled, Subject, check_vocabulary, read_text
from ggml_ext.measure.windows import Scratch, decode_windows, make_plan
from ggml_ext.runtime.cache_types import PLAIN, CacheTypes
from ggml_ext.runtime.llama import Model, interruptible

FORMAT = 2
"""Version of what the journal holds; raise it when scores change their meaning."""


@dataclass(frozen=True)
class Result:
    """Figures of one model. ``divergence`` is None for the base.

    differences: this model less each of the models compared, in their order, None in its own place and empty
    for the base; rival: index of the one with the next lower KL divergence, None for the base and the best.
    """

    model: Path
    perplexity: Perplexity
    divergence: Divergence | None
    differences: list[Difference | None]
    rival: int | None


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of ``model`` over ``windows`` windows of ``ctx`` tokens; ``tokens``: length of the text.

    The figures are those of ``scoring.Perplexity``.
    """

    model: Path
    ppl: float
    ppl_se: float | None
    ppl_ci95: Interval | None
    ppl_se_independent: float
    count: int
    error_df: int
    tokens: int
    windows: int
    ctx: int


class Evaluation(Journalled):
    """Scores a base model and others over a text. Use it in ``with``."""

    def __init__(
        self,
        base: Path,
        models: Sequence[Path],
        text: Path,
        *,
        ctx: int = 512,
        threads: int | None = None,
        cache: CacheTypes = PLAIN,
    ) -> None:
        """Read the text, check all files and cut the windows.

        ``threads``: None for one per physical core; ``cache``: types of the KV cache, of the models beside a
        base, which keeps f16, or of a base alone. Raises GgmlExtError on files that cannot be read or
        loaded, on models with different vocabularies, and on a text shorter than one window.
        """
        self.base = Subject(base, PLAIN if models else cache)
        self.models = [Subject(path, cache) for path in models]
        self.ctx, self.threads = ctx, threads
        self._text, self.text_sha256 = read_text(text)
        with Model(base, weights=False) as model:
            if model.adds_eos:
                raise GgmlExtError(f"{base}: ends every text with EOS, so its perplexity has no meaning here")
            self._tokens = model.tokenize(self._text)
            self.plan = make_plan(ctx, model.n_vocab)
            self._n_vocab = model.n_vocab
        self.tokens = len(self._tokens)
        self.n_windows = self.tokens // ctx
        if self.n_windows == 0:
            raise GgmlExtError(
                f"{text}: has {self.tokens} tokens, one window needs {ctx}; lengthen the text or lower --ctx"
            )
        self.windows = self._tokens[: self.n_windows * ctx].reshape(self.n_windows, ctx)
        for path in models:
            with Model(path, weights=False) as model:
                check_vocabulary(model, model.tokenize(self._text), base, self._n_vocab, self._tokens)
        facts = {"format": FORMAT, "base": self.base.facts(), "text": self.text_sha256, "ctx": ctx}
        super().__init__(Journal(facts, self.plan.rows))

    def _done(self, subject: Subject) -> int:
        """Windows of ``subject`` that are scored, from the first one on."""
        return len(self._records(subject))

    def run(self) -> list[Result]:
        """Score everything that the journal lacks. Results: the base, then the models in their order."""
        done = [self._done(subject) for subject in (self.base, *self.models)]
        if any(done):
            print(
                f"resuming: {sum(done)} of {len(done) * self.n_windows} windows are scored", file=sys.stderr
            )
        with track((len(done) * self.n_windows - sum(done)) * self.ctx, "evaluating", "tok") as advance:
            if self.models:
                with Scratch(self.plan.rows, self._n_vocab, self.n_windows, "base logits") as scratch:
                    print(
                        f"scratch: up to {scratch.bytes / 1e6:.0f} MB of base logits in {scratch.folder}",
                        file=sys.stderr,
                    )
                    for start in range(0, self.n_windows, scratch.windows):
                        stop = min(start + scratch.windows, self.n_windows)
                        self._run_group(start, stop, scratch, advance)
            else:
                self._run_base(self._done(self.base), self.n_windows, None, 0, advance)
        return self._results()

    def _run_group(self, start: int, stop: int, scratch: Scratch, advance: Advance) -> None:
        """Score windows start..stop of the base and of every model that lacks them."""
        pending = [subject for subject in self.models if self._done(subject) < stop]
        needed = min([self._done(subject) for subject in (self.base, *pending)])
        if needed >= stop:
            return
        begin = max(start, needed)
        self._run_base(begin, stop, scratch if pending else None, start, advance)
        for subject in pending:
            with Model(subject.path, threads=self.threads) as model:
                self._score(
                    subject,
                    model,
                    max(start, self._done(subject)),
                    stop,
                    advance,
                    lambda w, row: scratch.rows(w - start, row),
                )

    def _run_base(self, begin: int, stop: int, scratch: Scratch | None, start: int, advance: Advance) -> None:
        """Score windows begin..stop of the base, and keep their logits from slot begin - start."""
        if begin >= stop:
            return
        with Model(self.base.path, threads=self.threads) as model:
            keep = None if scratch is None else lambda w, row, logits: scratch.write(w - start, row, logits)
            self._score(self.base, model, begin, stop, advance, None, keep)

    def _score(
        self,
        subject: Subject,
        model: Model,
        begin: int,
        stop: int,
        advance: Advance,
        base_rows: Callable[[int, int], BaseRows] | None,
        keep: Callable[[int, int, NDArray[np.float32]], None] | None = None,
    ) -> None:
        """Score windows begin..stop of ``subject``, which ``model`` is, and journal those that are new."""
        plan = self.plan
        model.start(n_ctx=self.ctx, n_seq=plan.n_seq, n_batch=plan.n_seq * plan.step, cache=subject.cache)
        scores = np.zeros(plan.rows, SCORE)
        for window, row, logits in decode_windows(model, self.windows, plan, begin, stop):
            end = row + len(logits)
            if keep is not None:
                keep(window, row, logits)
            if window < self._done(subject):
                continue  # scored before the interruption; only its logits were needed again
            targets = self.windows[window, plan.first + 1 + row : plan.first + 1 + end]
            base = None if base_rows is None else base_rows(window, row)
            # An interrupt while a thread starts would leave it running, on memory that is then freed.
            with interruptible():
                scores[row:end] = score(logits, targets, base, threads=min(THREADS, model.threads))
            if end == plan.rows:
                if not (np.isfinite(scores["nll"]).all() and np.isfinite(scores["kld"]).all()):
                    raise GgmlExtError(
                        f"{model.path}: gives NaN or infinite logits (window {window + 1}); make it anew"
                    )
                self._keep(subject, scores.copy())
                advance(self.ctx)

    def _results(self) -> list[Result]:
        """What the journal's scores come to."""
        errors = TextErrors(self.n_windows, self.plan.rows, self.ctx)
        results = [Result(self.base.path, perplexity_of(self._scores(self.base), errors), None, [], None)]
        scores = [self._scores(subject) for subject in self.models]
        divergences = [divergence_of(own, errors) for own in scores]
        ranked = sorted(range(len(scores)), key=lambda i: divergences[i].kld)
        rivals = dict(zip(ranked[1:], ranked, strict=False))
        for i, subject in enumerate(self.models):
            differences = [
                None if k == i else difference_of(scores[i], other, errors) for k, other in enumerate(scores)
            ]
            perplexity = perplexity_of(scores[i], errors)
            results.append(Result(subject.path, perplexity, divergences[i], differences, rivals.get(i)))
        return results

    def _scores(self, subject: Subject) -> NDArray[np.void]:
        """All scored positions of ``subject``, in the order of the text."""
        return np.concatenate(self._records(subject))


def perplexity(
    model: Path,
    text: Path,
    *,
    ctx: int = 512,
    threads: int | None = None,
    cache: CacheTypes = PLAIN,
    deliver: Callable[[PerplexityResult], None] | None = None,
) -> PerplexityResult:
    """Perplexity of ``model`` on ``text`` in windows of ``ctx`` tokens, equal to llama-perplexity's.

    deliver: gets the result. If it fails, the scores stay on disk and the same call goes on from them. Raises
    GgmlExtError on files that cannot be used and on a text shorter than one window.
    """
    with Evaluation(model, [], text, ctx=ctx, threads=threads, cache=cache) as evaluation:
        figures = evaluation.run()[0].perplexity
        result = PerplexityResult(
            model=model,
            **vars(figures),
            tokens=evaluation.tokens,
            windows=evaluation.n_windows,
            ctx=ctx,
        )
        if deliver is not None:
            deliver(result)
        evaluation.finish()
    return result
