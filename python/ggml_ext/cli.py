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
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ggml_ext import __version__
from ggml_ext.cli_observe import observe
from ggml_ext.cpus import physical_cores
from ggml_ext.errors import GgmlExtError, one_line
from ggml_ext.signals import Terminated, as_interrupts


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
        sys.stderr.close()  # nobody reads our output any more; keeps Python from complaining at exit
        raise typer.Exit(1) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; check the file and the disk it is on")
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if hasattr(error, "show"):  # wrong usage, which typer itself reports
            raise
        _fail(one_line(error))


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
CtxOption = Annotated[int, typer.Option("--ctx", min=16, help="Tokens per window.")]
ThreadsOption = Annotated[
    int | None, typer.Option("-t", "--threads", min=1, help="Threads; by default one per physical core.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON.")]


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


def _rule(value: str) -> tuple[str, str]:
    """Splits the REGEX=TYPE of --type-for at its last equals sign; a type name has none."""
    pattern, separator, type_name = value.rpartition("=")
    if not separator or not pattern or not type_name:
        raise typer.BadParameter(f"{value!r} is not REGEX=TYPE, for example 'ffn_down=q6_k'")
    return pattern, type_name


RecipeOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Named recipe, see ggml-ext recipes; options beside it win."),
]
TypeOption = Annotated[
    str | None,
    typer.Option(
        "--type", help="Type (fq4, q4_k, ...), fq4_m, or llama-quantize mix (q4_k_m, ...); fq4 by default."
    ),
]
TransformOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="none, smoothquant, awq, hadamard or flatquant.")
]
RoundingOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="rtn (to nearest), imatrix or gptq.")
]
ActivationOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Activations: a8 (llama.cpp's own), a4, a4/32 or a4/256."),
]
TypeForOption = Annotated[
    list[str] | None,
    typer.Option(metavar="REGEX=TYPE", help="Type of the tensors whose names match; repeatable."),
]
KeepOption = Annotated[
    list[str] | None, typer.Option(metavar="REGEX", help="Tensors that are not quantised; repeatable.")
]
CalibrationCtxOption = Annotated[
    int, typer.Option("--ctx", min=16, help="Tokens per window of the calibration text.")
]
SamplesOption = Annotated[
    int | None,
    typer.Option(min=1, help="Windows of the calibration text; by default 128, or more for wide matrices."),
]
SeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything random.")]
DeviceOption = Annotated[str, typer.Option(metavar="cpu|cuda", help="Where transforms are solved.")]
ParseSpecialOption = Annotated[
    bool,
    typer.Option(
        "--parse-special", help="Spellings of control tokens in the text, as in chats, are these tokens."
    ),
]
MatricesOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Use the transforms in flat_matrices.pth of FlatQuant's own code."),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python files of the model folder that its tokenizer needs; read them.",
    ),
]
AllThreadsOption = Annotated[int, typer.Option("-t", "--threads", min=0, help="Threads; 0 for all.")]


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Hugging Face model folder, or f32/f16/bf16/q8_0 GGUF.")
    ],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.gguf", help="File to write.")],
    recipe: RecipeOption = None,
    type_name: TypeOption = None,
    transform: TransformOption = None,
    rounding: RoundingOption = None,
    activation: ActivationOption = None,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Importance matrix of llama-imatrix.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="TEXT", help="Text to calibrate on, or to compute an importance matrix from."),
    ] = None,
    calibrated: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of a finished ggml-ext calibrate.")
    ] = None,
    type_for: TypeForOption = None,
    keep: KeepOption = None,
    ctx: CalibrationCtxOption = 512,
    samples: SamplesOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    matrices: MatricesOption = None,
    parse_special: ParseSpecialOption = False,
    trust_remote_code: TrustOption = False,
    threads: AllThreadsOption = 0,
) -> None:
    """Convert a model to a GGUF file: transform x rounding x type, or a recipe that names all three."""
    rules = [_rule(value) for value in type_for or []]
    _bound_threads(threads)
    from ggml_ext.convert import convert as run_convert
    from ggml_ext.device import require_device
    from ggml_ext.recipes import Options

    require_device(_device(device))

    options = Options(type_name, transform, rounding, activation, samples)
    if calibrated is not None and (
        recipe or calibration or imatrix or matrices or rules or keep or options != Options()
    ):
        raise typer.BadParameter("the calibration has decided this already", param_hint="--calibrated")
    result = run_convert(
        source,
        out,
        recipe=recipe,
        options=options,
        imatrix=imatrix,
        calibration=calibration,
        calibrated=calibrated,
        type_for=rules,
        keep=keep or [],
        ctx=ctx,
        seed=seed,
        device=_device(device),
        matrices=matrices,
        parse_special=parse_special,
        trust_remote_code=trust_remote_code,
        threads=threads,
    )
    print(result.summary())


