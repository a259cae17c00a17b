"""Importance matrices from a text, as llama-imatrix computes them, kept for the next conversion.

llama.cpp runs the model over the text, and the observer sums the squares that its matrices read (observe/).
That is the one step of a conversion that can take hours. Its result, and what there is of it after an
interruption, lies in the user's cache folder under a digest of everything it depends on, so that neither the
same command nor a conversion of the same model to another type repeats it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ggml_ext.core.atomic import atomic_path
from ggml_ext.core.errors import GgmlExtError, Warn
from ggml_ext.core.files import cache_dir
from ggml_ext.core.outputs import identity
from ggml_ext.core.owned_folder import BusyError
from ggml_ext.gguf.imatrix import Imatrix, load, write
from ggml_ext.observe.description import versions
from ggml_ext.observe.prepare import Request
from ggml_ext.observe.reader import Observation
from ggml_ext.observe.run import discard, observe
from ggml_ext.observe.samples import read_text

_KEEP_DAYS = 30
_FOLDER = re.compile(r"[0-9a-f]{24}")
_OBSERVATION = "observation"


@dataclass(frozen=True)
class Calibration:
    """The text that importances were computed from, as the metadata of a converted file gives it.

    ``sha256``: of the text's bytes. ``samples``: contexts read. ``length``: tokens per context. ``seed``: 0,
    the text is read from its start.
    """

    sha256: str
    samples: int
    length: int
    seed: int = 0


def collect(
    model: Path,
    files: Sequence[Path],
    text: Path,
    work: Path,
    *,
    ctx: int,
    threads: int = 0,
    parse_special: bool = False,
    warn: Warn,
) -> tuple[Imatrix, Calibration]:
    """Importances of the GGUF file ``model`` on the text, from the cache if they are there.

    files: what the model was made from; their paths, sizes and times of change identify it. work: a folder
    for temporary files. The text is read once, so it may be a pipe, in contexts of ``ctx`` tokens.
    parse_special: see samples.windows. warn: gets one line at a time. Raises GgmlExtError for a text that is
    missing, empty or too short and for a model that llama.cpp cannot run.
    """
    content = read_text(text)
    sha256 = hashlib.sha256(content).hexdigest()
    request = Request(
        model, text, ctx=ctx, threads=threads or None, parse_special=parse_special, importances=True
    )
    place = _cached(files, sha256, request)
    name = f"{_dataset(text, sha256)}.imatrix.gguf"
    matrix = None if place is None else _load_cached(place / name)
    if matrix is None:
        matrix = load(_compute(request, content, place, work, name, warn))
    return matrix, Calibration(sha256, matrix.chunks, ctx)


def of_observation(seen: Observation, text: Path | None, work: Path) -> tuple[Imatrix, Calibration]:
    """The importances of a finished observation, of its windows. text: what it was read from, if known; gives
    the name. work: a folder for the matrix's file."""
    its = seen.description
    name = _dataset(Path("text") if text is None else text, its.text)
    path = work / f"{name}.imatrix.gguf"
    _write(seen, path, f"{name}.txt")
    return load(path), Calibration(its.text, its.windows, its.ctx, its.seed)


def _dataset(text: Path, sha256: str) -> str:
    """A name for the text that is the same on every machine and says which text it was."""
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", text.stem)
    return f"{stem[:100]}-{sha256[:12]}"


def _cached(files: Sequence[Path], sha256: str, request: Request) -> Path | None:
    """Where the cache has the matrix, or will have it; None if there is no place for a cache."""
    facts = [[identity(path) for path in files], sha256, request.ctx, request.parse_special, versions()]
    try:
        root = cache_dir() / "imatrix"
        root.mkdir(parents=True, exist_ok=True)
    except (OSError, GgmlExtError):
        return None
    folder = root / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    return folder if os.access(root, os.W_OK) or folder.is_dir() else None


def _load_cached(cached: Path) -> Imatrix | None:
    try:
        return load(cached)
    except GgmlExtError:  # not there, or damaged by a power failure
        return None


def _prune(root: Path) -> None:
    """Removes what lies in the cache for longer than _KEEP_DAYS; what no run of ours put there stays."""
    for folder in root.iterdir():
        with contextlib.suppress(OSError, GgmlExtError):
            if _FOLDER.fullmatch(folder.name) and folder.stat().st_mtime < time.time() - _KEEP_DAYS * 86400:
                for path in folder.glob("*.imatrix.gguf"):
                    path.unlink()
                if (folder / _OBSERVATION).is_dir():
                    discard(folder / _OBSERVATION)
                folder.rmdir()


def _compute(
    request: Request, content: bytes, cached: Path | None, work: Path, name: str, warn: Warn
) -> Path:
    """Observes in the cache and returns the matrix's file; in ``work`` without a cache, and where another run
    is computing the same there."""
    place = work if cached is None else cached
    folder = place / _OBSERVATION
    try:
        observe(request, folder, warn=warn, temporary=True, content=content)
    except BusyError:
        return _compute(request, content, None, work, name, warn)
    except BaseException:
        with contextlib.suppress(OSError):  # there is something to go on with
            place.rmdir()
        raise
    with atomic_path(place / name) as temporary:
        _write(Observation(folder), temporary, name.removesuffix(".imatrix.gguf") + ".txt")
    discard(folder)
    if cached is not None:
        _prune(cached.parent)
    return place / name


def _write(seen: Observation, path: Path, dataset: str) -> None:
    """The figures of the blocks' matrices as llama-imatrix writes them; it leaves the others out too."""
    tensors = [reader.tensor for site in seen.table.sites for reader in site.readers]
    sums = {}
    for tensor in sorted(tensor for tensor in tensors if tensor.startswith("blk.")):
        found = seen.importance(tensor)
        assert found is not None
        means, rows = found
        sums[tensor] = (means * rows[:, None], rows)
    write(path, sums, dataset, seen.description.windows, seen.description.ctx)
