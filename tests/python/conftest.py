"""Fixtures that several test modules share. Folders of native builds can be set through the environment."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import arch_models
from arch_models import ArchModel

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
    from ggml_ext.core import paths

    return paths.lib_dir()


@pytest.fixture(scope="session")
def patched_bin_dir() -> Path:
    """Patched llama.cpp tools, as the package finds them."""
    from ggml_ext.core import paths

    return paths.bin_dir()


@pytest.fixture(scope="session")
def test_bin_dir() -> Path:
    """Upstream's test programs of the patched build."""
    return _folder("GGML_EXT_TEST_BIN", ROOT / "build" / "patched" / "bin", "test-backend-ops")


@pytest.fixture(scope="session")
def architectures(test_bin_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ArchModel]:
    """A tiny random model of every architecture, by name (arch_models.NAMES)."""
    return arch_models.save(tmp_path_factory.mktemp("architectures"), test_bin_dir / "test-llama-archs")


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


@pytest.fixture
def rpc_server(patched_bin_dir: Path) -> Iterator[str]:
    """Address of a patched ggml-rpc-server that runs for the length of a test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [str(patched_bin_dir / "ggml-rpc-server"), "-H", "127.0.0.1", "-p", str(port), "-t", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(100):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, "the server ended at once"
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
