"""ggml-ext convert, calibrate and recipes on the command line: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ggml_ext.cli_shared import bound_threads, print_table
from ggml_ext.registry import ROUNDINGS, TRANSFORMS


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
TransformOption = Annotated[str | None, typer.Option(metavar="NAME", help=f"One of {', '.join(TRANSFORMS)}.")]
RoundingOption = Annotated[
    str | None, typer.Option(metavar="NAME", help=f"One of {', '.join(ROUNDINGS)}; rtn: to nearest.")
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
    bound_threads(threads)
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
    bound_threads(threads)
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
        print_table(found.table())
        print(found.summary())
        return
    print(run_calibrate(request, out).summary())


def _device(value: str) -> str:
    if value not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{value!r} is not cpu or cuda", param_hint="--device")
    return value


def recipes() -> None:
    """The named recipes and what they stand for."""
    from ggml_ext import recipes as found

    table = Table("recipe", "type", "transform", "rounding", "activations", "for")
    for name in found.names():
        recipe = found.load(name)
        method = recipe.method
        cells = (name, method.type_name, method.transform, method.rounding, method.activation)
        table.add_row(*map(Text, (*cells, recipe.description)))
    print_table(table)
