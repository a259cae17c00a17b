"""``ggml-ext compare``: models on a text, and with --task on questions about long texts."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ggml_ext.cli.shared import (
    CacheKOption,
    CacheVOption,
    CtxOption,
    JsonOption,
    KvOption,
    ThreadsOption,
    bound_threads,
    print_table,
    wrote,
)


class Task(str, Enum):
    """What ``compare`` can ask."""

    retrieval = "retrieval"


def _refuse(context: typer.Context, parameters: Sequence[str], reason: str) -> None:
    """Wrong usage if an option of one of the ``parameters`` stands on the command line."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in parameters and source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(reason, param_hint=parameter.opts[-1])


def compare(
    context: typer.Context,
    base: Annotated[Path, typer.Argument(metavar="BASE.gguf", help="Reference, usually f16 or bf16.")],
    models: Annotated[list[Path], typer.Argument(metavar="MODEL.gguf...", help="Models to compare with it.")],
    text: Annotated[
        Path | None,
        typer.Option(
            "-f", "--file", metavar="TEXT", help="Text (UTF-8); may be left out for --task retrieval."
        ),
    ] = None,
    ctx: CtxOption = 512,
    threads: ThreadsOption = None,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of speed measurements; 0 for none.")] = 5,
    layers: Annotated[int, typer.Option(min=0, help="Windows for the error per block; 0 for none.")] = 8,
    cache_k: CacheKOption = "f16",
    cache_v: CacheVOption = "f16",
    kv: KvOption = None,
    json_out: JsonOption = None,
    report_out: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.md", help="Write a report.")
    ] = None,
    plot_out: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE.png", help="Draw KL divergence over bits per weight, or scores by depth."
        ),
    ] = None,
    task: Annotated[
        Task | None, typer.Option(help="Ask for what stands in long texts instead: docs/retrieval.md.")
    ] = None,
    lengths: Annotated[
        str, typer.Option(metavar="LIST", help="retrieval: tokens of text, question and answer.")
    ] = "512,1024,2048",
    depths: Annotated[int, typer.Option(min=1, help="retrieval: places of the fact in a text.")] = 5,
    cases: Annotated[int, typer.Option(min=1, help="retrieval: texts per task, length and depth.")] = 4,
    together: Annotated[
        bool, typer.Option("--question-with-text", help="retrieval: ask in the text's last batch.")
    ] = False,
) -> None:
    """Size, perplexity, KL divergence, top-1 agreement and speed of models against a base."""
    bound_threads(threads)
    if task is not None:
        _refuse(context, ["ctx", "rounds", "layers", "report_out"], "is not for --task")
        _retrieval(
            base,
            models,
            text,
            lengths=lengths,
            depths=depths,
            cases=cases,
            threads=threads,
            cache_k=cache_k,
            cache_v=cache_v,
            kv=kv,
            together=together,
            json_out=json_out,
            plot_out=plot_out,
        )
        return
    _refuse(context, ["lengths", "depths", "cases", "together"], "needs --task retrieval")
    if text is None:
        raise typer.BadParameter("is needed without --task", param_hint="-f")
    from ggml_ext.measure import loss, report
    from ggml_ext.measure.compare import compare as run_compare
    from ggml_ext.runtime.cache_types import CacheTypes

    cache = CacheTypes.of(cache_k, cache_v, kv)

    def deliver(rows: list[report.Row]) -> None:
        print_table(report.table(rows))
        for name, row in zip(report.short_names(rows), rows, strict=True):
            line = loss.summary(row, name)
            if line is not None:
                print(line)
        summary = f"compared {len(models)} models with {base}"
        print("; ".join([summary, *wrote(json_out, report_out, plot_out)]), flush=True)

    run_compare(
        base,
        models,
        text,
        ctx=ctx,
        threads=threads,
        rounds=rounds,
        layers=layers,
        cache=cache,
        json_out=json_out,
        report_out=report_out,
        plot_out=plot_out,
        deliver=deliver,
    )


def _retrieval(
    base: Path,
    models: Sequence[Path],
    text: Path | None,
    *,
    lengths: str,
    depths: int,
    cases: int,
    threads: int | None,
    cache_k: str,
    cache_v: str,
    kv: str | None,
    together: bool,
    json_out: Path | None,
    plot_out: Path | None,
) -> None:
    """Judge the models, print the table and the lines below it."""
    from ggml_ext.measure import report, retrieval, retrieval_report
    from ggml_ext.runtime.cache_types import CacheTypes

    def deliver(rows: list[report.Row]) -> None:
        print_table(retrieval_report.table(rows))
        for line in retrieval_report.summaries(rows):
            print(line)
        for line in wrote(json_out, plot_out):
            print(line, flush=True)

    retrieval.judge(
        base,
        models,
        text,
        retrieval.Grid(retrieval.parse_lengths(lengths), depths, cases),
        threads=threads,
        cache=CacheTypes.of(cache_k, cache_v, kv),
        together=together,
        json_out=json_out,
        plot_out=plot_out,
        deliver=deliver,
    )
