"""ggml-ext convert, calibrate and recipes on the command line: parse, call, print."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ggml_ext.cli.shared import (
    MAX_SEED,
    CalibrationOption,
    DryRunOption,
    ParseSpecialOption,
    TrustOption,
    bound_threads,
    print_table,
    takes_settings,
)
from ggml_ext.core.cpus import MAX_THREADS
from ggml_ext.core.errors import warn
from ggml_ext.core.registry import ROUNDINGS, TRANSFORMS

if TYPE_CHECKING:
    from ggml_ext.recipes import Options


def _rule(value: str) -> tuple[str, str]:
    """Splits the REGEX=TYPE of --type-for at its last equals sign; a type name has none."""
    pattern, separator, type_name = value.rpartition("=")
    if not separator or not pattern or not type_name:
        raise typer.BadParameter(f"{value!r} is not REGEX=TYPE, for example 'ffn_down=q6_k'")
    return pattern, type_name


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _bytes(value: str) -> int:
    """The bytes that a size such as 4G, 1.5 GB or 91900000 stands for."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", value.strip().upper())
    if match is None or not (size := int(float(match[1]) * _UNITS[match[2]])):
        raise typer.BadParameter(f"{value!r} is no size such as 4G, 80M or 91900000", param_hint="--size")
    return size


SourceArgument = Annotated[
    Path,
    typer.Argument(
        metavar="SRC",
        help="Hugging Face model folder, its name on the Hub (org/name[@revision]), or float or q8_0 GGUF.",
    ),
]


@dataclass(frozen=True)
class Settings:
    """The options that convert and calibrate share."""

    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Named recipe, see ggml-ext recipes; options beside it win."),
    ] = None
    type_name: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="Type (fq4, q4_k, ...), fq4_m, or llama-quantize mix (q4_k_m, ...); fq4 by default.",
        ),
    ] = None
    transform: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"One of {', '.join(TRANSFORMS)}.")
    ] = None
    rounding: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"One of {', '.join(ROUNDINGS)}; rtn: to nearest.")
    ] = None
    activation: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Activations: a8 (llama.cpp's own), a4, a4/32 or a4/256."),
    ] = None
    size: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Choose types by what they cost, for a file of at most 4G, 80M, ... (10^9, 10^6).",
        ),
    ] = None
    bpw: Annotated[
        float | None,
        typer.Option(
            metavar="BITS", min=1, max=32, help="The same for so many bits per weight of all tensors."
        ),
    ] = None
    stock: Annotated[
        bool, typer.Option("--stock", help="The same with types that unpatched llama.cpp runs.")
    ] = False
    calibration: CalibrationOption = None
    type_for: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX=TYPE", help="Type of the tensors whose names match; repeatable."),
    ] = None
    keep: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Tensors that are not quantised; repeatable.")
    ] = None
    observed: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Use the finished ggml-ext observe of this model instead of observing it."
        ),
    ] = None
    ctx: Annotated[
        int | None,
        typer.Option(
            min=16, help="Tokens per window of the calibration text. [default: 512, or as --observed]"
        ),
    ] = None
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="Windows of the calibration text; by default 128, or more for wide matrices."
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_SEED, help="Seed of everything random. [default: 0, or as --observed]"),
    ] = None
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where transforms are solved.")] = "cpu"
    matrices: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Use the transforms in flat_matrices.pth of FlatQuant's own code."),
    ] = None
    dask: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Solve and round blocks on the workers of this Dask scheduler."),
    ] = None
    parse_special: ParseSpecialOption = False
    trust_remote_code: TrustOption = False
    threads: Annotated[
        int, typer.Option("-t", "--threads", min=0, max=MAX_THREADS, help="Threads; 0 for all.")
    ] = 0

    @property
    def rules(self) -> list[tuple[str, str]]:
        """``type_for`` as pairs."""
        return [_rule(value) for value in self.type_for or []]

    def options(self) -> Options:
        """What is said of the method."""
        from ggml_ext.recipes import Options

        return Options(
            self.type_name,
            self.transform,
            self.rounding,
            self.activation,
            self.samples,
            None if self.size is None else _bytes(self.size),
            self.bpw,
            self.stock or None,
        )

    def require_device(self) -> None:
        """Refuses what is no device, or one that is not there."""
        if self.device not in ("cpu", "cuda"):
            raise typer.BadParameter(f"{self.device!r} is not cpu or cuda", param_hint="--device")
        from ggml_ext.methods.calibrate.device import require_device

        require_device(self.device)


