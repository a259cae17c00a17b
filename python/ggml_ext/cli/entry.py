"""The command line: parses, calls, prints. Every command's work is in the module it imports.

Errors are one line on standard error. Exit status: 0 done, 1 failed, 2 wrong usage, 128 + n ended by signal n
(130 Ctrl-C, 143 SIGTERM, 129 SIGHUP).
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.table import Table
from rich.text import Text

from ggml_ext import __version__
from ggml_ext.cli.compare import compare
from ggml_ext.cli.convert import calibrate, convert, recipes
from ggml_ext.cli.kv_codebook import kv_codebook
from ggml_ext.cli.kv_probe import kv_probe
from ggml_ext.cli.observe import observe
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
from ggml_ext.core.errors import GgmlExtError, one_line
from ggml_ext.core.signals import Terminated, as_interrupts


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn errors into one line and an exit status."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except GgmlExtError as error:
        _fail(str(error))
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Terminated) else signal.SIGINT
        how = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
        print(f"ggml-ext: {how}", file=sys.stderr)
        raise typer.Exit(128 + number) from None
    except BrokenPipeError:
        _drop_output()
        raise typer.Exit(1) from None
    except OSError as error:
        _drop_output()
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; check the file and the disk it is on")
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if hasattr(error, "show"):  # wrong usage, which typer itself reports
            raise
        _fail(one_line(error))


def _drop_output() -> None:
    """Where stdout takes no more, what waits for it goes nowhere: at its exit Python would try once more, in
    lines of its own and with status 120."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _fail(message: str) -> None:
    print(f"ggml-ext: error: {message}", file=sys.stderr)
    raise typer.Exit(1) from None


class _Commands(typer.core.TyperGroup):
    """The commands; typer itself reports wrong usage and exits with status 2."""

    def invoke(self, ctx: Any) -> Any:
        with _one_line_errors():
            return super().invoke(ctx)


