"""Result files of the measuring commands: checked before the work, written whole after it."""

from __future__ import annotations

import json
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
    """Write ``value`` as JSON, whole or not at all; NaN and infinity are refused."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
