"""Shows the rows of ``compare``: terminal table, Markdown report, plot."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from ggml_ext import __version__
from ggml_ext.core.atomic import write_text
from ggml_ext.core.cpus import physical_cores
from ggml_ext.core.plots import require_matplotlib, save_figure
from ggml_ext.measure import bench, loss
from ggml_ext.runtime.cache_types import PLAIN, CacheTypes
from ggml_ext.runtime.llama import bindings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase
    from matplotlib.transforms import Bbox

Row = dict[str, Any]

MISSING = "-"

BLOCK_TEXT = (
    "Squared error of each block's output relative to the base's. Own: the block gets the base's output of "
    "the block before it; in brackets its share of the error behind the last block. Accumulated: the model "
    "runs freely."
)

DIFFERENCE_TEXT = (
    "The models see the same tokens, so the error of a difference is that of the differences by token, much "
    "smaller than those of the two figures. In brackets: not resolved on this text, the 95 % interval holds "
    '0. "Next lower" is the model with the next lower KL divergence.'
)

COLUMNS = (
    "model", "MB", "bits/weight", "PPL", "KLD to base", "less next lower", "top-1 %", "prompt t/s", "gen t/s",
)  # fmt: skip

ERROR_TEXT = (
    "± is one standard error over the choice of the text, with tokens and windows correlated and widened for "
    "few windows: the figure ± 1.96 errors is the 95 % interval; for speeds, half the distance between the "
    "quartiles over the rounds."
)

PLOT_TEXT = "bars: 95 % intervals; thick: of the difference to the next lower model; hollow: not resolved"

BITS_TICKS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 28, 32)
"""Marks on the plot's axis of bits per weight, denser where quant types are."""


def short_names(rows: Sequence[Row]) -> list[str]:
    """File names without suffix and without the beginning that all of them share, cut at a separator."""
    stems = [Path(row["model"]).stem for row in rows]
    common = _common_start(stems)
    cut = max(common.rfind(c) for c in "-.") + 1
    names = [stem[cut:] or stem for stem in stems]
    return names if len(set(names)) == len(names) else [row["model"] for row in rows]


def _common_start(names: Sequence[str]) -> str:
    """The characters that all ``names`` begin with."""
    first, last = min(names), max(names)  # whatever these two share, all between them share
    return next((first[:i] for i, c in enumerate(first) if last[i : i + 1] != c), first)


def number(value: float | None, error: float | None, form: str, scale: float = 1.0) -> str:
    """ "value ± error", or a dash where nothing was measured."""
    if value is None:
        return MISSING
    text = format(value * scale, form)
    return text if error is None else f"{text} ± {format(error * scale, form.lstrip('+'))}"


def _speed(row: Row, kind: str) -> str:
    """Tokens per second with spread, and the ratio to the base."""
    if row[f"{kind}_tps"] is None:
        return MISSING
    return f"{number(row[f'{kind}_tps'], row[f'{kind}_spread'], '.0f')} ({row[f'{kind}_ratio']:.2f}x)"


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table's cells, one list per row, in the order of COLUMNS."""
    return [
        [
            name,
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['bits_per_weight']:.3f}",
            number(row["ppl"], row["ppl_se"], ".3f"),
            number(row["kld"], row["kld_se"], ".6f"),
            number(row["kld_diff"], row["kld_diff_se"], "+.6f"),
            number(row["top1"], row["top1_se"], ".2f", 100),
            _speed(row, "pp"),
            _speed(row, "tg"),
        ]
        for name, row in zip(short_names(rows), rows, strict=True)
    ]


def table(rows: Sequence[Row]) -> Table:
    """The comparison as a terminal table."""
    first = rows[0]
    # File names may hold square brackets, which rich takes for markup in plain strings.
    measured_on = (
        f"{first['tokens_scored']} tokens of {first['text']}, windows of {first['ctx']}{caches(rows)}"
    )
    result = Table(caption=Text("\n".join([measured_on, *resolution(rows)])))
    for i, column in enumerate(COLUMNS):
        result.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in cells(rows):
        result.add_row(*map(Text, row))
    return result


def caches(rows: Sequence[Row]) -> str:
    """The models' KV cache as the end of a sentence on what was measured; empty where all have f16."""
    types = CacheTypes.from_json(rows[-1])
    if types == PLAIN:
        return ""
    return f", KV cache {types}" + (f" (the base's {PLAIN})" if len(rows) > 1 else "")


