"""The paths that each command of the command line takes, as its signature says: what a test of all of them
goes through, so that a new command or option cannot be forgotten."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

from ggml_ext.cli import entry as cli


class Parameter(NamedTuple):
    """``flag``: its long spelling, "" for an argument. ``info``: typer's OptionInfo or ArgumentInfo."""

    name: str
    flag: str
    type: Any
    info: Any
    required: bool

    @property
    def is_path(self) -> bool:
        return self.type is Path or Path in get_args(self.type)

    @property
    def is_output(self) -> bool:
        return self.is_path and (self.name in ("out", "dest") or self.name.endswith("_out"))

    @property
    def is_folder(self) -> bool:
        return bool(self.info.metavar == "DIR")


def parameters() -> dict[str, list[Parameter]]:
    """Command -> its parameters that typer knows."""
    found = {}
    for command in cli.app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__.replace("_", "-")
        found[name] = list(_parameters(command.callback))
    return found


def _parameters(callback: Any) -> Iterator[Parameter]:
    for name, its in inspect.signature(callback, eval_str=True).parameters.items():
        kind, *extra = [its.annotation, *getattr(its.annotation, "__metadata__", ())]
        if extra:
            # Within Annotated typer takes the first spelling for the default.
            spellings = [extra[0].default, *(getattr(extra[0], "param_decls", None) or ())]
            flags = [flag for flag in spellings if isinstance(flag, str) and flag.startswith("--")]
            is_option = type(extra[0]).__name__ == "OptionInfo"
            flag = (flags or [f"--{name.replace('_', '-')}"])[0] if is_option else ""
            yield Parameter(name, flag, get_args(kind)[0], extra[0], its.default is inspect.Parameter.empty)
