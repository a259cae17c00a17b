"""Ratios of paired runs, fractions of the machine's limits, and the lines that they have to reach."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from devtools.bench_cpu.models import HEAD_SIZE
from devtools.bench_cpu.plan import CACHE_WEIGHTS, DEPTHS, OURS, PATCHED, STOCK, Contender, Group
from devtools.bench_cpu.runs import Run

METRICS = {"pp": "prefill", "tg": "decode"}
DISTURBED = 0.03
"""Share of the processor time taken by other processes above which a run counts as disturbed."""


@dataclass(frozen=True)
class Ratio:
    """Median, smallest and largest of the ratios within a round, and the number of rounds."""

    median: float
    low: float
    high: float
    rounds: int


def paired(ours: Mapping[int, float], other: Mapping[int, float]) -> Ratio | None:
    """Ratio of two contenders by round -> speed; None if no round has both."""
    ratios = [ours[number] / other[number] for number in sorted(ours.keys() & other.keys())]
    if not ratios:
        return None
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios))


@dataclass(frozen=True)
class Limits:
    """Bytes and int8 multiply-adds per second of all threads, best passes of one bench_limits call."""

    read: float
    macs: float
    macs_path: str

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Limits:
        """From bench_limits' JSON; the fastest instruction counts."""
        fastest = max(found["int8_macs_per_s"], key=lambda path: path["best"])
        return cls(found["read_bytes_per_s"]["best"], fastest["best"], fastest["path"])


class Results:
    """Speeds by group, contender, metric and round."""

    def __init__(
        self,
        groups: Sequence[Group],
        runs: Iterable[Run],
        limits: Mapping[tuple[str, int], Mapping[str, Any]],
    ) -> None:
        """``limits``: (group, round) -> what bench_limits said then."""
        self.groups = {group.name: group for group in groups}
        self.limits = {key: Limits.of(found) for key, found in limits.items() if key[0] in self.groups}
        self.runs = [run for run in runs if run.group in self.groups]

    def speeds(self, group: str, contender: Contender, metric: str) -> dict[int, float]:
        """Round -> tokens per second."""
        found = {}
        for run in self.runs:
            speed = run.speed(metric)
            if (run.group, run.contender) == (group, str(contender)) and speed is not None:
                found[run.round_number] = speed
        return found

    def median(self, group: str, contender: Contender, metric: str) -> float | None:
        """Median over the rounds in tokens per second."""
        speeds = self.speeds(group, contender, metric)
        return statistics.median(speeds.values()) if speeds else None

    def ratio(self, group: str, metric: str, ours: Contender, other: Contender) -> Ratio | None:
        """``ours`` over ``other``, paired by round."""
        return paired(self.speeds(group, ours, metric), self.speeds(group, other, metric))

    def share(self, group: str, contender: Contender, metric: str) -> Ratio | None:
        """Share of the limit that the contender reaches, paired by round: decoding of the read bandwidth,
        prefill of the int8 multiply-adds. Only bytes and multiply-adds of weights count, not attention's."""
        model = self.groups[group].model(contender)
        amount = model.decode_bytes if metric == "tg" else model.prefill_macs
        done = {number: speed * amount for number, speed in self.speeds(group, contender, metric).items()}
        limit = {
            number: limits.read if metric == "tg" else limits.macs
            for (name, number), limits in self.limits.items()
            if name == group
        }
        return paired(done, limit)

    def disturbed(self) -> int:
        """Number of runs during which other processes took more than DISTURBED."""
        return sum(run.others is not None and run.others > DISTURBED for run in self.runs)


def cache_bytes(group: Group, contender: Contender) -> float:
    """Bytes of K and V that a generated token reads on average."""
    per_value = {"f16": 2.0, "q8_0": 34 / 32}[contender.cache]
    values = 2 * group.layers * group.model(contender).shape.heads_kv * HEAD_SIZE
    return values * per_value * (group.depth + group.generated / 2)


@dataclass(frozen=True)
class Line:
    """A ratio that has to be reached. ``other`` None: the share of the read bandwidth instead."""

    group: str
    metric: str
    ours: Contender
    other: Contender | None
    at_least: float

    def __str__(self) -> str:
        where = "read bandwidth in weight bytes" if self.other is None else str(self.other)
        return f"{self.group}, {METRICS[self.metric]}: {self.ours} / {where}"


_FQ4 = Contender(PATCHED, OURS)
_OUR_CACHE = Contender(PATCHED, CACHE_WEIGHTS, "q8_0")
_STOCK_F16 = Contender(STOCK, CACHE_WEIGHTS)
_STOCK_Q8 = Contender(STOCK, CACHE_WEIGHTS, "q8_0")

LINES = (
    Line("1B, short", "pp", _FQ4, Contender(STOCK, "Q4_0"), 1.5),
    Line("1B, short", "pp", _FQ4, Contender(STOCK, "Q4_K"), 1.8),
    Line("1B, short", "pp", _FQ4, Contender(STOCK, "IQ4_XS"), 1.1),
    Line("1B, short", "tg", _FQ4, Contender(STOCK, "Q4_0"), 1.03),
    Line("1B, short", "tg", _FQ4, Contender(STOCK, "IQ4_XS"), 1.6),
    Line("1B, short", "tg", _FQ4, None, 0.9),
    *(
        Line(f"1B, depth {depth}", metric, _OUR_CACHE, other, at_least)
        for depth in DEPTHS
        if depth
        for metric, other, at_least in (
            ("pp", _STOCK_Q8, 3.5),
            ("pp", _STOCK_F16, 1.0),
            ("tg", _STOCK_Q8, 1.5),
            ("tg", _STOCK_F16, 1.15),
        )
    ),
)
"""What the FQ4 kernels and the attention over a quantised cache have to reach."""


@dataclass(frozen=True)
class Verdict:
    """``found``: the figure, None if it was not measured."""

    line: Line
    found: Ratio | None

    @property
    def text(self) -> str:
        """ "met", "not met" or "not measured"."""
        if self.found is None:
            return "not measured"
        return "met" if self.found.median >= self.line.at_least else "not met"


def _found(line: Line, results: Results) -> Ratio | None:
    if line.group not in results.groups:
        return None
    if line.other is None:
        return results.share(line.group, line.ours, line.metric)
    return results.ratio(line.group, line.metric, line.ours, line.other)


def verdicts(results: Results) -> list[Verdict]:
    """Every line with its figure."""
    return [Verdict(line, _found(line, results)) for line in LINES]
