"""Importance matrices from a text, computed by llama-imatrix and kept for the next conversion.

The computation is the one step of a conversion that can take hours. Its result lies in the user's cache
folder under a digest of everything it depends on, so that the same command, interrupted later on, does not
repeat it, and neither does a conversion of the same model to another type.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ggml_ext import process, stack, tools
from ggml_ext.atomic import atomic_path
from ggml_ext.cpus import physical_cores
from ggml_ext.errors import GgmlExtError
from ggml_ext.files import cache_dir
from ggml_ext.imatrix import Imatrix, load
from ggml_ext.llama import Model
from ggml_ext.outputs import identity
from ggml_ext.progress import track

_KEEP_DAYS = 30
_FOLDER = re.compile(r"[0-9a-f]{24}")


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
    model: Path, files: Sequence[Path], text: Path, work: Path, *, ctx: int, threads: int = 0
) -> tuple[Imatrix, Calibration]:
    """Importances of the GGUF file ``model`` on the text, from the cache if they are there.

    files: what the model was made from; their paths, sizes and times of change identify it. work: a folder
    for temporary files. The text is read once, so it may be a pipe, in contexts of ``ctx`` tokens. Raises
    GgmlExtError for a text that is missing, empty or too short and for a model that llama.cpp cannot run.
    """
    content = read_text(text)
    sha256 = hashlib.sha256(content).hexdigest()
    name = dataset_name(text, sha256)
    cached = _cached(files, sha256, ctx, f"{Path(name).stem}.imatrix.gguf")
    matrix = None if cached is None else _load_cached(cached)
    if matrix is None:
        (work / name).write_bytes(content)  # the name lands in the file
        computed = _compute(model, text, content, name, work, ctx=ctx, threads=threads)
        matrix = load(computed if cached is None else _keep(computed, cached))
    return matrix, Calibration(sha256, matrix.chunks, ctx)


def read_text(text: Path) -> bytes:
    """The bytes of a calibration text. Raises GgmlExtError if it cannot be read or is empty."""
    try:
        content = text.read_bytes()
    except OSError as exc:
        raise GgmlExtError(f"{text}: {exc.strerror}; check the path of the calibration text") from exc
    if not content.strip():
        raise GgmlExtError(f"{text}: empty; calibration needs a text of the kind the model will meet")
    return content


def text_sha256(text: Path) -> str:
    """SHA-256 of the text's bytes, in hexadecimal. Raises GgmlExtError as read_text does."""
    return hashlib.sha256(read_text(text)).hexdigest()


def dataset_name(text: Path, sha256: str) -> str:
    """A name for the text that is the same on every machine and says which text it was."""
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", text.stem)
    return f"{stem[:100]}-{sha256[:12]}.txt"


def cache_root() -> Path:
    """Folder of the importance matrices. Raises GgmlExtError if there is no place for a cache."""
    return cache_dir() / "imatrix"


def _cached(files: Sequence[Path], sha256: str, ctx: int, name: str) -> Path | None:
    """Where the cache has the matrix, or will have it; None if there is no place for a cache."""
    try:
        root = cache_root()
    except GgmlExtError:
        return None
    depends_on = [[identity(path) for path in files], sha256, ctx, identity(tools.find("llama-imatrix"))]
    return root / hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:24] / name


def _load_cached(cached: Path) -> Imatrix | None:
    try:
        return load(cached)
    except GgmlExtError:  # not there, or damaged by a power failure
        return None


def _keep(computed: Path, cached: Path) -> Path:
    """Copies the result to the cache and returns where it is now. Without a cache it stays where it was."""
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(cached) as temporary:
            shutil.copyfile(computed, temporary)
    except (OSError, GgmlExtError):
        return computed
    _prune(cached.parent.parent)
    return cached


def _prune(root: Path) -> None:
    """Removes what lies in the cache for longer than _KEEP_DAYS; what no run of ours put there stays."""
    for folder in root.iterdir():
        with contextlib.suppress(OSError):
            if _FOLDER.fullmatch(folder.name) and folder.stat().st_mtime < time.time() - _KEEP_DAYS * 86400:
                for path in folder.glob("*.imatrix.gguf"):
                    path.unlink()
                folder.rmdir()


def _compute(
    model: Path, text: Path, content: bytes, name: str, folder: Path, *, ctx: int, threads: int
) -> Path:
    """Runs llama-imatrix on the text, which lies in ``folder`` as ``name``, and returns its file.

    Same model, text, context and machine: same file.
    """
    contexts, run = _contexts(model, text, content, ctx)
    out = folder / f"{Path(name).stem}.imatrix.gguf"
    # A batch of one context: llama-imatrix asks for the logits of every token of a batch.
    command: list[str | Path] = [tools.find("llama-imatrix"), "-m", model.absolute()]
    command += ["-f", name, "-o", out.name, "-c", str(ctx), "-b", str(ctx), "-ub", str(min(ctx, 512))]
    command += ["-t", str(threads or physical_cores())]
    command = stack.command(command, run)
    with track(contexts, "importance matrix", "contexts") as advance:
        done = process.up_to(advance)

        def watch(output: str) -> None:  # "[n]perplexity," after every context
            done(max(map(int, re.findall(r"\[(\d+)\]\d", output)), default=0))

        finished = process.run(command, watch=watch, cwd=folder, env=tools.environment())
    if "non-finite values" in finished.output:
        raise GgmlExtError(f"{model}: gives NaN or Inf on {text}; the model is damaged")
    if finished.status != 0 or not out.is_file():
        raise GgmlExtError(
            f"{model}: llama-imatrix failed ({process.last_words(finished)}); run ggml-ext doctor"
        )
    return out


def _contexts(model: Path, text: Path, content: bytes, ctx: int) -> tuple[int, int]:
    """Number of contexts in the text, and its longest run for stack.command.

    Raises GgmlExtError for fewer than two contexts, which llama-imatrix wants.

    llama-imatrix says so too, but its log is written by a thread of its own and lost when it ends early.
    """
    with Model(model, weights=False) as loaded:
        loaded.check_ctx(ctx)
        read = content.removesuffix(b"\n")
        n_tokens, run = len(loaded.tokenize(read)), loaded.longest_run(read)
    if n_tokens < 2 * ctx:
        raise GgmlExtError(
            f"{text}: only {n_tokens} tokens, and contexts of {ctx} need {2 * ctx} at least; "
            "give a longer text or a smaller --ctx"
        )
    return n_tokens // ctx, run