def resolution(rows: Sequence[Row]) -> list[str]:
    """What the errors say about the ranking by KL divergence, in sentences."""
    if rows[0]["ppl_se"] is None:
        return ["The text is too short to tell errors; 2 windows are the least, 30 are useful."]
    compared = [row for row in rows if row["rival"] is not None]
    if not compared:
        return []
    names = dict(zip((row["model"] for row in rows), short_names(rows), strict=True))
    open_pairs = [
        f"{names[row['model']]} and {names[row['rival']]}" for row in compared if not row["kld_diff_resolved"]
    ]
    return [
        "less next lower: KLD less that of the model with the next lower one, with its own error",
        f"Not resolved on this text (95 % interval of the difference holds 0): {', '.join(open_pairs)}"
        if open_pairs
        else "All of these differences are resolved (no 95 % interval holds 0).",
    ]


def speed_table(rows: Sequence[Row]) -> Table:
    """The rows of ``bench.as_rows`` as a terminal table."""
    result = Table(
        caption="median over the rounds ± half the distance between the quartiles; ratio to the first"
    )
    for column in ("model", "prompt t/s", "generate t/s"):
        result.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for name, row in zip(short_names(rows), rows, strict=True):
        result.add_row(Text(name), _speed(row, "pp"), _speed(row, "tg"))
    return result


