"""Result files of the measuring commands: checked before the work, written whole after it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from ggml_ext.atomic import atomic_path
from ggml_ext.errors import GgmlExtError


def check_outputs(*outputs: Path | None) -> None:
    """Raise GgmlExtError if one of ``outputs`` cannot be written, so that no work is lost at its end."""
    for path in outputs:
        if path is None:
            continue
        if path.exists() and not path.is_file():
            raise GgmlExtError(f"{path}: is no regular file; name a file to write")
        if not path.parent.is_dir():
            raise GgmlExtError(f"{path}: the folder {path.parent} does not exist; create it first")
        if not os.access(path.parent, os.W_OK):
            raise GgmlExtError(f"{path}: the folder {path.parent} is read-only; choose another")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole or not at all; NaN and infinity, which JSON has not, become null."""
    with atomic_path(path) as temporary:
        text = json.dumps(_finite(value), indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
