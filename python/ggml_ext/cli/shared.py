"""What several commands of the command line do alike."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.table import Table

from ggml_ext.core.cpus import MAX_THREADS, physical_cores

CalibrationOption = Annotated[
    Path | None,
    typer.Option(metavar="TEXT", help="Text to calibrate on (UTF-8). [default: the package's own]"),
]
MAX_SEED = 2**32 - 1
SeedOption = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of everything random.")]
ParseSpecialOption = Annotated[
    bool,
    typer.Option(
        "--parse-special", help="Spellings of control tokens in the text, as in chats, are these tokens."
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python files of the model folder that its tokenizer needs; read them.",
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Only say what memory, disk and time it would take.")
]
CtxOption = Annotated[int, typer.Option("--ctx", min=16, help="Tokens per window.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "-t", "--threads", min=1, max=MAX_THREADS, help="Threads; by default one per physical core."
    ),
]
CacheKOption = Annotated[
    str, typer.Option("-ctk", "--cache-type-k", metavar="TYPE", help="Type of K in the KV cache.")
]
CacheVOption = Annotated[
    str, typer.Option("-ctv", "--cache-type-v", metavar="TYPE", help="Type of V in the KV cache.")
]
KvOption = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="BUDGET",
        help="Cells of the KV cache: 25% of the context, or 4096; or paged, paged,25%,policy=attention, "
        "paged,cold=cq2.",
    ),
]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON.")]


def takes_settings(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: the command's parameter ``settings`` becomes an option for each field of the dataclass."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            its = {field.name: given.pop(field.name) for field in fields(settings)}
            command(settings=settings(**its), **given)

        hints, keyword = get_type_hints(settings, include_extras=True), inspect.Parameter.KEYWORD_ONLY
        own = inspect.signature(command, eval_str=True).parameters
        both: list[inspect.Parameter] = []
        for name, its in own.items():
            if name != "settings":
                both.append(its.replace(kind=keyword))
                continue
            for field in fields(settings):
                hint = hints[field.name]
                both.append(inspect.Parameter(field.name, keyword, default=field.default, annotation=hint))
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {its.name: its.annotation for its in both}
        vars(run)["__signature__"] = inspect.Signature(both)
        return run

    return decorate


def bound_threads(threads: int | None) -> None:
    """Bounds the threads of numpy's and torch's libraries, which look when they are loaded.

    0 or None: one per core that this process may use. What the user has set stands.
    """
    count = str(threads or physical_cores())
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, count)


def print_table(table: Table) -> None:
    """Print ``table`` in full width where the output is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def wrote(*outputs: Path | None) -> list[str]:
    """The line that names the ``outputs``; none where no file was asked for."""
    named = ", ".join(str(path) for path in outputs if path is not None)
    return [f"wrote {named}"] if named else []
