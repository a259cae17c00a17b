"""The folder of a calibration, an owned_folder.py: what is in it beside its plan and its float model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from ggml_ext.core import owned_folder
from ggml_ext.core.owned_folder import Held, Kind
from ggml_ext.methods.calibrate import plan as plans
from ggml_ext.methods.calibrate.allocate import LOSSES, TYPES
from ggml_ext.methods.calibrate.block_file import block_path, outside_path

OBSERVATION = "observation"
"""The folder within it that observe fills; it has an owner's lock of its own."""


def _made(folder: Path) -> Iterator[Path]:
    plan = plans.load(folder)
    assert plan is not None
    yield from (block_path(folder, index) for index in range(plan.blocks))
    yield outside_path(folder)
    yield from (folder / LOSSES, folder / TYPES)


def held(folder: Path, *, temporary: bool) -> AbstractContextManager[Held]:
    """The calibration's folder for this process alone, see owned_folder.held."""
    return owned_folder.held(folder, Kind("calibration", plans.is_plan, _made), temporary=temporary)
