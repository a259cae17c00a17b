"""Wrong hyperparameters and tokenizer keys of a model: every command refuses it in one line, none dies.

What would break this: llama.cpp asserts where it could refuse, so a file with a key that is off ends the
process unless runtime/hparams.py knows the key or runtime/aborts.py catches the assertion. A rule that is too
strict would show in the sound models here and in tests/python/observe/test_archs.py.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import arch_models
from eval_models import make_model, make_plamo2, text_of
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.header import read_header, value
from ggml_ext.gguf.source import open_gguf
from ggml_ext.gguf.writer import OutTensor, write_header
from ggml_ext.runtime import hparams

CHILD = Path(__file__).parents[1] / "run_models.py"
N_MUTANTS = int(os.environ.get("GGML_EXT_MUTANTS", "400")) // 8

CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOATS = (Type.FLOAT32, Type.FLOAT64)
NAN, INF = float("nan"), float("inf")

MODELS: dict[str, Callable[[Path], Path]] = {
    "dense": make_model,
    "mixture": lambda path: make_model(path, experts=4),
    "hybrid": make_plamo2,
    "windows": lambda path: arch_models.gemma4(path, shared_kv=2),
    "both": lambda path: arch_models.gemma4(path, experts=4),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sound")
    return {name: make(folder / f"{name}.gguf") for name, make in MODELS.items()}


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def packed(type_id: int, content: Any) -> bytes:
    """The value as GGUF has it, the nearest that the type can hold."""
    if type_id == Type.STRING:
        return string(str(content))
    if type_id in FLOATS:
        return struct.pack(f"<{CODES[type_id]}", content if abs(content) < 1e38 else np.sign(content) * INF)
    info = np.iinfo(np.uint8) if type_id == Type.BOOL else np.iinfo(CODES[type_id])
    low, high = (0, 1) if type_id == Type.BOOL else (info.min, info.max)
    whole = high if content != content or content == INF else max(low, content)
    return struct.pack(f"<{CODES[type_id]}", int(min(high, whole)))


def entry(name: str, type_id: int, content: Any) -> bytes:
    """A key with a value, or with an array of them for a list."""
    if isinstance(content, list):
        head = struct.pack("<IIQ", Type.ARRAY, type_id, len(content))
        return string(name) + head + b"".join(packed(type_id, part) for part in content)
    return string(name) + struct.pack("<I", type_id) + packed(type_id, content)


def write_changed(source: Path, out: Path, changed: Mapping[str, bytes | None]) -> Path:
    """The model with other entries for these keys, None for those that go."""
    header = read_header(source)
    keys = {name: data for name, data in {**header.keys, **changed}.items() if data is not None}
    pairs = zip(header.tensors, open_gguf(source).tensors, strict=True)
    tensors = [OutTensor(one.name, one.dims, one.type_id, other.n_bytes) for one, other in pairs]
    with out.open("wb") as file:
        write_header(file, keys, tensors, header.alignment)
        file.write(source.read_bytes()[header.data :])
    return out


WRONG = [
    ("dense", "llama.attention.layer_norm_rms_epsilon", Type.FLOAT32, NAN, "is no number"),
    ("dense", "llama.attention.layer_norm_rms_epsilon", Type.FLOAT32, -1e-5, "is -1e-05, not finite"),
    ("dense", "llama.attention.layer_norm_rms_epsilon", Type.FLOAT32, INF, "is inf, not finite"),
    ("dense", "llama.rope.freq_base", Type.FLOAT32, NAN, "is no number"),
    ("windows", "gemma4.some.array", Type.FLOAT32, [1.0, NAN], "is no number"),
    ("dense", "llama.rope.scaling.type", Type.STRING, "su", "is 'su', not one of none, linear, yarn"),
    ("dense", "llama.block_count", Type.UINT32, 2**31, "is 2147483648, not from 1 to 512"),
    ("dense", "llama.block_count", Type.UINT32, 0, "is 0, not from 1 to 512"),
    ("dense", "llama.nextn_predict_layers", Type.UINT32, 2, "is 2, more than the 1 blocks"),
    ("mixture", "llama.expert_used_count", Type.UINT32, 9, "is 9, of 4 experts"),
    ("mixture", "llama.expert_used_count", Type.UINT32, [9], "is 9, of 4 experts"),
    ("mixture", "llama.expert_used_count", Type.UINT32, 0, "is 0, of 4 experts"),
    ("dense", "llama.expert_used_count", Type.UINT32, 1, "is 1, of 0 experts"),
    ("mixture", "llama.expert_count", Type.UINT32, 4096, "is 4096, more than 1024"),
    ("mixture", "llama.expert_group_count", Type.UINT32, 4, "is 4, of 4 experts"),
    ("mixture", "llama.expert_group_count", Type.UINT32, 3, "is 3, which does not divide 4"),
    ("mixture", "llama.expert_group_count", Type.UINT32, 2, "expert_group_used_count is 0, of 2 groups"),
    ("dense", "llama.attention.head_count", Type.UINT32, 2**32 - 2, "is 4294967294, more than the 64"),
    ("hybrid", "plamo2.attention.head_count", Type.UINT32, 0, "is missing or 0, and there are attn_q"),
    ("hybrid", "plamo2.rope.dimension_count", Type.UINT32, 7, "is 7, not an even number"),
    ("hybrid", "plamo2.rope.dimension_count", Type.UINT32, 2**32 - 2, "of at most a head's 32 channels"),
    ("windows", "gemma4.rope.dimension_count_swa", Type.UINT32, 66, "of at most a head's 64 channels"),
]


@pytest.mark.parametrize(("model", "key", "type_id", "content", "says"), WRONG)
def test_a_wrong_key_is_named(
    sound: dict[str, Path], tmp_path: Path, model: str, key: str, type_id: int, content: Any, says: str
) -> None:
    path = write_changed(sound[model], tmp_path / "m.gguf", {key: entry(key, type_id, content)})
    with pytest.raises(GgmlExtError) as refused:
        hparams.check(path)
    assert str(refused.value).startswith(f"{path}: key {key.partition('.')[0]}.")
    assert says in str(refused.value)
    assert str(refused.value).endswith("; make the file anew from a sound model")


def test_an_empty_vocabulary(sound: dict[str, Path], tmp_path: Path) -> None:
    key = "tokenizer.ggml.tokens"
    path = write_changed(sound["windows"], tmp_path / "m.gguf", {key: entry(key, Type.STRING, [])})
    with pytest.raises(GgmlExtError, match=r"m.gguf: key tokenizer.ggml.tokens is empty; make"):
        hparams.check(path)


def test_sound_models_and_no_models_pass(sound: dict[str, Path], tmp_path: Path) -> None:
    for path in sound.values():
        hparams.check(path)
    unbounded = "plamo2.kda.gate_lower_bound"
    hparams.check(
        write_changed(sound["hybrid"], tmp_path / "m.gguf", {unbounded: entry(unbounded, Type.FLOAT32, -INF)})
    )
    (tmp_path / "text.gguf").write_text("GGUF?")
    hparams.check(tmp_path / "text.gguf")  # llama.cpp says what it is


@pytest.mark.parametrize(
    ("model", "key", "type_id", "content", "says"),
    [
        ("mixture", "llama.expert_used_count", Type.UINT32, 9, "expert_used_count is 9"),
        ("dense", "llama.attention.layer_norm_rms_epsilon", Type.FLOAT32, NAN, "is no number"),
        # No rule of hparams.py, and an assertion of this architecture's graph.
        ("hybrid", "plamo2.ssm.group_count", Type.UINT32, 5, "gave up at plamo2.cpp:"),
        # A vocabulary without bytes, which this tokenizer looks for.
        ("both", "tokenizer.ggml.model", Type.STRING, "llama", "gave up on a C++ exception"),
    ],
)
@pytest.mark.parametrize(
    "line",
    [
        "perplexity m.gguf -f text.txt --ctx 32 -t 1 --json out.json",
        "observe m.gguf -o out --calibration text.txt --ctx 32 --samples 2 -t 1",
        "convert m.gguf -o out.gguf --type q4_0 --rounding imatrix --calibration text.txt --ctx 32 -t 1",
    ],
)
def test_commands_end_in_one_line(
    sound: dict[str, Path],
    tmp_path: Path,
    line: str,
    model: str,
    key: str,
    type_id: int,
    content: Any,
    says: str,
) -> None:
    write_changed(sound[model], tmp_path / "m.gguf", {key: entry(key, type_id, content)})
    (tmp_path / "text.txt").write_text(text_of(200))
    done = subprocess.run(
        [sys.executable, "-m", "ggml_ext.cli.entry", *line.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "GGML_EXT_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 1, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if "error" in line or "ASSERT" in line]
    assert error.startswith("ggml-ext: error: ")
    assert says in error
    assert "m.gguf: " in error
    left = {path.name for path in tmp_path.iterdir()} - {"cache", "out"}
    assert left == {"m.gguf", "text.txt"}


NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 5, 31, 33, 64, 127, 256, 512, 513, 65536, 2**31 - 1, 2**31, 2**32 - 1, -1, -(2**31)]
)
ANY_NUMBER = NUMBERS | st.sampled_from([NAN, INF, -INF, -1.0, -1e-5, -0.0, 1e-45, 0.5, 1e-5, 3e38])
TEXTS = st.sampled_from(["", "x", "none", "llama", "gpt2", "bert", "t5", "plamo2", "yarn", "mean", "é" * 99])


@st.composite
def mutation(draw: st.DrawFn) -> Callable[[dict[str, bytes | None]], None]:
    """Changes one key below the architecture's name or of the tokenizer."""
    which, how = draw(st.integers(0, 99)), draw(st.sampled_from(["value", "type", "array", "drop", "tokens"]))
    number, text, count = draw(ANY_NUMBER), draw(TEXTS), draw(st.sampled_from([0, 1, 2, 5, 512, 600]))
    other, at = draw(st.sampled_from([*CODES, 8])), draw(st.integers(0, 999))

    def mutate(keys: dict[str, bytes | None]) -> None:
        names = [name for name in keys if name.startswith("tokenizer.") == (how == "tokens")]
        name = names[which % len(names)]
        old = keys[name]
        if old is None:
            return
        (type_id,) = struct.unpack_from("<I", old, 8 + len(name))
        content = value(old)
        if isinstance(content, list):
            (type_id,) = struct.unpack_from("<I", old, 12 + len(name))
        new: Any = text if type_id == Type.STRING else number
        if how == "drop":
            keys[name] = None
            return
        if how == "type":
            type_id, new = other, text if other == Type.STRING else number
        elif how == "array":
            new = [content if isinstance(content, int | float) else new] * count
        elif isinstance(content, list) and content:
            new = [*content[: at % len(content)], new, *content[at % len(content) + 1 :]]
            new = new[: len(new) - count if at % 3 == 0 else None]
        if "rope.dimension_count" in name and packed(Type.UINT32, number) == bytes(4):
            return  # ggml's rope of no channels never ends
        keys[name] = entry(name, type_id, new)

    return mutate