@app.command()
def calibrate(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Hugging Face model folder, or f32/f16/bf16/q8_0 GGUF.")
    ],
    calibration: Annotated[Path, typer.Option(metavar="TEXT", help="Text to calibrate on (UTF-8).")],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder, begun or to begin.")],
    recipe: RecipeOption = None,
    type_name: TypeOption = None,
    transform: TransformOption = None,
    rounding: RoundingOption = None,
    activation: ActivationOption = None,
    type_for: TypeForOption = None,
    keep: KeepOption = None,
    ctx: CalibrationCtxOption = 512,
    samples: SamplesOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    matrices: MatricesOption = None,
    parse_special: ParseSpecialOption = False,
    trust_remote_code: TrustOption = False,
    threads: AllThreadsOption = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what memory, disk and time it would take.")
    ] = False,
) -> None:
    """Calibrate a model block by block for convert --calibrated; interrupted, the same command goes on."""
    rules = [_rule(value) for value in type_for or []]
    _bound_threads(threads)
    from ggml_ext import recipes
    from ggml_ext.device import require_device

    recipes.require_packages()
    require_device(_device(device))
    from ggml_ext.calibrate import calibrate as run_calibrate
    from ggml_ext.calibration_plan import Request

    options = recipes.Options(type_name, transform, rounding, activation, samples)
    method = recipes.resolve(recipe, options, importances=True)
    method = recipes.with_matrices(method, options, matrices)
    request = Request(
        source,
        calibration,
        method,
        rules,
        keep or [],
        ctx,
        seed,
        _device(device),
        threads,
        matrices,
        parse_special,
        trust_remote_code,
    )
    if dry_run:
        from ggml_ext.estimate import estimate

        found = estimate(request, out)
        _print_table(found.table())
        print(found.summary())
        return
    print(run_calibrate(request, out).summary())


app.command()(observe)


def _bound_threads(threads: int | None) -> None:
    """Bounds the threads of numpy's and torch's libraries, which look when they are loaded.

    0 or None: one per core that this process may use. What the user has set stands.
    """
    count = str(threads or physical_cores())
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, count)


def _device(value: str) -> str:
    if value not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{value!r} is not cpu or cuda", param_hint="--device")
    return value


@app.command()
def recipes() -> None:
    """The named recipes and what they stand for."""
    from ggml_ext import recipes as found

    table = Table("recipe", "type", "transform", "rounding", "activations", "for")
    for name in found.names():
        recipe = found.load(name)
        method = recipe.method
        cells = (name, method.type_name, method.transform, method.rounding, method.activation)
        table.add_row(*map(Text, (*cells, recipe.description)))
    _print_table(table)


@app.command()
def perplexity(
    model: ModelArgument,
    text: TextOption,
    ctx: CtxOption = 512,
    threads: ThreadsOption = None,
    json_out: JsonOption = None,
) -> None:
    """Perplexity of a model on a text, equal to llama-perplexity's."""
    _bound_threads(threads)
    from ggml_ext.evaluate import PerplexityResult
    from ggml_ext.evaluate import perplexity as run_perplexity
    from ggml_ext.outputs import check_outputs, write_json
    from ggml_ext.report import number

    def deliver(result: PerplexityResult) -> None:
        if json_out is not None:
            write_json(json_out, {**vars(result), "model": str(model), "text": str(text)})
        print(
            f"{model}: perplexity {number(result.ppl, result.ppl_se, '.4f')} "
            f"({result.windows} windows of {ctx} tokens, {result.count} scored)",
            flush=True,
        )

    check_outputs(json_out, inputs=[model, text])
    run_perplexity(model, text, ctx=ctx, threads=threads, deliver=deliver)


