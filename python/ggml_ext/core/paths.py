"""Where the patched llama.cpp that belongs to this package lies.

The wheel holds it in subfolders of the package. GGML_EXT_LIB_DIR and GGML_EXT_BIN_DIR point at another
build, such as one made by ``ggml-ext build``. Paths are absolute: tools are started in other folders.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ggml_ext.core.errors import GgmlExtError

PACKAGE = Path(__file__).resolve().parents[1]


def _existing(folder: Path, what: str) -> Path:
    if not folder.is_dir():
        raise GgmlExtError(f"{what} not found: {folder}; reinstall ggml-ext with pip")
    return folder


def lib_dir() -> Path:
    """Folder of libllama, libggml*, libmtmd."""
    override = os.environ.get("GGML_EXT_LIB_DIR")
    return _existing(Path(override).absolute() if override else PACKAGE / "lib", "patched libraries")


def bin_dir() -> Path:
    """Folder of the llama.cpp tools."""
    override = os.environ.get("GGML_EXT_BIN_DIR")
    return _existing(Path(override).absolute() if override else PACKAGE / "bin", "llama.cpp tools")


def include_dir() -> Path:
    """Folder of ggml-ext.h."""
    return _existing(PACKAGE / "include", "C headers")


def converter_dir() -> Path:
    """Folder of the pinned source's convert_hf_to_gguf.py, with its conversion/ and gguf-py/."""
    return _existing(PACKAGE / "upstream", "Hugging Face converter")


def library(name: str) -> Path:
    """Path of a shared library, for example ``library("ggml-base")``."""
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    path = lib_dir() / f"lib{name}{suffix}"
    if not path.is_file():
        raise GgmlExtError(f"library not found: {path}; reinstall ggml-ext with pip")
    return path
