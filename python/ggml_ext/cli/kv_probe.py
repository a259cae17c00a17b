"""ggml-ext kv-probe on the command line: parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ggml_ext.cli.shared import CalibrationOption, JsonOption, SeedOption, ThreadsOption, bound_threads
from ggml_ext.core.errors import warn


def kv_probe(
    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="The file that gets probes.")],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.gguf", help="The file with them.")],
    calibration: CalibrationOption = None,
    samples: Annotated[int, typer.Option(min=2, help="Windows of the text.")] = 32,
    ctx: Annotated[int, typer.Option("--ctx", min=16, help="Tokens per window, which is read twice.")] = 512,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    json_out: JsonOption = None,
) -> None:
    """Fit what policy=probe of a paged KV cache evicts by, and write the model with it; interrupted, the same
    command goes on."""
    bound_threads(threads)
    from ggml_ext.core.outputs import check_outputs, write_json
    from ggml_ext.gguf.added import write_with
    from ggml_ext.observe.kv_probe import fit
    from ggml_ext.observe.samples import text_or_default

    state = out.with_name(f"{out.name}.probes")
    check_outputs(out, json_out, state, inputs=[model, calibration])
    text = text_or_default(calibration, warn)
    probes = fit(model, text, state, samples=samples, ctx=ctx, seed=seed, threads=threads, warn=warn)
    write_with(model, probes.tensors(), out)
    if json_out is not None:
        rows = {str(index): probe.correlation for index, probe in probes.layers.items()}
        write_json(json_out, {"tokens": probes.tokens, "correlation": probes.correlation, "layers": rows})
    state.unlink(missing_ok=True)  # last: from it the figures can be had again
    print(f"{out}: {probes.summary()}")
