"""Mutants of the ggml_ext. keys and of FQ4 tensor headers: llama.cpp loads or refuses them, it never crashes.

What would break this: a loader hook that trusts a key's type or length, a type row or a size computation that
a wrong dimension, offset or id takes out of bounds, a truncation that is read past. The Python reader of the
same files must answer with a result or one GgmlExtError.
"""

from __future__ import annotations

import contextlib
import copy
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import models
import tiny_fq4
from ggml_ext.convert import convert
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.ext import FQ4, KEYS
from ggml_ext.gguf.header import read_header
from ggml_ext.gguf.inspect import inspect

CHILD = Path(__file__).parents[1] / "load_models.py"
N_MUTANTS = int(os.environ.get("GGML_EXT_MUTANTS", "400"))


@dataclass
class Tensor:
    name: bytes
    dims: list[int]
    type: int
    offset: int


@dataclass
class Parts:
    """A GGUF file taken apart: other keys as they are, ours as [name, type, value bytes], tensors, data."""

    keys: list[bytes]
    ext: list[list[bytes | int]]
    tensors: list[Tensor]
    data: bytes = field(repr=False)
    cut: int = 0  # bytes missing at the end

    def to_bytes(self) -> bytes:
        header = [
            struct.pack("<4sIQQ", b"GGUF", 3, len(self.tensors), len(self.keys) + len(self.ext)),
            *self.keys,
        ]
        for name, type_, value in self.ext:
            assert isinstance(name, bytes)
            assert isinstance(type_, int)
            assert isinstance(value, bytes)
            header.append(struct.pack("<Q", len(name)) + name + struct.pack("<I", type_) + value)
        for tensor in self.tensors:
            n = len(tensor.dims)
            header.append(struct.pack("<Q", len(tensor.name)) + tensor.name)
            header.append(struct.pack(f"<I{n}QIQ", n, *tensor.dims, tensor.type, tensor.offset))
        text = b"".join(header)
        whole = text + bytes(-len(text) % 32) + self.data
        return whole[: len(whole) - self.cut]


def take_apart(path: Path) -> Parts:
    header = read_header(path)
    ext: list[list[bytes | int]] = []
    keys = []
    for name, entry in header.keys.items():
        if name in KEYS:
            start = 8 + len(name)
            ext.append([name.encode(), struct.unpack_from("<I", entry, start)[0], entry[start + 4 :]])
        else:
            keys.append(entry)
    tensors = [Tensor(t.name.encode(), list(t.dims), t.type_id, t.offset) for t in header.tensors]
    return Parts(keys, ext, tensors, path.read_bytes()[header.data :])


BITS = (0, 1, 2, 31, 32, 63, 64, 127, 138, 255, 256, 257, 512, 65536, 2**31 - 1, 2**31, 2**32 - 1)
UINT32 = st.sampled_from(BITS) | st.integers(0, 2**32 - 1)
UINT64 = UINT32 | st.sampled_from((2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 256, 2**64 - 1))
NAMES = st.sampled_from([b"ggml_ext.", b"ggml_ext.x", b"ggml_ext.version", b"ggml_ext.transform.name"])
ANY_NAME = NAMES | st.binary(max_size=24).map(lambda tail: b"ggml_ext." + tail)
VALUES = st.one_of(
    UINT32.map(lambda n: struct.pack("<I", n)),
    UINT64.map(lambda n: struct.pack("<Q", n)),
    st.binary(max_size=40).map(lambda text: struct.pack("<Q", len(text)) + text),
    st.tuples(UINT32, UINT64, st.binary(max_size=40)).map(lambda v: struct.pack("<IQ", v[0], v[1]) + v[2]),
    st.binary(max_size=16),
)
VALUE_TYPES = st.integers(0, 13) | UINT32
TYPE_IDS = st.integers(0, 210) | UINT32


@st.composite
def key_mutation(draw: st.DrawFn) -> Callable[[Parts], None]:
    which = draw(st.integers(0, len(KEYS) - 1))
    name, type_, value = draw(ANY_NAME), draw(VALUE_TYPES), draw(VALUES)

    def mutate(
        parts: Parts, how: str = draw(st.sampled_from(["name", "type", "value", "both", "add", "drop"]))
    ) -> None:
        entry = parts.ext[which % len(parts.ext)] if parts.ext else [name, type_, value]
        if how == "add":
            parts.ext.append([name, type_, value])
        elif how == "drop":
            parts.ext = [kept for kept in parts.ext if kept is not entry]
        elif how == "name":
            entry[0] = name
        else:
            entry[1:] = [entry[1] if how == "value" else type_, entry[2] if how == "type" else value]

    return mutate


@st.composite
def tensor_mutation(draw: st.DrawFn) -> Callable[[Parts], None]:
    which = draw(st.integers(0, 8))
    dims = draw(st.lists(UINT64, min_size=0, max_size=6))
    type_, offset = draw(TYPE_IDS), draw(UINT64)
    dim = draw(st.integers(0, 1))

    def mutate(
        parts: Parts, how: str = draw(st.sampled_from(["dims", "dim", "type", "offset", "all"]))
    ) -> None:
        fq4_tensors = [tensor for tensor in parts.tensors if tensor.type == FQ4] or parts.tensors
        tensor = fq4_tensors[which % len(fq4_tensors)]
        if how in ("dims", "all"):
            tensor.dims = dims
        if how == "dim":
            tensor.dims = [*tensor.dims[:dim], dims[0] if dims else 0, *tensor.dims[dim + 1 :]]
        if how in ("type", "all"):
            tensor.type = type_
        if how in ("offset", "all"):
            tensor.offset = offset

    return mutate


