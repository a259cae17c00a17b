"""plan.json of an observation: everything that its figures depend on, written before the first batch.

A folder goes on with the description it has or not at all: sums of two texts or models are never mixed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ggml_ext import __version__
from ggml_ext.core import owned_folder, paths
from ggml_ext.core.atomic import write_text
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.facts import UINT32, made_of
from ggml_ext.core.owned_folder import PLAN
from ggml_ext.hf import model_files
from ggml_ext.observe.layout import Layout, Place, require_consistent
from ggml_ext.observe.sites import Table, from_json

VERSION = 2

_LIBRARIES = ("ggml-base", "llama")


@dataclass(frozen=True)
class Description:
    """``model``: see model_files. ``text``: SHA-256. ``parse_special``: whether spellings of control tokens
    in it are these tokens. ``windows``: parts of ``ctx`` tokens, drawn with ``seed``; ``bos``: the token that
    stands first in each, None for the text's own. ``batch``: tokens of a decode. ``largest``: see
    observer.LARGEST_TOKEN. ``versions``: of the programs. ``table``: the sites as llama.cpp gives them.
    ``places``, ``bytes``: where the files have their figures, see layout.py.
    """

    model: dict[str, str]
    text: str
    parse_special: bool
    windows: int
    ctx: int
    seed: int
    bos: int | None
    batch: int
    largest: float
    versions: dict[str, str]
    table: dict[str, Any]
    places: list[dict[str, Any]]
    bytes: dict[str, int]

    @property
    def n_tokens(self) -> int:
        """Tokens of all windows."""
        return self.windows * self.ctx

    def sites(self) -> Table:
        """The table, parsed."""
        return from_json(self.table)

    def layout(self) -> Layout:
        """Where the files have the figures of each site."""
        return made_of(
            Layout, {"places": tuple(made_of(Place, place) for place in self.places), **self.bytes}
        )

    @property
    def digest(self) -> str:
        """Two observations with the same have the same figures."""
        facts = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:32]

    def save(self, folder: Path) -> None:
        """Writes plan.json atomically."""
        facts = {"observation": VERSION, **asdict(self)}
        write_text(folder / PLAN, json.dumps(facts, indent=1) + "\n")


def layout_facts(layout: Layout) -> dict[str, Any]:
    """The layout as fields of a description."""
    facts = asdict(layout)
    return {"places": list(facts.pop("places")), "bytes": facts}


def versions() -> dict[str, str]:
    """What computes the figures: this package and the libraries. Raises GgmlExtError if one is missing."""
    found = {"ggml-ext": __version__}
    return found | {name: model_files.short_sha256(paths.library(name)) for name in _LIBRARIES}


def load(folder: Path) -> Description | None:
    """The folder's description, None if it has none. Raises GgmlExtError for what is no such description."""

    def parse(facts: dict[str, Any]) -> Description:
        if facts.pop("observation", None) != VERSION:
            raise ValueError("no observation's, or of another version")
        found = made_of(Description, facts)
        numbers = (found.windows, found.ctx, found.batch)
        if min(numbers) < 1 or not all(number in UINT32 for number in (*numbers, found.seed)):
            raise ValueError("impossible numbers")
        require_consistent(found.layout(), found.sites())
        return found

    return owned_folder.load_plan(folder, parse, "observe again")


def is_description(folder: Path) -> bool:
    """Whether the folder's plan.json is an observation's, of this version."""
    try:
        return load(folder) is not None
    except GgmlExtError:
        return False


def require_equal(found: Description, wanted: Description, folder: Path) -> None:
    """Raises GgmlExtError, naming what differs, unless the two are the same."""
    old, new = asdict(found), asdict(wanted)
    sites = [[facts.pop(name) for name in ("table", "places", "bytes")] for facts in (old, new)]
    if old["model"] != new["model"]:  # and with it everything else
        old, new = ({"model": facts["model"]} for facts in (old, new))
    elif old == new and sites[0] != sites[1]:
        old["sites"], new["sites"] = "of another graph", "of this one"
    model_files.require_equal_plans(old, new, "model", f"{folder}: holds an observation")
