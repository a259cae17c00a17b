"""Fixtures that several test modules share. Folders of native builds can be set through the environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _folder(variable: str, default: Path, sign: str) -> Path:
    folder = Path(os.environ.get(variable) or default)
    if not (folder / sign).is_file():
        pytest.fail(f"{folder}: no {sign}; run scripts/setup or set {variable}", pytrace=False)
    return folder


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def patched_lib_dir() -> Path:
    """Patched shared libraries, as the package finds them."""
    from ggml_ext import paths

    return paths.lib_dir()


@pytest.fixture(scope="session")
def patched_bin_dir() -> Path:
    """Patched llama.cpp tools, as the package finds them."""
    from ggml_ext import paths

    return paths.bin_dir()


@pytest.fixture(scope="session")
def test_bin_dir() -> Path:
    """Upstream's test programs of the patched build."""
    return _folder("GGML_EXT_TEST_BIN", ROOT / "build" / "patched" / "bin", "test-backend-ops")


@pytest.fixture(scope="session")
def stock_build() -> Path:
    """Libraries and tools of the same release without patches, in one folder."""
    return _folder("GGML_EXT_STOCK_BIN", ROOT / "build" / "stock" / "bin", "llama-perplexity")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Development data outside the repository (models, texts); tests that need it are skipped without it."""
    folder = Path(os.environ.get("GGML_EXT_SHARED") or ROOT.parent / "shared")
    if not (folder / "models").is_dir():
        pytest.skip(f"{folder}: no development data; set GGML_EXT_SHARED")
    return folder
