"""llama.cpp's command-line tools of the patched build: where they are and how they are started."""

from __future__ import annotations

import os
from pathlib import Path

from ggml_ext.core import paths
from ggml_ext.core.errors import GgmlExtError


def available() -> list[str]:
    """Names of the tools that are installed, sorted."""
    folder = paths.bin_dir()
    if not folder.is_dir():
        return []
    programs = (path for path in folder.iterdir() if path.is_file() and os.access(path, os.X_OK))
    return sorted(path.name for path in programs if ".so" not in path.suffixes)


def find(name: str) -> Path:
    """Path of the tool ``name`` ("llama-bench"). Raises GgmlExtError, naming those that exist."""
    if name in (names := available()):
        return paths.bin_dir() / name
    known = f"there are {', '.join(names)}" if names else "the folder has no tools: reinstall ggml-ext"
    raise GgmlExtError(f"{name}: no such tool in {paths.bin_dir()}; {known}")


def environment() -> dict[str, str]:
    """Environment in which a tool finds the patched libraries before any others, and none in the current
    folder, which is what an empty entry means."""
    others = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    libraries = [str(paths.lib_dir().absolute()), *filter(None, others)]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(libraries)}
