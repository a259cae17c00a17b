"""Results as a table, as JSON and as the lines that have to be reached."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from devtools.bench_cpu.report import Sheet
from devtools.bench_cpu.results import Ratio, paired
from devtools.bench_sampling.measure import CHAIN, CONTENDERS, DIRECT, UPSTREAM
from devtools.bench_sampling.plan import Case

JSON_VERSION = 1

Results = Mapping[Case, Mapping[str, list[float]]]
"""Microseconds per token of each round by case and contender."""


def ratio(found: Mapping[str, list[float]], contender: str) -> Ratio:
    """How many times as fast as upstream's chain, paired by round."""
    result = paired(dict(enumerate(found[UPSTREAM])), dict(enumerate(found[contender])))
    assert result is not None
    return result


@dataclass(frozen=True)
class Verdict:
    """A line to reach. ``worst``: the case with the smallest median, None if no case of it was measured."""

    line: str
    at_least: float
    worst: Case | None
    found: Ratio | None

    @property
    def text(self) -> str:
        """ "met", "not met" or "not measured"."""
        if self.found is None:
            return "not measured"
        return "met" if self.found.median >= self.at_least else "not met"


def _is_headline(case: Case) -> bool:
    return (case.vocabulary, case.logits, case.chain) == ("152k", "flat", "top-p 0.95")


def verdicts(results: Results) -> list[Verdict]:
    """What has to be reached, in a chain and on logits: 5 times upstream's speed with top-p alone
    on flat logits of 152k, nowhere slower."""
    found = []
    for contender, name in ((CHAIN, "in a chain"), (DIRECT, "on logits")):
        for line, at_least, some in (
            ("152k, flat, top-p 0.95", 5.0, [case for case in results if _is_headline(case)]),
            ("every case", 1.0, list(results)),
        ):
            ratios = {case: ratio(results[case], contender) for case in some}
            worst = min(ratios, key=lambda case: ratios[case].median, default=None)
            best = None if worst is None else ratios[worst]
            found.append(Verdict(f"{line}, {name}", at_least, worst, best))
    return found


def _figure(values: list[float]) -> str:
    median = statistics.median(values)
    return f"{median:.1f}" if median < 1000 else f"{median:.0f}"


def _cells(found: Ratio) -> tuple[str, str]:
    return f"{found.median:.2f}", f"{found.low:.2f} - {found.high:.2f}"


def sheets(results: Results) -> list[Sheet]:
    """All tables, the verdicts last."""
    rows = []
    for case, found in results.items():
        row = [case.vocabulary, case.logits, str(case.batch), case.chain, _figure(found[UPSTREAM])]
        for contender in (CHAIN, DIRECT):
            row += [_figure(found[contender]), *_cells(ratio(found, contender))]
        rows.append(tuple(row))
    words = ("vocabulary", "logits", "batch", "chain")
    figures = ("upstream us", "in a chain us", "ratio", "range", "on logits us", "ratio", "range")
    lines = []
    for verdict in verdicts(results):
        cells = ("-", "-") if verdict.found is None else _cells(verdict.found)
        lines.append(
            (verdict.line, verdict.text, str(verdict.worst or "-"), f"{verdict.at_least:.2f}", *cells)
        )
    return [
        Sheet("Microseconds per token, and upstream's over ours", words + figures, rows, words=4),
        Sheet(
            "Lines to reach", ("line", "verdict", "worst case", "at least", "ratio", "range"), lines, words=3
        ),
    ]


def heading(machine: Mapping[str, Any], results: Results) -> str:
    """One line on where and when."""
    rounds = len(next(iter(results.values()))[UPSTREAM]) if results else 0
    parts = [
        f"{machine['cpu']}, 1 thread",
        f"commit {machine['commit'] or 'unknown'}",
        machine["date"],
        f"{len(results)} cases, {rounds} rounds",
    ]
    return "; ".join([*parts, *(f"{name}={value}" for name, value in machine["environment"].items())])


def as_json(results: Results, machine: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a run; docs/sampling.md documents it."""
    return {
        "version": JSON_VERSION,
        "machine": dict(machine),
        "cases": [
            {
                **asdict(case),
                "us": {name: found[name] for name in CONTENDERS},
                "us_median": {name: statistics.median(found[name]) for name in CONTENDERS},
                "ratio": {name: asdict(ratio(found, name)) for name in (CHAIN, DIRECT)},
            }
            for case, found in results.items()
        ],
        "lines": [
            {
                "line": verdict.line,
                "at_least": verdict.at_least,
                "verdict": verdict.text,
                "worst": asdict(verdict.worst) if verdict.worst else None,
                "found": asdict(verdict.found) if verdict.found else None,
            }
            for verdict in verdicts(results)
        ],
    }
