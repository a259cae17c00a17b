#!/usr/bin/env python3
"""Writes docs/architectures.md: what the observer finds in the graph of every architecture.

    scripts/arch_table.py [--program build/patched/bin/test-llama-archs] [-o docs/architectures.md]

The models are the tests', see tests/python/arch_models.py.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ggml_ext.gguf.source import Source, open_gguf
from ggml_ext.methods.model_sites import ModelSites
from ggml_ext.observe.sites import from_json

ROOT = Path(__file__).resolve().parents[1]

HEAD = """\
# Architectures

What the observer finds in llama.cpp's graphs of tiny random models: of every architecture that upstream's
`test-llama-archs` can save, `<architecture>-dense` or `<architecture>-moe`, and of Gemma 4.
`scripts/arch_table.py` writes this file; a test compares it with the graphs. What `flat4` does to each is in
[flat4 on every architecture](architectures-flat4.md).

- *Sites*: activations that matrices read, the output head's included. *Matrices*: the weights that read them,
  embeddings that are the head too among them; a stack of experts or of heads is one.
- *Online*: matrices that are multiplied where a transform can be put into the graph. Then the kinds of the
  others.
- *Folded*: sites whose channels can be scaled offline. Then why the others cannot, the head's apart, whose
  input is an output of the graph.
- *Transformed*: of the matrices of blocks, those whose input a conversion can transform, online or by a fold.
- *Looked up*, *otherwise*, *never*: kinds of weights with two dimensions or more that are at no site, since
  they are read row by row, by another operation than a product, or not at all when a text is read. Vectors
  are left out.

| Model | Sites | Matrices | Online | Not online | Folded | Not folded | Transformed | Looked up \
| Otherwise | Never |
|---|--:|--:|--:|---|--:|---|---|---|---|---|
"""


HEADS = ("output", "token_embd")


def kind(text: str) -> str:
    """blk.3.ffn_up.weight -> ffn_up, also within a text."""
    return re.sub(r"blk\.\d+\.|\.weight\b", "", text)


def listed(kinds: Iterable[str]) -> str:
    return ", ".join(sorted(set(kinds)))


def row(name: str, table: Mapping[str, Any], source: Source) -> str:
    """One model's line. ``table``: what ggml_ext_observer_table says; ``source``: the model."""
    tensors = source.tensors
    model = ModelSites(source, from_json(table), {tensor.name: "q4_0" for tensor in tensors})
    online = {reader["tensor"]: reader["online"] for site in table["sites"] for reader in site["readers"]}
    uses = {other["tensor"]: other["use"] for other in table["others"]}
    rest = [t.name for t in tensors if t.n_rows > 1 and t.name not in online]
    inside = [weight for weight in online if weight.startswith("blk.")]
    transformed = sum(map(model.transforms, inside))
    unfolded = [site for site in table["sites"] if "reason" in site["fold"]]
    cells = (
        name,
        str(len(table["sites"])),
        str(len(online)),
        str(sum(online.values())),
        listed(kind(weight) for weight, its in online.items() if not its),
        str(len(table["sites"]) - len(unfolded)),
        listed(kind(f"{s['anchor']} ({s['fold']['reason']})") for s in unfolded if s["anchor"] not in HEADS),
        "all" if transformed == len(inside) else f"{transformed} of {len(inside)}",
        listed(kind(weight) for weight in rest if uses[weight] == "GET_ROWS"),
        listed(f"{kind(w)} ({uses[w]})" for w in rest if uses[w] not in ("GET_ROWS", "never")),
        listed(kind(weight) for weight in rest if uses[weight] == "never"),
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    program = ROOT / "build" / "patched" / "bin" / "test-llama-archs"
    parser.add_argument(
        "--program", type=Path, default=program, help="upstream's program that saves the models"
    )
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "architectures.md")
    options = parser.parse_args()
    sys.path.append(str(ROOT / "tests" / "python"))
    import arch_models
    from observed import ObservedModel

    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name, model in sorted(arch_models.save(Path(folder), options.program).items()):
            with ObservedModel(model.path, ctx=64) as observed:
                lines.append(row(name, observed.table(), open_gguf(model.path)) + "\n")
    whole = sum("| all |" in line for line in lines)
    foot = f"In {whole} of {len(lines)} models a conversion can transform what every matrix of a block reads."
    options.output.write_text(HEAD + "".join(lines) + f"\n{foot}\n")


if __name__ == "__main__":
    main()