def machine() -> dict[str, str]:
    """Facts on the machine and the software that the figures depend on."""
    api = bindings()
    return {
        "processor": _processor(),
        "cores": f"{physical_cores()} physical, {os.cpu_count()} logical",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "ggml-ext": __version__,
        "llama.cpp": api.llama_version().decode(),
        "built for": " ".join(api.llama_print_system_info().decode().split()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|---|{'---:|' * (len(head) - 1)}",
        *(f"| {' | '.join(line)} |" for line in body),
    ]


def markdown(rows: Sequence[Row], *, threads: int | None, rounds: int) -> str:
    """The report: every figure, how it is defined, and what is needed to measure it again."""
    first, others, names = rows[0], rows[1:], short_names(rows)
    lines = [
        "# Comparison of GGUF models",
        "",
        f"Base model: `{first['model']}`. Text: `{first['text']}` (SHA-256 `{first['text_sha256']}`), "
        f"{first['windows']} windows of {first['ctx']} tokens, {first['tokens_scored']} tokens scored"
        f"{caches(rows)}.",
        "",
        *_markdown_table(COLUMNS, cells(rows)),
        "",
        f"{ERROR_TEXT} Bits per weight count all tensors. PPL, KL divergence (nats, base to model) and top-1 "
        "agreement are defined as in llama-perplexity: the second half of every window is scored. Speeds in "
        "tokens per second; the factor in brackets is against the base model, paired by round.",
        *(line for sentence in resolution(rows) for line in ("", sentence)),
    ]
    if len(others) > 1:
        lines += ["", "## Differences of KL divergence", "", DIFFERENCE_TEXT, ""]
        lines += _difference_table(others, names[1:])
    if others:
        lines += ["", "## KL divergence and token probabilities", "", *_divergence_table(others, names[1:])]
    blocks, tensors = loss.block_table(rows, names), loss.tensor_table(rows, names)
    if blocks is not None:
        lines += ["", "## Error per block", "", BLOCK_TEXT, "", *_markdown_table(*blocks)]
    if tensors is not None:
        lines += ["", "## Tensors with the largest errors", "", *_markdown_table(*tensors)]
    lines += ["", "## Files", "", *_files_table(rows, names)]
    if first["pp_samples"] is not None:
        call = bench.command(
            Path("MODEL"), prompt=bench.PROMPT_TOKENS, generate=bench.GENERATED_TOKENS, threads=threads
        )
        shown = shlex.join(["llama-bench", *call[1:]])
        speed = [f"Speed, {rounds} rounds with the models taking turns: `{shown}`", ""]
    else:
        speed = []
    lines += [
        "",
        "## Measured with",
        "",
        f"`{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`",
        "",
        *speed,
    ]
    lines += [f"- {name}: {value}" for name, value in machine().items()]
    return "\n".join(lines) + "\n"


def _difference_table(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Every model's KL divergence less every other's, and ln(PPL) less that of the rival."""
    body = []
    for name, row in zip(names, rows, strict=True):
        cells_of_row = [
            MISSING if other is None else _resolvable(other, "kld_diff", ".6f")
            for other in row["differences"]
        ]
        body.append([name, *cells_of_row, _resolvable(row, "ln_ppl_diff", ".5f")])
    return _markdown_table(["", *(f"less {name}" for name in names), "ln PPL less next lower"], body)


def _resolvable(figures: Row, key: str, form: str) -> str:
    """A difference with its error, in brackets where its 95 % interval holds 0."""
    text = number(figures[key], figures[f"{key}_se"], f"+{form}")
    return text if figures[key] is None or figures[f"{key}_resolved"] else f"({text})"


def _divergence_table(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Percentiles of the KL divergence and the other figures of llama-perplexity --kl-divergence."""
    quantiles = list(rows[0]["kld_percentiles"])
    head = ["model", "ln(PPL/base)", "KLD max", *(f"KLD {q} %" for q in quantiles), "mean Δp %", "RMS Δp %"]
    body = [
        [
            name,
            number(row["ln_ppl_ratio"], row["ln_ppl_ratio_se"], ".5f"),
            f"{row['kld_max']:.4f}",
            *(f"{row['kld_percentiles'][q]:.6f}" for q in quantiles),
            number(row["p_diff_mean"], row["p_diff_mean_se"], ".4f", 100),
            number(row["p_diff_rms"], row["p_diff_rms_se"], ".4f", 100),
        ]
        for name, row in zip(names, rows, strict=True)
    ]
    return _markdown_table(head, body)


def _files_table(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """What each file consists of and how it was made, from its metadata."""
    body = []
    for name, row in zip(names, rows, strict=True):
        weights = sum(row["types"].values())
        types = ", ".join(f"{kind} {100 * n / weights:.1f} %" for kind, n in row["types"].items())
        origin = "; ".join(f"{key} = {value}" for key, value in row["origin"].items()) or MISSING
        layer_bits = number(row["bits_per_layer_weight"], None, ".4f")
        body.append(
            [name, f"`{row['model']}`", str(row["bytes"]), layer_bits, types, origin.replace("|", "\\|")]
        )
    head = ["model", "file", "bytes", "bits/weight in layers", "weights by type", "made with"]
    return _markdown_table(head, body)


def write_report(path: Path, rows: Sequence[Row], *, threads: int | None, rounds: int) -> None:
    """Write the Markdown report, whole or not at all."""
    write_text(path, markdown(rows, threads=threads, rounds=rounds))


def write_plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw KL divergence over bits per weight, log scales both; a model equal to its base is left out.

    Thin bars are 95 % intervals, thick ones those of the difference to the model with the next lower KL
    divergence; a hollow point is not resolved from that model.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    shown = [(name, row) for name, row in zip(short_names(rows), rows, strict=True) if (row["kld"] or 0) > 0]
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, row in shown:
        color = "tab:red" if "FQ4" in row["types"] else "tab:blue"
        hollow = row["rival"] is not None and not row["kld_diff_resolved"]
        for key, width in (("kld_ci95", 1), ("kld_diff_ci95", 4)):
            bars = _bars(row["kld"], row[key])
            if bars is not None:
                axes.errorbar(row["bits_per_weight"], row["kld"], yerr=bars, ecolor=color, elinewidth=width)
        axes.plot(
            row["bits_per_weight"], row["kld"], "D" if "FQ4" in row["types"] else "o", color=color,
            markerfacecolor="white" if hollow else color, zorder=3, label=name,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(BITS_TICKS))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.15, y=0.15)
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.set_xlabel("bits per weight (all tensors)")
    axes.set_ylabel(f"mean KL divergence to {short_names(rows)[0]} (nats per token)")
    text = Path(rows[0]["text"]).name
    axes.set_title(f"{text}: {rows[0]['tokens_scored']} tokens, windows of {rows[0]['ctx']}")
    figure.supxlabel(PLOT_TEXT, fontsize="small")
    canvas.draw()  # type: ignore[no-untyped-call]
    _label_points(axes, canvas.get_renderer(), shown)  # type: ignore[no-untyped-call]
    save_figure(path, figure)


def _bars(value: float, bounds: Sequence[float] | None) -> list[list[float]] | None:
    """Lengths below and above ``value`` of an interval as wide as ``bounds``, above 0 for the log scale."""
    if bounds is None:
        return None
    half = (bounds[1] - bounds[0]) / 2
    return [[min(half, 0.9 * value)], [half]]


def _label_points(axes: Axes, renderer: RendererBase, shown: Sequence[tuple[str, Row]]) -> None:
    """Write each model's name beside its point, at the first of a few places where it covers nothing."""
    taken: list[Bbox] = []
    points = [axes.transData.transform((row["bits_per_weight"], row["kld"])) for _, row in shown]
    for name, row in shown:
        for dx, dy in ((9, 0), (-9, 0), (9, 12), (9, -12), (-9, 12), (-9, -12), (9, 24), (9, -24)):
            text = axes.annotate(
                name, (row["bits_per_weight"], row["kld"]), (dx, dy), textcoords="offset points",
                ha="left" if dx > 0 else "right", va="center",
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            if not any(box.overlaps(other) for other in taken) and not any(box.contains(*p) for p in points):
                break
            text.remove()
        else:
            text = axes.annotate(
                name, (row["bits_per_weight"], row["kld"]), (9, 0), textcoords="offset points"
            )
            box = text.get_window_extent(renderer)
        taken.append(box)
