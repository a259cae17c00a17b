#!/usr/bin/env python3
"""Writes docs/architectures-flat4.md: what recipe flat4 does to the matrices of every architecture.

    scripts/arch_flat4.py [--steps N] [--folder build/arch-flat4] [-o docs/architectures-flat4.md] [MODEL ...]

Converts the tests' models, see tests/python/arch_models.py, each in less than a minute of one core, and reads
from the file how every matrix of a block ended. The folder keeps the models and, a line each, what was found;
the same command goes on there, and tries again what failed. With names only these models are converted, and
the page is left alone. --steps cuts the search for transforms short, which takes most of the time; the page
says so, and the command without it does these models again.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import string
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ggml_ext.convert import convert
from ggml_ext.core.atomic import write_text
from ggml_ext.core.registry import FLOAT_TYPES
from ggml_ext.gguf.header import Header, read_header
from ggml_ext.gguf.inspect import inspect
from ggml_ext.gguf.keys import value_of
from ggml_ext.gguf.source import open_gguf
from ggml_ext.methods.calibrate import blocks
from ggml_ext.methods.rounding import grid
from ggml_ext.methods.transforms import TransformRequest
from ggml_ext.observe.prepare import table_of
from ggml_ext.observe.sites import NEVER
from ggml_ext.recipes import Options

ROOT = Path(__file__).resolve().parents[1]
CTX, SAMPLES = 64, 24

HEAD = """\
# flat4 on every architecture

What `ggml-ext convert --recipe flat4` does to the matrices of blocks in the tiny random models of
[every architecture](architectures.md) that upstream's `test-llama-archs` can save, and of Gemma 4.
`scripts/arch_flat4.py` converts them and writes this page from the files. Weights and text are random: it
shows what is done, not how good the result is.

A matrix is a tensor `blk.*.weight` with two dimensions or more above 1; a stack of experts or of heads is
one. It is rounded by *GPTQ*; by the *importances* of its channels, where its type has no levels for GPTQ to
choose from; to *nearest*, where no product reads it; or it stays a *float*: what llama-quantize leaves alone
too, routers, convolutions and norms with a row per head above all, and rows that fit the blocks of no type.
"""

CUT = """\
In {cut} of {models} models the search for transforms was cut short (`--steps`): where they go does not
depend on how good they are.
"""


@dataclass(frozen=True)
class Ending:
    """How a matrix ended. ``type``: in lower case. ``rounding``: "gptq", "imatrix", "nearest" or "float".
    ``online``, ``folded``: what was done to its input. ``use``: how the graph uses what is at no site, else
    ""."""

    type: str
    rounding: str
    online: bool
    folded: bool
    use: str = ""


@dataclass(frozen=True)
class Result:
    """One model's line. ``matrices``: by tensor, empty where the conversion failed with ``error``. ``steps``:
    of the search for transforms, 0 for flat4's own."""

    model: str
    arch: str
    matrices: Mapping[str, Ending]
    remarks: Sequence[str]
    seconds: float
    error: str = ""
    steps: int = 0

    def count(self, *roundings: str) -> int:
        return sum(its.rounding in roundings for its in self.matrices.values())

    @property
    def short(self) -> bool:
        """Whether a matrix got less than GPTQ."""
        return bool(self.error) or self.count("imatrix", "nearest") > 0


def result_of(line: str) -> Result:
    """A line of the results as it was written."""
    facts = json.loads(line)
    facts["matrices"] = {name: Ending(**its) for name, its in facts["matrices"].items()}
    return Result(**facts)


def transformed(header: Header) -> dict[str, tuple[bool, bool]]:
    """Tensor that reads a site of the file -> whether its input is transformed online, and by a fold."""

    def values(name: str) -> list[Any]:
        return list(value_of(header, f"ggml_ext.{name}") or ())

    online, folded = values("site.online"), values("site.folded")
    orders, sizes, heads = (
        values(name) or [0] * len(online) for name in ("transform.hadamard", "fold.sizes", "fold.orders")
    )
    readers, factors = iter(values("site.readers")), {tensor.name for tensor in header.tensors}
    found: dict[str, tuple[bool, bool]] = {}
    for site, n in enumerate(online):
        names = [next(readers) for _ in range(n + folded[site])]
        anchor = names[0].removesuffix(".weight")
        runs = orders[site] > 1 or bool({f"{anchor}.fq_l", f"{anchor}.fq_r"} & factors)
        for i, name in enumerate(names):
            found[name] = (runs and i < n, sizes[site] > 0 or heads[site] > 0)
    return found


