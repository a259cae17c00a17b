"""ggml-ext observe on the command line: parses, calls, prints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ggml_ext.cli.shared import (
    CalibrationOption,
    DryRunOption,
    ParseSpecialOption,
    SeedOption,
    ThreadsOption,
    TrustOption,
    bound_threads,
)
from ggml_ext.core.errors import warn
from ggml_ext.observe.layout import SAMPLE_ROWS

_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)i?B?", re.IGNORECASE)


def size(value: str) -> int:
    """Bytes of "8G", "512M" or a plain number; units are powers of 1024."""
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise typer.BadParameter(f"{value!r} is no size such as 8G or 512M")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def observe(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="Hugging Face model folder, its name on the Hub (org/name[@revision]), or GGUF of any type.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder, begun or to begin.")],
    calibration: CalibrationOption = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Windows of the text; by default 128, or more for wide matrices."),
    ] = None,
    ctx: Annotated[int, typer.Option("--ctx", min=16, help="Tokens per window.")] = 512,
    seed: SeedOption = 0,
    sample_rows: Annotated[
        int,
        typer.Option(
            min=SAMPLE_ROWS, help="Rows to keep of what each matrix reads; 4-bit activations need 4096."
        ),
    ] = SAMPLE_ROWS,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for batches, beside the mapped model.")
    ] = "8G",
    threads: ThreadsOption = None,
    parse_special: ParseSpecialOption = False,
    trust_remote_code: TrustOption = False,
    dry_run: DryRunOption = False,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON.")
    ] = None,
) -> None:
    """Sum what a model's matrices read on a text; interrupted, the same command goes on."""
    allowed = size(memory)
    bound_threads(threads)
    from ggml_ext.core.outputs import check_outputs, write_json
    from ggml_ext.hf import hub
    from ggml_ext.observe.prepare import Request
    from ggml_ext.observe.samples import text_or_default

    check_outputs(json_out, inputs=[source, calibration], folders=[out])
    text = text_or_default(calibration, warn)
    source = hub.fetch(source)
    request = Request(
        source,
        text,
        samples,
        ctx,
        seed,
        allowed,
        threads,
        parse_special,
        trust_remote_code,
        sample_rows=sample_rows,
    )
    if dry_run:
        from ggml_ext.observe.estimate import estimate

        estimated = estimate(request, out, warn=warn)
        if json_out is not None:
            write_json(json_out, estimated.as_json())
        print("\n".join(estimated.lines()))
        return
    from ggml_ext.observe.run import observe as run_observe

    observed = run_observe(request, out, warn=warn)
    if json_out is not None:
        write_json(json_out, observed.as_json())
    print(observed.summary())