@takes_settings(Settings)
def convert(
    source: SourceArgument,
    out: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.gguf", help="File to write.")],
    settings: Settings,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Importance matrix of llama-imatrix.")
    ] = None,
    calibrated: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of a finished ggml-ext calibrate.")
    ] = None,
    kv_probe: Annotated[
        bool, typer.Option("--kv-probe", help="Add probes for policy=probe of a paged KV cache.")
    ] = False,
    kv_codebooks: Annotated[
        bool, typer.Option("--kv-codebooks", help="Add codebooks for cold=cq2 and cq1 of a paged KV cache.")
    ] = False,
) -> None:
    """Convert a model to a GGUF file: transform x rounding x type, or a recipe that names all three."""
    its = settings
    rules = its.rules
    bound_threads(its.threads)
    its.require_device()
    from ggml_ext.convert import convert as run_convert
    from ggml_ext.recipes import Options

    options = its.options()
    if calibrated is not None and (
        its.recipe
        or its.calibration
        or its.observed
        or imatrix
        or its.matrices
        or rules
        or its.keep
        or options != Options()
    ):
        raise typer.BadParameter("the calibration has decided this already", param_hint="--calibrated")
    how = {
        "recipe": its.recipe,
        "options": options,
        "imatrix": imatrix,
        "calibration": its.calibration,
        "calibrated": calibrated,
        "observed": its.observed,
        "type_for": rules,
        "keep": its.keep or [],
        "ctx": its.ctx,
        "seed": its.seed,
        "device": its.device,
        "matrices": its.matrices,
        "parse_special": its.parse_special,
        "trust_remote_code": its.trust_remote_code,
        "threads": its.threads,
        "dask": its.dask,
    }

    def make(place: Path) -> str:
        return run_convert(source, place, **how).summary()  # type: ignore[arg-type]

    if not (kv_probe or kv_codebooks):
        print(make(out))
        return
    from ggml_ext.core.outputs import check_outputs
    from ggml_ext.observe.kv_added import Fits, convert_and_add
    from ggml_ext.observe.samples import text_or_default

    inputs = [source, imatrix, its.calibration, calibrated, its.observed, its.matrices]
    check_outputs(out, inputs=inputs, folders=[calibrated, its.observed])
    text = text_or_default(its.calibration, warn)
    fits = Fits(kv_probe, kv_codebooks, text, its.seed or 0, its.threads or None)
    for line in convert_and_add(make, out, inputs, how, fits, warn=warn):
        print(line)


@takes_settings(Settings)
def calibrate(
    source: SourceArgument,
    out: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder, begun or to begin.")],
    settings: Settings,
    dry_run: DryRunOption = False,
) -> None:
    """Calibrate a model block by block for convert --calibrated; interrupted, the same command goes on."""
    its = settings
    rules = its.rules
    bound_threads(its.threads)
    from ggml_ext import recipes
    from ggml_ext.hf import hub

    recipes.require_packages()
    its.require_device()
    from ggml_ext.methods.calibrate.plan import Request
    from ggml_ext.methods.calibrate.run import calibrate as run_calibrate
    from ggml_ext.observe.reuse import Asked, settle
    from ggml_ext.observe.samples import text_or_default

    options = its.options()
    method = recipes.resolve(its.recipe, options, importances=True)
    method = recipes.with_matrices(method, options, its.matrices)
    asked = Asked(its.calibration, its.samples, its.ctx, its.seed, its.parse_special)
    reading = settle(asked, its.observed)
    request = Request(
        hub.fetch(source),
        its.calibration if its.observed is not None else text_or_default(its.calibration, warn),
        method,
        rules,
        its.keep or [],
        reading.ctx,
        reading.seed,
        its.device,
        its.threads,
        its.matrices,
        reading.parse_special,
        its.trust_remote_code,
        its.observed,
        its.dask,
    )
    if dry_run:
        from ggml_ext.methods.calibrate.estimate import estimate

        found = estimate(request, out)
        print_table(found.table())
        print(found.summary())
        return
    print(run_calibrate(request, out).summary())


def recipes() -> None:
    """The named recipes and what they stand for."""
    from ggml_ext import recipes as found

    table = Table("recipe", "type", "transform", "rounding", "activations", "for")
    for name in found.names():
        recipe = found.load(name)
        method = recipe.method
        kind = f"by cost, {method.bpw} bits" if method.allocates else method.type_name
        cells = (name, kind, method.transform, method.rounding, method.activation)
        table.add_row(*map(Text, (*cells, recipe.description)))
    print_table(table)