def endings(model: Path, out: Path) -> dict[str, Ending]:
    """How the matrices of the blocks of ``model`` ended in the file ``out``."""
    others, sites, about = table_of(model, CTX).others, transformed(read_header(out)), inspect(out)
    assert about.ext is not None
    measured = about.ext.errors.tensors if about.ext.errors is not None else ()
    own = {tensor.name: tensor.dims for tensor in open_gguf(model).tensors}
    found = {}
    for tensor in about.tensors:
        name, kind = tensor.name, tensor.type.lower()
        if not re.fullmatch(r"blk\..*\.weight", name) or sum(n > 1 for n in own.get(name, ())) < 2:
            continue
        if kind in FLOAT_TYPES:
            rounding = "float"
        elif name in measured:
            rounding = "gptq" if grid.supports(kind) else "imatrix"
        else:
            rounding = "nearest"
        found[name] = Ending(kind, rounding, *sites.get(name, (False, False)), others.get(name, ""))
    return found


def run(model: Path, text: Path, steps: int = 0) -> Result:
    """Converts a model with flat4, or as many steps of its search. A failure is a result too: the others' do
    not depend on it."""
    started, options = time.monotonic(), Options(samples=SAMPLES)
    remarks, matrices, error = list[str](), dict[str, Ending](), ""
    request = partial(TransformRequest, steps=steps) if steps else TransformRequest
    with tempfile.TemporaryDirectory() as folder, patch.object(blocks, "TransformRequest", request):
        out = Path(folder) / "out.gguf"
        try:
            convert(
                model,
                out,
                recipe="flat4",
                options=options,
                calibration=text,
                ctx=CTX,
                threads=1,
                warn=remarks.append,
            )
            matrices = endings(model, out)
        except Exception as exc:
            error = f"{type(exc).__name__}: {exc}"
    seconds = round(time.monotonic() - started, 1)
    return Result(model.stem, model.stem.rpartition("-")[0], matrices, remarks, seconds, error, steps)


def kind(name: str) -> str:
    """blk.3.ffn_up.weight -> ffn_up."""
    return re.sub(r"^blk\.\d+\.|\.weight$", "", name)


def reasons(result: Result) -> str:
    """The kinds of a model's matrices that got less than GPTQ, and why."""
    if result.error:
        return result.error.replace("|", "\\|")
    kinds: defaultdict[str, set[str]] = defaultdict(set)
    for name, its in result.matrices.items():
        if its.rounding == "nearest":
            kinds["no text reads them" if its.use == NEVER else f"{its.use} reads them"].add(kind(name))
        elif its.rounding == "imatrix":
            kinds[f"{its.type} has no levels to choose from"].add(kind(name))
    return "; ".join(f"{', '.join(sorted(names))} ({why})" for why, names in sorted(kinds.items()))


def by_kind(results: Iterable[Result]) -> Iterator[str]:
    """A line for every kind of weight."""
    models: defaultdict[str, set[str]] = defaultdict(set)
    found: defaultdict[str, list[Ending]] = defaultdict(list)
    for result in results:
        for name, its in result.matrices.items():
            models[kind(name)].add(result.model)
            found[kind(name)].append(its)
    for name, its in sorted(found.items()):
        rounded = [ending for ending in its if ending.rounding != "float"]
        floats = [ending.type for ending in its if ending.rounding == "float"]
        cells: list[int | str] = [
            len(models[name]),
            len(its),
            *(sum(e.rounding == how for e in its) for how in ("gptq", "imatrix", "nearest")),
            f"{len(floats)} {', '.join(sorted(set(floats)))}" if floats else "",
            sum(ending.use == NEVER for ending in its),
            sum(ending.online for ending in rounded),
            sum(ending.folded for ending in rounded),
            sum(not ending.online and not ending.folded for ending in rounded),
        ]
        yield f"| {name} | {' | '.join(str(cell or '') for cell in cells)} |"


