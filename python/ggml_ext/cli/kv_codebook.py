"""ggml-ext kv-codebook on the command line: parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ggml_ext.cli.shared import CalibrationOption, JsonOption, SeedOption, ThreadsOption, bound_threads
from ggml_ext.core.errors import warn


def kv_codebook(
    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="The file that gets codebooks.")],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.gguf", help="The file with them.")],
    calibration: CalibrationOption = None,
    bits: Annotated[
        list[int] | None,
        typer.Option("--bits", min=1, max=2, help="Per channel; may be given twice. [default: 2 and 1]"),
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Windows of the text.")] = 32,
    ctx: Annotated[int, typer.Option("--ctx", min=256, help="Tokens per window.")] = 2048,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    json_out: JsonOption = None,
) -> None:
    """Fit the codebooks by which a paged KV cache stores old tokens in 2 bits or 1 per channel, and write the
    model with them; interrupted, the same command goes on."""
    bound_threads(threads)
    from ggml_ext.core.outputs import check_outputs, write_json
    from ggml_ext.gguf.added import write_with
    from ggml_ext.observe.kv_codebook import BITS, fit
    from ggml_ext.observe.samples import text_or_default

    state = out.with_name(f"{out.name}.codebooks")
    check_outputs(out, json_out, state, inputs=[model, calibration])
    text = text_or_default(calibration, warn)
    wanted = sorted(set(bits or BITS), reverse=True)
    books = fit(
        model,
        text,
        state,
        bits=wanted,
        samples=samples,
        ctx=ctx,
        seed=seed,
        threads=threads,
        warn=warn,
    )
    write_with(model, books.tensors(), out)
    errors = books.errors()
    if json_out is not None:
        layers: dict[str, dict[str, float]] = {}
        for (layer, which, n), book in books.layers.items():
            layers.setdefault(str(layer), {})[f"{which}_cq{n}"] = book.error
        figures = {"heads": books.heads, "bytes": books.bytes, "tokens": books.tokens}
        by_bits = {f"cq{n}": of for n, of in errors.items()}
        write_json(json_out, {**figures, "error": by_bits, "layers": layers})
    state.unlink(missing_ok=True)  # last: from it the figures can be had again
    print(f"{out}: {books.summary()}")