@st.composite
def truncation(draw: st.DrawFn) -> Callable[[Parts], None]:
    share = draw(st.floats(0, 1))

    def mutate(parts: Parts) -> None:
        parts.cut = int(share * len(parts.to_bytes()))

    return mutate


MUTATIONS = st.lists(key_mutation() | tensor_mutation() | truncation(), min_size=1, max_size=3)


class Loader:
    """The child process; started again after a crash, so that the search for a smaller mutant can go on."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.child: subprocess.Popen[str] | None = None
        self.output: IO[str] | None = None

    def load(self, path: Path) -> str:
        """The child's answer; fails the test if it dies instead."""
        if self.child is None:
            with self.log.open("w") as log:
                self.child = subprocess.Popen(
                    [sys.executable, str(CHILD)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.write(f"{path}\n")
            self.child.stdin.flush()
        answer = self.child.stdout.readline().strip()
        if not answer:
            status = self.child.wait()
            self.child = None
            pytest.fail(f"the loader ended with status {status}: {self.log.read_text()[-1500:]}")
        return answer

    def close(self) -> None:
        if self.child is not None:
            self.child.communicate()
            assert self.child.returncode == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutants")


@pytest.fixture(scope="module")
def parts(folder: Path) -> Parts:
    return take_apart(tiny_fq4.write(folder / "original.gguf"))


@pytest.fixture(scope="module")
def loader(folder: Path) -> Iterator[Loader]:
    loader = Loader(folder / "loader.log")
    yield loader
    loader.close()


def test_original_runs_and_is_rebuilt_exactly(folder: Path, parts: Parts, loader: Loader) -> None:
    original = folder / "original.gguf"
    assert loader.load(original) == "loaded"
    rebuilt = folder / "rebuilt.gguf"
    rebuilt.write_bytes(parts.to_bytes())
    assert loader.load(rebuilt) == "loaded"
    assert inspect(rebuilt).ext == tiny_fq4.METADATA


def refusal(path: Path) -> str:
    """What the Python reader says against the file; nothing if it accepts it."""
    try:
        inspect(path)
    except GgmlExtError as error:
        return str(error)
    return ""


@settings(max_examples=N_MUTANTS, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutations=MUTATIONS)
def test_mutants_never_crash_the_loader(
    mutations: list[Callable[[Parts], None]], folder: Path, parts: Parts, loader: Loader
) -> None:
    mutant = copy.deepcopy(parts)
    for mutate in mutations:
        mutate(mutant)
    path = folder / "mutant.gguf"
    path.write_bytes(mutant.to_bytes())
    answer = loader.load(path)
    # Both enforce the same rules for keys; about tensors llama.cpp is stricter.
    if "key ggml_ext." in refusal(path):
        assert answer == "refused"


@st.composite
def byte_mutation(draw: st.DrawFn) -> Callable[[bytearray], None]:
    where, patch = draw(st.floats(0, 1)), draw(st.binary(min_size=1, max_size=12))

    def mutate(data: bytearray) -> None:
        start = 4 + int(where * (len(data) - 4 - len(patch)))
        data[start : start + len(patch)] = patch

    return mutate


FLOATS = {
    "token_embd.weight": np.ones((32, 256), np.float32),
    "blk.0.attn_q.weight": np.ones((2, 256), np.float16),
    "blk.0.ffn_up.weight": np.ones((2, 3, 64), np.uint16),
}
TARGETS = ("fq4", "q8_0", "f16", "nvfp4")


@settings(max_examples=N_MUTANTS, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    mutations=st.lists(key_mutation() | tensor_mutation() | truncation(), max_size=2),
    patches=st.lists(byte_mutation(), max_size=2),
    target=st.sampled_from(TARGETS),
)
def test_mutants_are_read_and_converted_or_refused(
    mutations: list[Callable[[Parts], None]],
    patches: list[Callable[[bytearray], None]],
    target: str,
    folder: Path,
) -> None:
    """Float models, whose conversion reads what inspect only counts; every other exception is a failure."""
    mutant = copy.deepcopy(float_parts(folder))
    for mutate in mutations:
        mutate(mutant)
    whole = mutant.to_bytes()
    header = bytearray(whole[: max(len(whole) - len(mutant.data), 32)])
    for patch in patches:
        patch(header)
    path = folder / "float.gguf"
    path.write_bytes(bytes(header) + whole[len(header) :])
    refusal(path)
    with contextlib.suppress(GgmlExtError):
        convert(path, folder / "converted.gguf", type_name=target, threads=1)
        inspect(folder / "converted.gguf")


@cache
def float_parts(folder: Path) -> Parts:
    return take_apart(models.write_gguf(folder / "float-original.gguf", FLOATS))


def test_keys_of_a_transform_without_a_version(tmp_path: Path) -> None:
    """Rounding anew would carry them on; a reader could not tell which format they are of."""
    source = tmp_path / "float.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_string("ggml_ext.transform.name", "flatquant")
    for name, values in FLOATS.items():
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GgmlExtError, match=r"has ggml_ext.transform.name without ggml_ext.version; make"):
        convert(source, tmp_path / "converted.gguf", type_name="fq4", threads=1)
    assert not (tmp_path / "converted.gguf").exists()
