"""What several tests of KV caches read."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval_models import text_of


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3000 words."""
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text(text_of(3000))
    return path
