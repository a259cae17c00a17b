"""How far an observation is, and which files it is in: state.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ggml_ext.core.atomic import write_text
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.facts import made_of

SUMS = ("sums-0.bin", "sums-1.bin")
ABSMAX, SAMPLES, STATE = "absmax.bin", "samples.bin", "state.json"
FILES = (*SUMS, ABSMAX, SAMPLES, STATE)


@dataclass(frozen=True)
class State:
    """``windows``: how many are in the sums. ``sums``: the file that holds them, "" before there is one."""

    windows: int = 0
    sums: str = ""

    @property
    def next_sums(self) -> str:
        """The file of the next generation."""
        return SUMS[1] if self.sums == SUMS[0] else SUMS[0]


def load_state(folder: Path) -> State:
    """The folder's state. Raises GgmlExtError for a damaged one."""
    path = folder / STATE
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("no JSON object")
        state = made_of(State, facts)
        if state.windows < 0 or state.sums not in ("", *SUMS) or bool(state.windows) != bool(state.sums):
            raise ValueError("impossible values")
        return state
    except FileNotFoundError:
        return State()
    except OSError as exc:
        raise GgmlExtError(f"{path}: {exc.strerror}; check its permissions") from exc
    except (ValueError, RecursionError) as exc:
        raise GgmlExtError(f"{path}: damaged ({exc}); delete the folder and observe again") from exc


def save_state(folder: Path, state: State) -> None:
    """Replaces the folder's state atomically."""
    write_text(folder / STATE, json.dumps(asdict(state)) + "\n")


def drop_other_generation(folder: Path) -> None:
    """Removes the sums that the state does not name: all is done."""
    (folder / load_state(folder).next_sums).unlink(missing_ok=True)