def page(results: Sequence[Result]) -> str:
    """docs/architectures-flat4.md."""
    whole = [result for result in results if not result.short]
    archs = {result.arch for result in results}
    whole_archs = archs - {result.arch for result in results if result.short}
    rest = [result for result in results if result.short]
    cut = sum(result.steps > 0 for result in results)
    gptq, imatrix, nearest, floats = (
        sum(result.count(how) for result in results) for how in ("gptq", "imatrix", "nearest", "float")
    )
    lines = [
        HEAD,
        *([CUT.format(cut=cut, models=len(results))] if cut else []),
        f"In {len(whole)} of {len(results)} models, and in all models of {len(whole_archs)} of {len(archs)} "
        f"architectures, every matrix is rounded by GPTQ or stays a float. In all there are {gptq} matrices "
        f"rounded by GPTQ, {imatrix} by importances, {nearest} to nearest, and {floats} floats.\n",
        "## By model\n",
        "Models that lack nothing, with the number of their matrices, of floats among them in parentheses:\n",
        ", ".join(f"{r.model} {len(r.matrices)}{_floats(r)}" for r in whole) + ".\n",
        "What falls short in the others:\n",
        "| Model | Matrices | GPTQ | Float | Importances | Nearest | Which |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for result in rest:
        counts = [result.count(how) for how in ("gptq", "float", "imatrix", "nearest")]
        cells = [len(result.matrices), *counts]
        lines.append(
            f"| {result.model} | {' | '.join(str(cell or '') for cell in cells)} | {reasons(result)} |"
        )
    lines += [
        "\n## By kind of weight\n",
        "*Online*, *folded*: matrices that are rounded and whose input a transform changes at run time, by a "
        "fold, or both. *Neither*: rounded as they are, since the graph has no place for a transform or does "
        "not read them. *Not run*: those that llama.cpp does not read for a text, whatever they become.\n",
        "| Weight | Models | Matrices | GPTQ | Importances | Nearest | Float | Not run | Online | Folded "
        "| Neither |",
        "|---|" + "--:|" * 10,
        *by_kind(results),
    ]
    return "\n".join(lines) + "\n"


def _floats(result: Result) -> str:
    n = result.count("float")
    return f" ({n})" if n else ""


def load(log: Path) -> dict[str, Result]:
    """The results so far: of each model the last."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return {result.model: result for result in map(result_of, lines)}


def prepare(folder: Path, make: Callable[[Path], object]) -> tuple[Path, Path]:
    """The folder of the models, made with ``make`` if need be, and the text."""
    sys.path.append(str(ROOT / "tests" / "python"))
    from arch_models import BYTES_PER_TOKEN

    models, partial, text = folder / "models", folder / "models.partial", folder / "text.txt"
    if not models.is_dir():
        partial.mkdir(parents=True, exist_ok=True)
        make(partial)
        partial.rename(models)
    letters = random.Random(0).choices(string.ascii_lowercase, k=BYTES_PER_TOKEN * CTX * (SAMPLES + 2))
    text.write_text("".join(letters))
    return models, text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="of these only")
    program = ROOT / "build" / "patched" / "bin" / "test-llama-archs"
    parser.add_argument(
        "--program", type=Path, default=program, help="upstream's program that saves the models"
    )
    parser.add_argument("--steps", type=int, default=0, help="of the search for transforms, in place of 80")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "arch-flat4")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "architectures-flat4.md")
    options = parser.parse_args()
    sys.path.append(str(ROOT / "tests" / "python"))
    import arch_models

    models, text = prepare(options.folder, lambda folder: arch_models.save(folder, options.program))
    log = options.folder / "results.jsonl"
    done = {
        name for name, result in load(log).items() if not result.error and (options.steps or not result.steps)
    }
    names = options.models or sorted(arch_models.NAMES)
    for name in names:
        if name in done:
            continue
        result = run(models / f"{name}.gguf", text, options.steps)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        print(f"{name}: {result.error or 'done'}, {result.seconds} s", flush=True)
    if not options.models:
        found = load(log)
        write_text(options.output, page([found[name] for name in names]))


if __name__ == "__main__":
    main()