@app.command()
def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE.gguf", help="Reference, usually f16 or bf16.")],
    models: Annotated[list[Path], typer.Argument(metavar="MODEL.gguf...", help="Models to compare with it.")],
    text: TextOption,
    ctx: CtxOption = 512,
    threads: ThreadsOption = None,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of speed measurements; 0 for none.")] = 5,
    layers: Annotated[int, typer.Option(min=0, help="Windows for the error per block; 0 for none.")] = 8,
    json_out: JsonOption = None,
    report_out: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.md", help="Write a report.")
    ] = None,
    plot_out: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Draw KL divergence over bits per weight."),
    ] = None,
) -> None:
    """Size, perplexity, KL divergence, top-1 agreement and speed of models against a base."""
    _bound_threads(threads)
    from ggml_ext import loss, report
    from ggml_ext.compare import compare as run_compare

    def deliver(rows: list[report.Row]) -> None:
        _print_table(report.table(rows))
        for name, row in zip(report.short_names(rows), rows, strict=True):
            line = loss.summary(row, name)
            if line is not None:
                print(line)
        written = [str(path) for path in (json_out, report_out, plot_out) if path is not None]
        wrote = f"; wrote {', '.join(written)}" if written else ""
        print(f"compared {len(models)} models with {base}{wrote}", flush=True)

    run_compare(
        base,
        models,
        text,
        ctx=ctx,
        threads=threads,
        rounds=rounds,
        layers=layers,
        json_out=json_out,
        report_out=report_out,
        plot_out=plot_out,
        deliver=deliver,
    )


@app.command()
def bench(
    models: ModelsArgument,
    prompt: Annotated[int, typer.Option("-p", "--prompt", min=1, help="Tokens of the prompt.")] = 512,
    generate: Annotated[int, typer.Option("-n", "--generate", min=1, help="Tokens to generate.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the models take turns.")] = 5,
    threads: ThreadsOption = None,
    json_out: JsonOption = None,
) -> None:
    """Prompt and generation speed of models, measured with llama-bench in turns."""
    from ggml_ext import bench as benchmark
    from ggml_ext import report
    from ggml_ext.outputs import check_outputs, write_json

    check_outputs(json_out, inputs=models)
    speeds = benchmark.bench(models, prompt=prompt, generate=generate, rounds=rounds, threads=threads)
    rows = benchmark.as_rows(speeds)
    if json_out is not None:
        write_json(json_out, rows)
    _print_table(report.speed_table(rows))
    print(f"measured {len(models)} models in {rounds} rounds" + (f"; wrote {json_out}" if json_out else ""))


@app.command()
def inspect(
    model: ModelArgument,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json_out: JsonOption = None,
) -> None:
    """What a GGUF file consists of: types, sizes, how it was made."""
    from ggml_ext import inspect as inspection
    from ggml_ext.outputs import check_outputs, write_json

    check_outputs(json_out, inputs=[model])
    result = inspection.inspect(model)
    if json_out is not None:
        write_json(json_out, result.as_json())
    inspection.print_result(result, tensors=tensors)


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
    from ggml_ext.build import build as run_build

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
) -> None:
    """Run a tool of the patched llama.cpp; everything behind its name goes to the tool."""
    from ggml_ext.build import run_tool

    run_tool(tool, context.args)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What is installed and what works here; exit status 1 if something needed is broken."""
    from ggml_ext.doctor import checks

    found = checks()
    if as_json:
        print(json.dumps([vars(check) for check in found], indent=2))
    else:
        table = Table("", "what", "found", "remedy")
        for check in found:
            # Text, since plain strings would lose "[convert]" as markup.
            table.add_row(*map(Text, (check.state, check.name, check.found, check.remedy)))
        _print_table(table)
    if any(check.state == "broken" for check in found):
        raise typer.Exit(1)


def _print_table(table: Table) -> None:
    """Print ``table`` in full width where the output is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


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
