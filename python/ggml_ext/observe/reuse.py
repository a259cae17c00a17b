"""A finished observation in the place of one of its own: ``convert`` and ``calibrate`` with --observed.

The folder decides which text was read and how. Options that say so too must say the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ggml_ext.core.errors import GgmlExtError, Warn
from ggml_ext.hf import model_files
from ggml_ext.observe import description as descriptions
from ggml_ext.observe.description import Description, versions
from ggml_ext.observe.layout import DIAGONAL, sample_step
from ggml_ext.observe.reader import Observation
from ggml_ext.observe.samples import read_text

CTX, SEED = 512, 0
"""Where neither an option nor an observation says anything."""


@dataclass(frozen=True)
class Asked:
    """What options say of the calibration text and of how it is read; None, or False, where they do not."""

    text: Path | None = None
    samples: int | None = None
    ctx: int | None = None
    seed: int | None = None
    parse_special: bool = False


@dataclass(frozen=True)
class Reading:
    """How a text is read: tokens per window, the seed of their places, and see samples.windows."""

    ctx: int
    seed: int
    parse_special: bool


def settle(asked: Asked, folder: Path | None) -> Reading:
    """What is asked, else as in the observation ``folder``, else the defaults."""
    ctx, seed, special = CTX, SEED, False
    found = None if folder is None else descriptions.load(folder)
    if found is not None:
        ctx, seed, special = found.ctx, found.seed, found.parse_special
    return Reading(
        ctx if asked.ctx is None else asked.ctx,
        seed if asked.seed is None else asked.seed,
        asked.parse_special or special,
    )


def open_finished(folder: Path, model: Path, asked: Asked, warn: Warn) -> Observation:
    """The observation of ``model``, a Hugging Face folder or a GGUF file. warn: told of other versions.

    Raises GgmlExtError for a folder that holds none or an unfinished one, for that of another model, and for
    one that was made otherwise than asked.
    """
    seen = Observation(folder)
    changed = model_files.changed(seen.description.model, model_files.of(model))
    if changed:
        raise GgmlExtError(
            f"{folder}: an observation of another model than {model} ({changed}); give the one it was made "
            "of, as it was, or observe again"
        )
    differences = _differences(seen.description, asked)
    if differences:
        raise GgmlExtError(
            f"{folder}: observed with other settings ({', '.join(differences)}); leave these options out, "
            "or observe again with them"
        )
    if seen.description.versions != versions():
        warn(f"{folder}: observed by another build of ggml-ext or llama.cpp, whose figures these are")
    return seen


def require_figures(seen: Observation, sample_rows: int, what: str) -> None:
    """Raises GgmlExtError unless there are second moments and, of each site, ``sample_rows`` rows or as many
    as the text gives. what: needs them, for the message."""
    places = seen.description.layout().places
    if any(place.moments == DIAGONAL for place in places):
        raise GgmlExtError(
            f"{seen.folder}: holds importances alone, and {what} needs second moments; make an observation "
            "that has them with ggml-ext observe"
        )
    if any(sample_step(place, seen.n_tokens, sample_rows) is None for place in places):
        raise GgmlExtError(
            f"{seen.folder}: has fewer than the {sample_rows} sample rows that {what} needs; observe again "
            f"with --sample-rows {sample_rows}"
        )


def _differences(found: Description, asked: Asked) -> list[str]:
    lines = []
    if asked.text is not None and hashlib.sha256(read_text(asked.text)).hexdigest() != found.text:
        lines.append(f"--calibration {asked.text} is another text")
    for option, there, here in (
        ("samples", found.windows, asked.samples),
        ("ctx", found.ctx, asked.ctx),
        ("seed", found.seed, asked.seed),
    ):
        if here is not None and here != there:
            lines.append(f"--{option} {there} there, {here} here")
    if asked.parse_special and not found.parse_special:
        lines.append("no --parse-special there")
    return lines
