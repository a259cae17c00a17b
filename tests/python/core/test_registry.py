"""The table of methods: every row is carried out, every implementation has a row, and the loader in C knows
the same transforms."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from ggml_ext.core.registry import ROUNDINGS, TRANSFORMS
from ggml_ext.methods import rounding, transforms


def _modules(package: str, function: str) -> set[str]:
    """Names of the package's modules that define the function."""
    folder = Path(str(import_module(package).__file__)).parent
    pattern = re.compile(rf"^def {function}\(", re.MULTILINE)
    return {path.stem for path in folder.glob("*.py") if pattern.search(path.read_text())} - {"__init__"}


def test_every_transform_has_a_module_and_a_row() -> None:
    assert _modules(transforms.__name__, "solve") == set(TRANSFORMS)


def test_every_rounding_has_a_module_and_a_row() -> None:
    """grid.encode writes chosen levels and is no rounding."""
    assert _modules(rounding.__name__, "encode") - {"grid"} == set(ROUNDINGS)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_a_rounding_falls_back_to_one_that_takes_every_type(name: str) -> None:
    otherwise = ROUNDINGS[name].otherwise
    assert not otherwise or not ROUNDINGS[otherwise].otherwise


def test_the_loader_knows_the_same_transforms(repo_root: Path) -> None:
    """It refuses files with others."""
    (source,) = (repo_root / "ggml_ext").rglob("metadata.cpp")
    listed = re.search(r"transform_names\[\] = \{([^}]*)\}", source.read_text())
    assert listed is not None
    assert re.findall(r'"(\w+)"', listed[1]) == list(TRANSFORMS)
    online = re.search(r"bool ggml_ext_transform_online\([^{]*\{(.*?)\}", source.read_text(), re.DOTALL)
    assert online is not None
    assert set(re.findall(r'"(\w+)"', online[1])) == {n for n, row in TRANSFORMS.items() if row.online}


def test_the_table_needs_no_torch() -> None:
    """The command line reads it at every start."""
    code = "import sys, ggml_ext.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
