"""Shows the rows of ``retrieval.judge``: terminal table, and heat maps of depth by length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ggml_ext.core.plots import save_figure
from ggml_ext.measure.report import Row, caches, number, short_names
from ggml_ext.runtime.cache_types import CacheTypes

NOT_COUNTED = "not counted"

CAPTION = (
    "per cent of the answers that are right in every token, ± half the 95 % interval over 1.96 (Wilson); "
    "in brackets less the base, on the same cases"
)


def _names(rows: Sequence[Row]) -> list[str]:
    """Names of the models; with the type of the cache where one file stands there twice."""
    if len({row["model"] for row in rows}) == len(rows):
        return short_names(rows)
    return [f"{Path(row['model']).stem}, cache {CacheTypes.from_json(row)}" for row in rows]


def _score(figures: Row) -> str:
    """A score in per cent, the difference to the base in brackets."""
    text = number(figures["score"], figures["score_se"], ".1f", 100)
    if figures["score_diff"] is None:
        return text
    return f"{text} ({number(figures['score_diff'], figures['score_diff_se'], '+.1f', 100)})"


def table(rows: Sequence[Row]) -> Table:
    """One line per model and task, one column per length, and what is counted of a model in all."""
    cells = {(i, cell["task"], cell["length"]): cell for i, row in enumerate(rows) for cell in row["cells"]}
    tasks = list(dict.fromkeys(cell["task"] for cell in rows[0]["cells"]))
    lengths = list(dict.fromkeys(cell["length"] for cell in rows[0]["cells"]))
    text = rows[0]["text"] or "the made language"
    where = "after the text" if rows[0]["question"] == "after" else "with the end of the text"
    each = rows[0]["cells"][0]["cases"]
    asked = f"{each} cases per task and length in {text}, asked {where}{caches(rows)}"
    result = Table(caption=Text(f"{CAPTION}\n{asked}"))
    for i, column in enumerate(["model", "task", *(f"{length} tokens" for length in lengths)]):
        result.add_column(column, justify="left" if i < 2 else "right")
    for i, name in enumerate(_names(rows)):
        for task in tasks:
            line = []
            for length in lengths:
                cell = cells[i, task, length]
                line.append(_score(cell) if cell["counted"] else f"{_score(cell)} {NOT_COUNTED}")
            result.add_row(*map(Text, (name, task, *line)))
        result.add_section()
    return result


def summaries(rows: Sequence[Row]) -> list[str]:
    """A line per model: its score over all that is counted, and the share of the base's."""
    lines = []
    for name, row in zip(_names(rows), rows, strict=True):
        if row["score"] is None:
            return [
                "nothing is counted: the base finds less than 90 % of every task at every length; give "
                "shorter --lengths or another model"
            ]
        line = f"{name}: {_score(row)} % of {row['cases']} counted cases"
        if row["of_base"] is not None:
            line += f", {number(row['of_base'], row['of_base_se'], '.1f', 100)} % of the base's score"
        nats = number(row["nats"], row["nats_se"], ".4f")
        lines.append(f"{line}; {nats} nats per token of the answers")
    return lines


def write_plot(path: Path, rows: Sequence[Row]) -> None:
    """Heat maps of the score, depth by length: one line of them per model, one column per task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(cell["task"] for cell in rows[0]["cells"]))
    figure = Figure(figsize=(2.2 * len(tasks) + 1.5, 1.9 * len(rows) + 1.2), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(tasks), squeeze=False)
    for i, (name, row) in enumerate(zip(_names(rows), rows, strict=True)):
        for j, task in enumerate(tasks):
            cells = [cell for cell in row["cells"] if cell["task"] == task]
            scores = [[depth["score"] for depth in cell["depths"]] for cell in cells]
            by_depth = list(zip(*scores, strict=True))
            place = axes[i, j]
            image = place.imshow(by_depth, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for x, cell in enumerate(cells):
                if not cell["counted"]:
                    place.axvspan(x - 0.5, x + 0.5, fill=False, hatch="//", edgecolor="white", linewidth=0)
            depths = [depth["depth"] for depth in cells[0]["depths"]]
            place.set_xticks(range(len(cells)), [str(cell["length"]) for cell in cells], fontsize=7)
            labels = [f"{100 * depth:.0f} %" for depth in depths] if j == 0 else [""] * len(depths)
            place.set_yticks(range(len(depths)), labels, fontsize=7)
            if i == 0:
                place.set_title(task, fontsize=9)
            if j == 0:
                place.set_ylabel(f"{name}\ndepth", fontsize=7)
    figure.colorbar(image, ax=axes, label="share of right answers")
    figure.supxlabel(f"tokens; hatched: {NOT_COUNTED}, the base finds less than 90 %", fontsize=8)
    canvas.draw()  # type: ignore[no-untyped-call]
    save_figure(path, figure)
