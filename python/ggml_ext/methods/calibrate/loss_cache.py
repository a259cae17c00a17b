"""Losses of single tensors from one conversion to the next: they do not depend on the size that is asked for.

They lie in the user's cache folder, a file under a digest of everything they depend on, for a month.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.files import cache_dir, digest
from ggml_ext.methods.calibrate.plan import Plan

_FACTS = (
    "source",
    "text",
    "samples",
    "ctx",
    "seed",
    "parse_special",
    "rounding",
    "stock",
    "versions",
    "observed",
)
_KEEP_DAYS = 30


def place(plan: Plan) -> Path | None:
    """The file for losses of the plan's model, text and rounding; None where there is no place for a
    cache."""
    facts = asdict(plan)
    try:
        root = cache_dir() / "losses"
        root.mkdir(parents=True, exist_ok=True)
    except (OSError, GgmlExtError):
        return None
    if not os.access(root, os.W_OK):
        return None
    _prune(root)
    return root / f"{digest({name: facts[name] for name in _FACTS})}.json"


def _prune(root: Path) -> None:
    for path in root.glob("*.json"):
        with suppress(OSError):
            if path.stat().st_mtime < time.time() - _KEEP_DAYS * 86400:
                path.unlink()
