"""plan.json and state.json that were changed: one line that names a file, whatever they say.

What would break these: a field that is used before its type and value are known to be possible.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from eval_models import make_model, text_of
from ggml_ext.cli.entry import app
from ggml_ext.convert import convert
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.methods.calibrate import plan as plans
from ggml_ext.observe import description as descriptions
from ggml_ext.observe.importance import of_observation
from ggml_ext.observe.reader import Observation
from ggml_ext.observe.state import load_state

ODD = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**40,
    2**70,
    0.5,
    float("nan"),
    "",
    "x",
    "q9_z",
    [],
    [1],
    {},
    {"a": 1},
]
MUTANTS = 150


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, m.gguf, and a calibration of it, c."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("damaged")
    model, text = make_model(folder / "m.gguf", blocks=2), folder / "text"
    text.write_text(text_of(900))
    options = ["--type", "q4_0", "--transform", "smoothquant", "--ctx", "32", "--samples", "4", "-t", "1"]
    line = ["calibrate", str(model), "-o", str(folder / "c"), "--calibration", str(text), *options]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    return folder


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within parsed JSON."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [found for key in keys for found in ((value, key), *_places(value[key]))]


def _mutant(facts: Any, seed: int) -> Any:
    """One value replaced, removed or added, of a field of the object as often as of what is within."""
    its = random.Random(seed)
    facts = copy.deepcopy(facts)
    top = [(facts, key) for key in facts]
    container, key = its.choice(its.choice((top, _places(facts))))
    what = its.randrange(6)
    if what == 0:
        del container[key]
    elif what == 1 and isinstance(container, dict):
        container["more"] = its.choice(ODD)
    else:
        container[key] = its.choice(ODD)
    return facts


def _refusals(path: Path, use: Callable[[], object]) -> int:
    """How many mutants of the JSON file are refused, each in a line that names a file of its folder."""
    whole, said = json.loads(path.read_text()), []
    for seed in range(MUTANTS):
        path.write_text(json.dumps(_mutant(whole, seed)))
        try:
            use()
        except GgmlExtError as error:
            said.append(str(error))
    wrong = [line for line in said if str(path.parent) not in line or "; " not in line]
    assert not wrong
    return len(said)


def test_of_a_calibration(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "c", tmp_path / "c")

    def use() -> None:
        convert(place / "m.gguf", tmp_path / "o.gguf", calibrated=folder, warn=lambda _line: None)

    use()
    assert _refusals(folder / "plan.json", use) > MUTANTS // 2


def test_of_the_observation_in_it(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "c" / "observation", tmp_path / "o")

    def use() -> None:
        seen = Observation(folder)
        for site in seen.table.sites:
            seen.moment(site), seen.absmax(site), seen.sample(site, 8)
        of_observation(seen, None, tmp_path)

    use()
    assert _refusals(folder / "plan.json", use) > MUTANTS // 2
    shutil.copyfile(place / "c" / "observation" / "plan.json", folder / "plan.json")
    assert _refusals(folder / "state.json", lambda: load_state(folder)) > MUTANTS // 2


@pytest.mark.parametrize("content", ["", "[]", "null", "7", '"text"', "[" * 10**5, '{"a":', "\x00", "{}"])
def test_what_is_no_object(tmp_path: Path, content: str) -> None:
    for name in ("plan.json", "state.json"):
        (tmp_path / name).write_text(content)
    for load in (plans.load, descriptions.load, load_state):
        if content == "{}" and load is load_state:
            continue  # a state that says nothing has no windows
        with pytest.raises(GgmlExtError, match=r"\.json: (not a plan|damaged).*; delete the folder and"):
            load(tmp_path)
