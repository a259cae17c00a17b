"""Damaged safetensors headers and settings of a model: a value or one line, never a traceback or a crash.

GGML_EXT_MUTANTS sets how many of each are tried.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest

import tiny_families as tiny
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.hf import folder as hf
from ggml_ext.hf.files import DTYPE_BITS
from ggml_ext.hf.model_files import of_folder

N_HEADERS = int(os.environ.get("GGML_EXT_MUTANTS", 600))
N_CONFIGS = int(os.environ.get("GGML_EXT_MUTANTS", 120))

ODD: list[Any] = [None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308]
ODD += [float("nan"), float("inf"), "", "x", "\ud800", "\n\x1b[31m", "a" * 5000, "F16", "BF16", "F64", "I64"]
ODD += [[], {}, [[]], [None], [-1, 5], [0, 2**62], ["x"], {"": {}}, {"a": 1}, {"rope_type": "dynamic"}]
ODD += ["LlamaForCausalLM", "llama", "qwen3_moe", "relu", "eager", "../x", "mine.Model", "bfloat16"]


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def mutate(content: Any, rng: random.Random) -> bytes:
    """JSON text of ``content`` with one to three changes to values, keys or bytes."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.randint(1, 3)):
        found = places(content)
        if not found:
            break
        container, key = rng.choice(found)
        how = rng.random()
        if how < 0.6:
            container[key] = copy.deepcopy(rng.choice(ODD))
        elif how < 0.7 and isinstance(container, dict):
            container[rng.choice(["dtype", "x", "num_hidden_layers", "\ud800", "auto_map"])] = container[key]
        elif how < 0.8:
            del container[key]
        else:
            other, its_key = rng.choice(found)
            container[key] = json.loads(json.dumps(other[its_key])) if its_key in keys_of(other) else 0
    text = bytearray(json.dumps(content).encode())
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text) + 1)
            piece = rng.choice([b"", b"{", b"]", b",", b'"', b"9" * 40, b"\xff", bytes([rng.randrange(256)])])
            text[at : at + rng.randrange(3)] = piece
    if rng.random() < 0.05:
        text = text[: rng.randrange(len(text) + 1)]
    return bytes(text)


def keys_of(value: Any) -> Any:
    return value if isinstance(value, dict) else range(len(value))


def survives(folder: Path, seed: int, read: Any) -> bool:
    """Whether the folder was accepted. Fails the test if the answer is neither a value nor one line."""
    try:
        read(folder)
    except GgmlExtError as exc:
        line = str(exc)
    except Exception as exc:
        pytest.fail(f"seed {seed}: {exc!r}")
    else:
        return True
    assert line.encode(), seed  # fails for what cannot be written
    assert "\n" not in line, seed
    assert "\x1b" not in line, seed
    return False


def test_headers(tmp_path: Path) -> None:
    def read(folder: Path) -> None:
        weights = hf.check(folder)
        hf.exact_type(folder, weights)
        hf.n_float_bytes(folder, weights)
        of_folder(folder)

    tensors = {"a": ("F32", [2, 4]), "b": ("BF16", [4]), "c": ("F16", [2, 2, 2]), "d": ("BOOL", [1, 1, 4, 4])}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    (tmp_path / "config.json").write_text("{}")
    accepted = 0
    for seed in range(N_HEADERS):
        rng = random.Random(seed)
        text = mutate(header, rng) if seed else json.dumps(header).encode()
        odd = seed and rng.random() < 0.05
        length = rng.choice([0, len(text) + 8, 2**40, 2**64 - 1]) if odd else len(text)
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + text + bytes(end))
        accepted += survives(tmp_path, seed, read)
    assert 0 < accepted < N_HEADERS


def test_configs(tmp_path: Path) -> None:
    def read(folder: Path) -> None:
        weights = hf.check(folder)
        hf.exact_type(folder, weights)
        hf.remarks(folder)
        of_folder(folder)

    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    originals = [tiny.config_json(family) for family in tiny.CONFIGS]
    accepted = 0
    for seed in range(N_CONFIGS):
        rng = random.Random(seed)
        original = originals[seed % len(originals)]
        text = mutate(original, rng) if seed >= len(originals) else json.dumps(original).encode()
        (tmp_path / "config.json").write_bytes(text)
        accepted += survives(tmp_path, seed, read)
    assert 0 < accepted < N_CONFIGS
