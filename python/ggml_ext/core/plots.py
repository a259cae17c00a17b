"""Pictures: matplotlib where it is installed, and files that appear whole or not at all."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from ggml_ext.core.atomic import atomic_path
from ggml_ext.core.errors import GgmlExtError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_matplotlib() -> None:
    """Raise GgmlExtError if plots cannot be drawn here."""
    if importlib.util.find_spec("matplotlib") is None:
        raise GgmlExtError("--plot: matplotlib is not installed; pip install 'ggml-ext[plot]'")


def save_figure(path: Path, figure: Figure) -> None:
    """Writes the figure as PNG."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
