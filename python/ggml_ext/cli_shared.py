"""What several commands of the command line do alike."""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table

from ggml_ext.cpus import physical_cores


def bound_threads(threads: int | None) -> None:
    """Bounds the threads of numpy's and torch's libraries, which look when they are loaded.

    0 or None: one per core that this process may use. What the user has set stands.
    """
    count = str(threads or physical_cores())
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, count)


def print_table(table: Table) -> None:
    """Print ``table`` in full width where the output is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)
