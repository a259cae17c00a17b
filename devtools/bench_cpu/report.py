"""Results as terminal tables, as Markdown for docs/performance.md, and as JSON.

A table is a title, a header and rows of text, written once and rendered both ways.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from devtools.bench_cpu.plan import Group
from devtools.bench_cpu.results import (
    METRICS,
    Ratio,
    Results,
    cache_bytes,
    verdicts,
)
from ggml_ext.core.atomic import write_text
from ggml_ext.core.errors import GgmlExtError

JSON_VERSION = 1
BEGIN, END = "<!-- bench-cpu: begin -->", "<!-- bench-cpu: end -->"


@dataclass(frozen=True)
class Sheet:
    """One table. The first ``words`` columns are text, the others figures."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: int

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title, title_justify="left")
        for number, name in enumerate(self.header):
            table.add_column(name, justify="left" if number < self.words else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a document."""
        rule = ["---" if number < self.words else "---:" for number in range(len(self.header))]
        lines = [f"| {' | '.join(row)} |" for row in (self.header, tuple(rule), *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines])


def _task(group: Group, metric: str) -> str:
    name = f"pp{group.prompt}" if metric == "pp" else f"tg{group.generated}"
    return f"{name} at depth {group.depth}" if group.depth else name


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _range(ratio: Ratio) -> str:
    return f"{ratio.low:.3f} - {ratio.high:.3f}"


def _lines(results: Results) -> Sheet:
    rows = []
    for verdict in verdicts(results):
        found = verdict.found
        figures = ("-", "-") if found is None else (f"{found.median:.3f}", _range(found))
        rows.append((str(verdict.line), verdict.text, f"{verdict.line.at_least:.2f}", *figures))
    return Sheet(
        "Lines to reach", ("figure", "verdict", "at least", "median", "smallest - largest"), rows, words=2
    )


def _ratios(results: Results, group: Group) -> Sheet | None:
    rows = []
    for metric in METRICS:
        for ours, other in group.pairs():
            ratio = results.ratio(group.name, metric, ours, other)
            if ratio is not None:
                speeds = [results.median(group.name, contender, metric) for contender in (ours, other)]
                rows.append(
                    (
                        _task(group, metric),
                        str(ours),
                        str(other),
                        f"{ratio.median:.3f}",
                        _range(ratio),
                        str(ratio.rounds),
                        *map(_figure, speeds),
                    )
                )
    if not rows:
        return None
    header = ("task", "this", "over", "ratio", "smallest - largest", "rounds", "t/s", "t/s of the other")
    return Sheet(f"{group.name}: {group.layers} layers of the {group.shape} shape", header, rows, words=3)


def _shares(results: Results) -> Sheet | None:
    rows = []
    for group in results.groups.values():
        if group.depth:
            continue
        for contender in group.contenders:
            if contender.cache != "f16":
                continue
            speeds = {metric: results.median(group.name, contender, metric) for metric in METRICS}
            if not any(speeds.values()):
                continue
            cells = [group.name, str(contender)]
            model = group.model(contender)
            for metric, amount in (("pp", model.prefill_macs), ("tg", model.decode_bytes)):
                speed = speeds[metric]
                share = results.share(group.name, contender, metric)
                if speed is None or share is None:
                    cells += ["-", "-", "-"]
                else:
                    cells += [_figure(speed), f"{speed * amount / 1e9:.1f}", f"{100 * share.median:.1f} %"]
            rows.append(tuple(cells))
    if not rows:
        return None
    header = ("group", "contender", "prefill t/s", "G madd/s", "of peak", "decode t/s", "GB/s", "of reading")
    return Sheet("Shares of the two limits", header, rows, words=2)


def _limits(results: Results) -> Sheet | None:
    found = list(results.limits.values())
    if not found:
        return None
    path = found[0].macs_path
    rows = []
    for name, values in (
        ("reading memory, GB/s", [limits.read for limits in found]),
        (f"int8 multiply-adds, {path}, G/s", [limits.macs for limits in found]),
    ):
        rows.append(
            (name, *(f"{f(values) / 1e9:.1f}" for f in (statistics.median, min, max)), str(len(found)))
        )
    header = ("limit, all threads", "median", "smallest", "largest", "rounds")
    return Sheet("Limits of this machine", header, rows, words=1)


def sheets(results: Results) -> list[Sheet]:
    """All tables, the verdicts last."""
    ratios = [_ratios(results, group) for group in results.groups.values()]
    found = (_limits(results), _shares(results), *ratios, _lines(results))
    return [sheet for sheet in found if sheet is not None]


def heading(machine: dict[str, Any], results: Results) -> str:
    """One line on where and when, and how quiet the machine was."""
    parts = [
        f"{machine['cpu']}, {machine['threads']} threads",
        machine["compiler"] or "compiler unknown",
        f"commit {machine['commit'] or 'unknown'}",
        machine["date"],
        f"{len(results.runs)} runs, {results.disturbed()} of them disturbed by other processes",
    ]
    switches = [f"{name}={value}" for name, value in machine["environment"].items()]
    return "; ".join([*parts, *switches])


def as_json(results: Results, machine: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a run; docs/performance.md documents it."""
    return {
        "version": JSON_VERSION,
        "machine": machine,
        "groups": [_group_json(results, group) for group in results.groups.values()],
        "lines": [
            {
                "line": str(verdict.line),
                "at_least": verdict.line.at_least,
                "verdict": verdict.text,
                "found": asdict(verdict.found) if verdict.found else None,
            }
            for verdict in verdicts(results)
        ],
    }


def _group_json(results: Results, group: Group) -> dict[str, Any]:
    contenders = []
    for contender in group.contenders:
        model = group.model(contender)
        entry: dict[str, Any] = {
            **asdict(contender),
            "name": str(contender),
            "decode_bytes": model.decode_bytes,
            "prefill_macs": model.prefill_macs,
            "cache_bytes": cache_bytes(group, contender),
        }
        for metric in METRICS:
            speeds = results.speeds(group.name, contender, metric)
            entry[f"{metric}_tps"] = {str(number): speed for number, speed in sorted(speeds.items())}
            entry[f"{metric}_tps_median"] = results.median(group.name, contender, metric)
            share = results.share(group.name, contender, metric)
            entry[f"{metric}_of_limit"] = asdict(share) if share else None
        contenders.append(entry)
    ratios = [
        {"metric": metric, "ours": str(ours), "other": str(other), **asdict(ratio)}
        for metric in METRICS
        for ours, other in group.pairs()
        if (ratio := results.ratio(group.name, metric, ours, other)) is not None
    ]
    keys = ("name", "shape", "layers", "rounds", "prompt", "generated", "depth")
    limits = {
        str(number): asdict(limits)
        for (name, number), limits in sorted(results.limits.items())
        if name == group.name
    }
    return {
        **{key: getattr(group, key) for key in keys},
        "limits": limits,
        "contenders": contenders,
        "ratios": ratios,
    }


def markdown(tables: Sequence[Sheet], where: str) -> str:
    """What stands between the markers of a document."""
    return "\n\n".join([where, *(sheet.markdown() for sheet in tables)])


def around(document: Path) -> tuple[str, str]:
    """What stands before and behind the markers in ``document``. Raises GgmlExtError if they are missing."""
    try:
        old = document.read_text(encoding="utf-8")
    except OSError as error:
        raise GgmlExtError(f"cannot read {document}: {error.strerror}; name a Markdown file") from error
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise GgmlExtError(f"{document} lacks the lines {BEGIN} and {END}; add them where the tables belong")
    return before, after


def update(document: Path, text: str) -> None:
    """Puts ``text`` between the markers of ``document``. Raises GgmlExtError if they are missing."""
    before, after = around(document)
    write_text(document, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
