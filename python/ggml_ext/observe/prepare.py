"""What is known before the model's weights are read: tokens, sites, memory, the batch that fits into it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.errors import GgmlExtError, Warn
from ggml_ext.gguf.header import value
from ggml_ext.gguf.source import Source, open_gguf
from ggml_ext.hf import model_files
from ggml_ext.observe.description import Description, layout_facts, versions
from ggml_ext.observe.layout import FLOAT, PANEL, SAMPLE_ROWS, Layout, lay_out
from ggml_ext.observe.observer import LARGEST_TOKEN, Observer
from ggml_ext.observe.samples import consecutive, enough, few_tokens, windows
from ggml_ext.observe.sites import Table
from ggml_ext.runtime import llama
from ggml_ext.runtime.llama import Model

BATCH_TOKENS = 4096
"""Tokens of a decode: as many as make reading and writing the sums cheap beside adding to them."""

MEMORY = 8 << 30
"""Default of the memory that an observation may take."""

_SUMMED_ROWS = 2048  # rows that the library transposes at a time, see chunk in ggml_ext/observe/moments.cpp
_SIZE = re.compile(r": (?: *\S+ compute buffer size| *size) = *([\d.]+) MiB")


@dataclass(frozen=True)
class Request:
    """An observation. ``source``: Hugging Face folder or GGUF file. ``samples``: windows of ``ctx`` tokens,
    None for as many as the widest matrix needs. ``memory``: bytes, of what is not a mapped file. ``threads``:
    None for one per core; with one the figures do not depend on how often a run was interrupted.
    ``parse_special``: see samples.windows. ``trust_remote_code``: see hf.to_gguf. ``importances``: what
    llama-imatrix computes and no more: all windows of the text from its start, diagonals, no token scaled
    down. ``sample_rows``: kept of what each site reads, at most."""

    source: Path
    text: Path
    samples: int | None = None
    ctx: int = 512
    seed: int = 0
    memory: int = MEMORY
    threads: int | None = None
    parse_special: bool = False
    trust_remote_code: bool = False
    importances: bool = False
    sample_rows: int = SAMPLE_ROWS


@dataclass(frozen=True)
class Prepared:
    """``model``: the GGUF file. ``tokens``: int32 [windows, ctx]. ``n_seq``: windows of a batch. ``memory``:
    bytes that llama.cpp and the observer will take beside mapped files."""

    model: Path
    tokens: NDArray[np.int32]
    n_seq: int
    memory: int
    table: Table
    layout: Layout
    description: Description


def table_of(model: Path, ctx: int) -> Table:
    """The sites of the GGUF file ``model``. Its weights are not read. Raises GgmlExtError."""
    with Observer(1) as observer, Model(model, weights=False) as loaded:
        observer.start(loaded, ctx=ctx, n_seq=1, n_outputs=1)
        return observer.table()


def prepare(request: Request, model: Path, content: bytes, warn: Warn) -> Prepared:
    """Everything about the observation of the GGUF file ``model`` on the text's bytes.

    Raises GgmlExtError for a model that cannot be run, a text that is too short, or too little memory.
    """
    source = open_gguf(model)
    with Observer(1) as observer, Model(model, weights=False) as loaded:
        observer.start(loaded, ctx=request.ctx, n_seq=1, n_outputs=1)
        widest, bos = observer.table().widest, loaded.bos
        if not widest:
            raise GgmlExtError(f"{model}: llama.cpp's graph has no matrix to observe; give another model")
        tokens = _windows(request, model, content, widest, warn)
        n_seq, memory = _fit(loaded, observer, request, len(tokens))
        observer.start(loaded, ctx=request.ctx, n_seq=n_seq)
        table, text = observer.table(), observer.table_text()
    layout = lay_out(
        table,
        tokens.size,
        experts_used(source),
        diagonals=request.importances,
        sample_rows=request.sample_rows,
    )
    folder = request.source if request.source.is_dir() else None
    return Prepared(
        model,
        tokens,
        n_seq,
        memory,
        table,
        layout,
        Description(
            model=model_files.of_gguf(source) if folder is None else model_files.of_folder(folder),
            text=hashlib.sha256(content).hexdigest(),
            parse_special=request.parse_special,
            windows=len(tokens),
            ctx=request.ctx,
            seed=request.seed,
            bos=bos,
            batch=n_seq * request.ctx,
            largest=0.0 if request.importances else LARGEST_TOKEN,
            versions=versions(),
            table=json.loads(text),
            **layout_facts(layout),
        ),
    )


def _windows(request: Request, model: Path, content: bytes, widest: int, warn: Warn) -> NDArray[np.int32]:
    if request.importances:
        found = consecutive(
            model, request.text, ctx=request.ctx, content=content, parse_special=request.parse_special
        )
        return found.astype(np.int32)
    tokens = windows(
        model,
        request.text,
        ctx=request.ctx,
        samples=request.samples or enough(request.ctx, widest),
        seed=request.seed,
        warn=warn,
        content=content,
        parse_special=request.parse_special,
    )
    remark = few_tokens(tokens.size, request.ctx, widest)
    if remark is not None:
        warn(remark)
    return tokens.astype(np.int32)


def experts_used(source: Source) -> int:
    """Experts per token of a mixture, as the model's keys say, 0 for others."""
    entry = source.keys.get(f"{source.arch}.expert_used_count")
    found = 0 if entry is None else value(entry)
    return found if isinstance(found, int) else 0


def _fit(model: Model, observer: Observer, request: Request, n_windows: int) -> tuple[int, int]:
    """Windows of a batch, as many as BATCH_TOKENS and the memory allow, and the bytes that they take.

    Raises GgmlExtError if not even one fits.
    """
    n_seq = max(1, min(BATCH_TOKENS // request.ctx, n_windows, llama.max_sequences()))
    while True:
        needed = _bytes(model, observer, request.ctx, n_seq)
        if needed <= request.memory:
            return n_seq, needed
        if n_seq == 1:
            raise GgmlExtError(
                f"{model.path}: a window of {request.ctx} tokens needs {needed / 1e9:.2f} GB, --memory "
                f"allows {request.memory / 1e9:.2f} GB; allow more, or take a smaller --ctx"
            )
        n_seq = max(1, min(n_seq - 1, int(n_seq * request.memory / needed)))


def _bytes(model: Model, observer: Observer, ctx: int, n_seq: int) -> int:
    """What a batch of so many windows takes: llama.cpp's cache, graph and logits, and the observer's rows.

    The graph ends before the logits are computed, so memory for those is counted once, where llama.cpp clears
    it, and not within the graph.
    """
    observer.start(model, ctx=ctx, n_seq=n_seq, n_outputs=n_seq)
    sizes = (_SIZE.search(line) for line in llama.log_lines())
    context = sum(float(size[1]) for size in sizes if size) * 2**20
    tokens, widest = ctx * n_seq, observer.table().widest
    rows = min(tokens, _SUMMED_ROWS) + PANEL
    return int(context) + FLOAT * (tokens * model.n_vocab + rows * widest)