app = typer.Typer(
    name="ggml-ext",
    cls=_Commands,
    help="New GGML ops and quant types for llama.cpp: convert models, measure them, run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="Model file.")]
ModelsArgument = Annotated[list[Path], typer.Argument(metavar="MODEL.gguf...", help="Model files.")]
TextOption = Annotated[
    Path, typer.Option("-f", "--file", metavar="TEXT", help="Text to evaluate on (UTF-8).")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"ggml-ext {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


app.command()(convert)
app.command()(calibrate)
app.command()(observe)
app.command()(kv_probe)
app.command()(kv_codebook)
app.command()(recipes)


@app.command()
def perplexity(
    model: ModelArgument,
    text: TextOption,
    ctx: CtxOption = 512,
    threads: ThreadsOption = None,
    cache_k: CacheKOption = "f16",
    cache_v: CacheVOption = "f16",
    kv: KvOption = None,
    json_out: JsonOption = None,
) -> None:
    """Perplexity of a model on a text, equal to llama-perplexity's."""
    bound_threads(threads)
    from ggml_ext.core.outputs import check_outputs, write_json
    from ggml_ext.measure.evaluate import PerplexityResult
    from ggml_ext.measure.evaluate import perplexity as run_perplexity
    from ggml_ext.measure.report import number
    from ggml_ext.runtime.cache_types import CacheTypes

    cache = CacheTypes.of(cache_k, cache_v, kv)

    def deliver(result: PerplexityResult) -> None:
        if json_out is not None:
            write_json(json_out, {**vars(result), "model": str(model), "text": str(text), **cache.as_json()})
        print(
            f"{model}: perplexity {number(result.ppl, result.ppl_se, '.4f')} "
            f"({result.windows} windows of {ctx} tokens, {result.count} scored)",
            flush=True,
        )

    check_outputs(json_out, inputs=[model, text])
    run_perplexity(model, text, ctx=ctx, threads=threads, cache=cache, deliver=deliver)


app.command()(compare)


@app.command()
def bench(
    models: ModelsArgument,
    prompt: Annotated[int, typer.Option("-p", "--prompt", min=1, help="Tokens of the prompt.")] = 512,
    generate: Annotated[int, typer.Option("-n", "--generate", min=1, help="Tokens to generate.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the models take turns.")] = 5,
    threads: ThreadsOption = None,
    cache_k: CacheKOption = "f16",
    cache_v: CacheVOption = "f16",
    json_out: JsonOption = None,
) -> None:
    """Prompt and generation speed of models, measured with llama-bench in turns."""
    from ggml_ext.core.outputs import check_outputs, write_json
    from ggml_ext.measure import bench as benchmark
    from ggml_ext.measure import report
    from ggml_ext.runtime.cache_types import CacheTypes

    caches = [CacheTypes.of(cache_k, cache_v)] * len(models)
    check_outputs(json_out, inputs=models)
    speeds = benchmark.bench(
        models, prompt=prompt, generate=generate, rounds=rounds, threads=threads, caches=caches
    )
    rows = benchmark.as_rows(speeds)
    if json_out is not None:
        write_json(json_out, rows)
    print_table(report.speed_table(rows))
    print("; ".join([f"measured {len(models)} models in {rounds} rounds", *wrote(json_out)]))


@app.command()
def inspect(
    model: ModelArgument,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    bits: Annotated[bool, typer.Option("--bits", help="Show which matrices the bits went to.")] = False,
    plot_out: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the bits of every matrix.")
    ] = None,
    json_out: JsonOption = None,
) -> None:
    """What a GGUF file consists of: types, sizes, how it was made."""
    from ggml_ext.core.outputs import check_outputs, write_json
    from ggml_ext.core.plots import require_matplotlib
    from ggml_ext.gguf import bits as shares
    from ggml_ext.gguf import inspect as inspection

    check_outputs(json_out, plot_out, inputs=[model])
    if plot_out is not None:
        require_matplotlib()
    result = inspection.inspect(model)
    if json_out is not None:
        write_json(json_out, result.as_json())
    inspection.print_result(result, tensors=tensors)
    if bits:
        print_table(shares.bits_table(result))
    if plot_out is not None:
        shares.write_plot(plot_out, result)
    for line in wrote(json_out, plot_out):
        print(line)


@app.command()
def build(
    dest: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to install to.")] = Path(
        "ggml-ext-build"
    ),
    source: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="llama.cpp tree or archive instead of the pinned release."),
    ] = None,
    cuda: Annotated[bool, typer.Option("--cuda", help="With the CUDA backend.")] = False,
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="CUDA architectures, as 80,86,90a. [default: this machine's devices, else 75,80,86,89,90a]",
        ),
    ] = None,
    rpc: Annotated[bool, typer.Option("--rpc", help="With the RPC backend and server.")] = False,
) -> None:
    """Build the patched llama.cpp elsewhere, with other backends or from another source."""
    from ggml_ext.build.toolkit import build as run_build

    if arch is not None and not cuda:
        raise typer.BadParameter("needs --cuda", param_hint="--arch")
    made = run_build(dest, source=source, cuda=cuda, arch=arch, rpc=rpc)
    print(f"{made}: patched llama.cpp; use it with GGML_EXT_LIB_DIR={made}/lib GGML_EXT_BIN_DIR={made}/bin")


@app.command(
    context_settings={
        "allow_extra_args": True,
        "allow_interspersed_args": False,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def run(
    context: typer.Context,
    tool: Annotated[str, typer.Argument(metavar="TOOL", help="llama-cli, llama-server, llama-quantize, ...")],
    kv: KvOption = None,
) -> None:
    """Run a tool of the patched llama.cpp; everything behind its name goes to the tool."""
    from ggml_ext.build.toolkit import run_tool

    run_tool(tool, context.args, kv=kv)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What is installed and what works here; exit status 1 if something needed is broken."""
    from ggml_ext.runtime.doctor import checks

    found = checks()
    if as_json:
        print(json.dumps([vars(check) for check in found], indent=2))
    else:
        table = Table("", "what", "found", "remedy")
        for check in found:
            # Text, since plain strings would lose "[convert]" as markup.
            table.add_row(*map(Text, (check.state, check.name, check.found, check.remedy)))
        print_table(table)
    if any(check.state == "broken" for check in found):
        raise typer.Exit(1)


def _escape_output() -> None:
    """Names and signs that the terminal's encoding does not have are printed as \\x or \\u escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """Run the command line; exits with its status."""
    _escape_output()
    with as_interrupts() as came:
        try:
            app()
        except SystemExit:
            if came:  # also where it came outside a command, which typer takes for Ctrl-C
                sys.exit(128 + came[-1])
            raise


if __name__ == "__main__":
    main()
