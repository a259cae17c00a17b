"""ggml-ext observe: runs a model over a text and sums what its matrices read, in a folder that can be gone on
with. docs/observe.md describes the folder.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ggml_ext.core.atomic import atomic_path
from ggml_ext.core.cpus import threads_or_cores
from ggml_ext.core.errors import GgmlExtError, Warn, listed
from ggml_ext.core.outputs import check_folder
from ggml_ext.core.owned_folder import SOURCE, Held, Kind, held
from ggml_ext.core.progress import track
from ggml_ext.gguf.source import open_gguf
from ggml_ext.hf import folder as hf
from ggml_ext.observe import description as descriptions
from ggml_ext.observe.observer import NotFiniteError, Observer, Target
from ggml_ext.observe.prepare import Prepared, Request, prepare
from ggml_ext.observe.samples import read_text
from ggml_ext.observe.sites import NEVER
from ggml_ext.observe.state import FILES, drop_other_generation, load_state
from ggml_ext.observe.store import Store
from ggml_ext.runtime.llama import Model

COMMIT_SECONDS = 60.0
"""About how much work a kill costs; a batch at least."""

KIND = Kind("observation", descriptions.is_description, lambda folder: [folder / name for name in FILES])


@dataclass(frozen=True)
class Observed:
    """``done``: windows of this run. ``batch``: tokens of a decode."""

    folder: Path
    sites: int
    windows: int
    ctx: int
    batch: int
    done: int
    seconds: float

    def summary(self) -> str:
        """One line for the end of the command."""
        rate = f", {self.done * self.ctx / self.seconds:,.4g} tok/s" if self.done else ""
        return (
            f"{self.folder}: {self.sites} sites on {self.windows} windows of {self.ctx} tokens, {self.done} "
            f"of them observed now, {self.seconds:.1f} s{rate}"
        )

    def as_json(self) -> dict[str, Any]:
        """The figures for --json."""
        return {**asdict(self), "folder": str(self.folder)}


def observe(
    request: Request, folder: Path, *, warn: Warn, temporary: bool = False, content: bytes | None = None
) -> Observed:
    """Observes into ``folder``, made if need be, or goes on with what it holds.

    content: the text's bytes if they have been read, since a pipe can be read once.
    temporary: convert makes the folder and removes it with ``discard``. Killed at any moment, the same call
    goes on and leaves the same figures, byte for byte on the same machine with one thread. Raises
    GgmlExtError for what cannot be done and for a folder with other files or another plan, or that another
    run is using.
    """
    started = time.monotonic()
    hf.require(request.source)
    check_folder(folder, [request.source, request.text])
    if request.source.is_dir():
        hf.check(request.source)
        for line in hf.remarks(request.source):
            warn(line)
    content = read_text(request.text) if content is None else content
    with held(folder, KIND, temporary=temporary) as mine:
        model = _float_model(request, mine) if request.source.is_dir() else request.source
        with named_as(model, request.source):
            prepared = prepare(request, model, content, warn)
            found = descriptions.load(folder)
            if found is None:
                prepared.description.save(folder)
            else:
                descriptions.require_equal(found, prepared.description, folder)
            if not request.importances:  # whose users say what they miss
                _remark(prepared, warn)
            done = _run(prepared, folder, request, warn)
    description = prepared.description
    return Observed(
        folder,
        len(prepared.table.sites),
        description.windows,
        description.ctx,
        description.batch,
        done,
        time.monotonic() - started,
    )


def discard(folder: Path) -> None:
    """Removes the folder of an observation if convert made it. Raises GgmlExtError if another run uses it."""
    with held(folder, KIND, temporary=True) as mine:
        mine.discard()


@contextmanager
def named_as(made: Path, origin: Path) -> Iterator[None]:
    """Errors about a file that we made name what it was made from."""
    try:
        yield
    except GgmlExtError as exc:
        if made == origin:
            raise
        raise GgmlExtError(str(exc).replace(str(made), str(origin))) from exc


def _float_model(request: Request, mine: Held) -> Path:
    """The Hugging Face folder as float GGUF, made once per plan."""
    path = mine.folder / SOURCE
    if descriptions.load(mine.folder) is None or not path.is_file():
        with named_as(path, request.source), atomic_path(path) as temporary:
            hf.to_gguf(request.source, temporary, trust_remote_code=request.trust_remote_code)
            mine.note_source(temporary)
    return path


def _remark(prepared: Prepared, warn: Warn) -> None:
    uses = prepared.table.others
    matrices = [tensor.name for tensor in open_gguf(prepared.model).tensors if tensor.n_rows > 1]
    never = [name for name in matrices if uses.get(name) == NEVER]
    if never:
        warn(f"no text makes llama.cpp read {listed(never)}; there are no figures for them")


def _run(prepared: Prepared, folder: Path, request: Request, warn: Warn) -> int:
    """Observes the windows that are missing and returns how many there were."""
    first, last = load_state(folder).windows, len(prepared.tokens)
    if first < last:
        _add_missing(prepared, folder, request, warn)
    drop_other_generation(folder)
    return last - first


def _add_missing(prepared: Prepared, folder: Path, request: Request, warn: Warn) -> None:
    threads = threads_or_cores(request.threads)
    with (
        Observer(threads) as observer,
        Model(prepared.model, threads=threads) as model,
        Store(folder, prepared.table, prepared.layout) as store,
    ):
        observer.start(model, ctx=request.ctx, n_seq=prepared.n_seq)
        if observer.table() != prepared.table:
            raise GgmlExtError(
                f"{prepared.model}: llama.cpp's graph is another one without weights; please report it"
            )
        try:
            _batches(prepared, observer, model, store)
        except KeyboardInterrupt:
            done = store.state.windows
            warn(
                f"{folder}: {done} of {len(prepared.tokens)} windows are done; the same command goes on there"
            )
            raise


def _batches(prepared: Prepared, observer: Observer, model: Model, store: Store) -> None:
    tokens, n_sites = prepared.tokens, len(prepared.table.sites)
    ctx, first = tokens.shape[1], store.state.windows
    committed = time.monotonic()
    with track((len(tokens) - first) * ctx, "observing", "tok") as advance:
        for start in range(first, len(tokens), prepared.n_seq):
            batch = tokens[start : start + prepared.n_seq]
            targets = store.targets()
            observer.aim(targets)
            try:
                seen = observer.decode(model, batch, start * ctx, prepared.description.largest)
            except NotFiniteError as exc:
                raise GgmlExtError(f"{prepared.model}: {exc}") from exc
            if seen != n_sites:
                raise GgmlExtError(
                    f"{prepared.model}: llama.cpp showed {seen} of {n_sites} sites; please report it"
                )
            _require_rows(prepared, targets, batch.size)
            store.added()
            done = start + len(batch)
            if done == len(tokens) or time.monotonic() - committed >= COMMIT_SECONDS:
                store.commit(done)
                committed = time.monotonic()
            advance(batch.size)


def _require_rows(prepared: Prepared, targets: Sequence[Target], n_tokens: int) -> None:
    """Raises GgmlExtError where a batch gave a site more rows than the layout has room for: seen at the first
    batch of a generation, which is not added in place."""
    for site, place, target in zip(prepared.table.sites, prepared.layout.places, targets, strict=True):
        assert target.after is not None
        rows = float(target.after[0]) - (0.0 if target.before is None else float(target.before[0]))
        if rows > n_tokens * place.rows * max(len(site.values), 1):
            raise GgmlExtError(
                f"{prepared.model}: {site.anchor}: {rows:.0f} rows of {n_tokens} tokens; please report it"
            )
