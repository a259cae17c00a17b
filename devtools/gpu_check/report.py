"""The table that ends a run, and the JSON."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import plan
from .state import FAILED, NOT_RUN, PASSED, Outcome, Run, seconds_of


def ratios(state: Run) -> list[dict[str, Any]]:
    """The targets of the plan with what was seen: ``ratio`` (None: not measured) and ``reached``."""
    found = []
    for target in plan.TARGETS:
        ours = seconds_of(state, target.part, target.shape, target.contender)
        copy = seconds_of(state, "copy", "", "copy")
        other = seconds_of(state, target.part, target.shape, target.over) if target.over else copy
        ratio = None
        if ours and other and target.over:
            ratio = other["median"] / ours["median"]
        elif ours and other:
            ratio = (ours["bytes"] / ours["median"]) / (other["bytes"] / other["median"])
        reached = None if ratio is None else ratio >= target.least
        found.append({"target": target.text, "least": target.least, "ratio": ratio, "reached": reached})
    return found


def as_json(state: Run, about: dict[str, Any]) -> dict[str, Any]:
    """Everything that a run found. Keys: docs/gpu-check.md."""
    return {
        **about,
        "device": state.device.as_json(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "steps": list(state.steps),
        "kernels": [kernel.name for kernel in state.kernels],
        "checks": [vars(outcome) for outcome in state.outcomes],
        "measured": state.measured,
        "profiles": state.profiles,
        "ratios": ratios(state),
    }


def _rows(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(lines)


def table(state: Run, about: dict[str, Any]) -> str:
    """What a person reads: checks by kind, ratios, and the failures in full."""
    device = state.device
    head = f"{device.name}, compute capability {device.capability}, driver {device.driver}, "
    head += f"CUDA {device.toolkit}, commit {about['commit']}"
    kinds: dict[str, list[Outcome]] = {}
    for outcome in state.outcomes:
        kinds.setdefault(outcome.name.split(":")[0], []).append(outcome)
    rows = [("check", "passed", "failed", "not run", "seconds")]
    for kind, outcomes in kinds.items():
        counts = [str(sum(o.status == status for o in outcomes)) for status in (PASSED, FAILED, NOT_RUN)]
        rows.append((kind, counts[0], counts[1], counts[2], f"{sum(o.seconds for o in outcomes):.0f}"))
    parts = ["", head, "", _rows(rows)]
    measured = [line for line in ratios(state) if line["ratio"] is not None]
    if measured:
        lines = [("ratio", "seen", "at least", "")]
        lines += [
            (r["target"], f"{r['ratio']:.2f}", f"{r['least']:.2f}", "reached" if r["reached"] else "BELOW")
            for r in measured
        ]
        parts += ["", _rows(lines)]
    for outcome in state.outcomes:
        if outcome.status != PASSED:
            parts.append(f"{outcome.status}: {outcome.name}: {outcome.detail}")
    return "\n".join(parts)


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes the JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
