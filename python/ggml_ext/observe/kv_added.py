"""What convert --kv-probe and --kv-codebooks do behind a conversion: fit both in the new file's own graph,
and write it with them.

While that runs there is a folder beside the output, an owned_folder.py: plan.json (what was asked, and what
the conversion said), source.gguf (the file without them), probes and codebooks (as far as the fits are).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.atomic import atomic_path, target
from ggml_ext.core.errors import GgmlExtError, Warn
from ggml_ext.core.outputs import identity
from ggml_ext.core.owned_folder import LOCK, PLAN, SOURCE, Kind, held, load_plan
from ggml_ext.gguf.added import write_with
from ggml_ext.observe import kv_codebook, kv_probe

SAMPLES = 32
PROBE_CTX, CODEBOOK_CTX = 512, 2048
_PROBES, _CODEBOOKS = "probes", "codebooks"


@dataclass(frozen=True)
class Fits:
    """``text``: to fit to. ``threads``: None for all."""

    probe: bool
    codebooks: bool
    text: Path
    seed: int
    threads: int | None


@dataclass(frozen=True)
class _Plan:
    """``asked``: a digest. ``said``: what the conversion ended with, empty before."""

    asked: str
    said: str = ""
    version: int = 1


def _parse(facts: dict[str, Any]) -> _Plan:
    if set(facts) != {"asked", "said", "version"} or facts["version"] != 1:
        raise ValueError("other keys")
    return _Plan(str(facts["asked"]), str(facts["said"]))


def _load(folder: Path) -> _Plan | None:
    return load_plan(folder, _parse, "convert anew")


def _is_plan(folder: Path) -> bool:
    try:
        return _load(folder) is not None
    except GgmlExtError:
        return False


KIND = Kind("conversion", _is_plan, lambda folder: [folder / name for name in (_PROBES, _CODEBOOKS)])


def convert_and_add(
    convert: Callable[[Path], str],
    out: Path,
    inputs: Sequence[Path | None],
    how: Mapping[str, Any],
    fits: Fits,
    *,
    warn: Warn,
) -> list[str]:
    """Lets ``convert`` write a GGUF file, and writes it with what ``fits`` names as ``out``, whole or not at
    all. Returns what convert returned, and a line for each fit.

    inputs, how: files, folders and options that the conversion depends on. Interrupted, the same call goes
    on. Raises GgmlExtError as convert and the fits do, for a folder of a conversion that was asked for
    something else, and for a text that cannot be read twice.
    """
    place = target(out)
    folder = place.with_name(f"{place.name}.kv")
    if not fits.text.is_file():
        raise GgmlExtError(f"{fits.text}: no regular file, and read more than once; name a file")
    seen = [(path, _versions(path)) for path in (*inputs, fits.text) if path is not None]
    facts = json.dumps([seen, how, asdict(fits)], sort_keys=True, default=str)
    digest = hashlib.sha256(facts.encode()).hexdigest()
    with held(folder, KIND, temporary=True) as mine:
        plan = _load(folder) or _Plan(digest)
        if plan.asked != digest:
            raise GgmlExtError(
                f"{folder}: begun with another model, text or options; delete it to begin anew"
            )
        model = folder / SOURCE
        if not plan.said or not model.is_file():
            plan = _converted(convert, model, plan)
        tensors, lines = _fitted(model, folder, fits, warn)
        write_with(model, tensors, out)
        mine.discard()
    return [plan.said.replace(str(model), str(out)), *lines]


def _versions(path: Path) -> list[Any]:
    """The identity of a file, or of the files of a folder, but for what says who is using it; nothing of what
    is not there, as of a model on the Hub."""
    if not path.is_dir():
        return identity(path) if path.exists() else []
    files = [file for file in path.iterdir() if file.is_file()]
    return [identity(file) for file in sorted(files) if file.name != LOCK and not file.name.startswith(".")]


def _converted(convert: Callable[[Path], str], model: Path, plan: _Plan) -> _Plan:
    _save(model.parent, plan)
    try:
        plan = replace(plan, said=convert(model))
    except GgmlExtError:
        if not any(
            path.is_dir() for path in model.parent.iterdir()
        ):  # no calibration that can be gone on with
            (model.parent / PLAN).unlink()
        raise
    _save(model.parent, plan)
    return plan


def _save(folder: Path, plan: _Plan) -> None:
    with atomic_path(folder / PLAN) as path:
        path.write_text(json.dumps(asdict(plan)), encoding="utf-8")


def _fitted(
    model: Path, folder: Path, fits: Fits, warn: Warn
) -> tuple[dict[str, NDArray[np.floating]], list[str]]:
    fitted: list[kv_probe.Probes | kv_codebook.Codebooks] = []
    common: dict[str, Any] = {
        "samples": SAMPLES,
        "seed": fits.seed,
        "threads": fits.threads,
        "warn": warn,
    }
    if fits.probe:
        fitted.append(kv_probe.fit(model, fits.text, folder / _PROBES, ctx=PROBE_CTX, **common))
    if fits.codebooks:
        common |= {"ctx": CODEBOOK_CTX, "bits": kv_codebook.BITS}
        fitted.append(kv_codebook.fit(model, fits.text, folder / _CODEBOOKS, **common))
    tensors: dict[str, NDArray[np.floating]] = {}
    for each in fitted:
        tensors.update(each.tensors())
    return tensors, [each.summary() for each in fitted]