@pytest.fixture(scope="module")
def runner() -> Iterator[Callable[[Path], str]]:
    with subprocess.Popen(
        [sys.executable, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        ends, answers = child.stdin, child.stdout

        def run(path: Path) -> str:
            ends.write(f"{path}\n")
            ends.flush()
            return answers.readline().strip()

        yield run
        ends.close()


@pytest.mark.parametrize("name", MODELS)
def test_sound_models_run(sound: dict[str, Path], runner: Callable[[Path], str], name: str) -> None:
    assert runner(sound[name]) == "loaded"


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=N_MUTANTS, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutations=st.lists(mutation(), min_size=1, max_size=3))
def test_mutants_never_end_by_a_signal(
    mutations: list[Callable[[dict[str, bytes | None]], None]],
    sound: dict[str, Path],
    runner: Callable[[Path], str],
    name: str,
) -> None:
    header = read_header(sound[name])
    below = (f"{value(header.keys['general.architecture'])}.", "tokenizer.")
    keys: dict[str, bytes | None] = {key: e for key, e in header.keys.items() if key.startswith(below)}
    for mutate in mutations:
        mutate(keys)
    path = write_changed(sound[name], sound[name].with_suffix(".mutant"), keys)
    assert runner(path).startswith(("loaded", "refused: ", "gave up: "))
