"""The table of sites: version 2 of the format, beside version 1, whose sites follow from names.

What would break these: a reader or maker taken from a name instead of the table, a table that is only read in
part, a digest that misses some of it, a wrong file that is loaded, an older one that is read otherwise.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fold_files as folds
import transform_files as files
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.ext import validate_keys
from ggml_ext.gguf.header import read_header
from ggml_ext.gguf.source import open_gguf
from ggml_ext.gguf.writer import (
    OutTensor,
    string_array_key,
    string_key,
    uint32_array_key,
    uint32_key,
    write_header,
)
from ggml_ext.runtime.llama import Model, bindings
from transform_files import run

EYE = np.eye(16, dtype=np.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def llama(base: Path) -> Path:
    return files.llama_f32(base)


def everything(path: Path) -> files.Model:
    """Folds, factors and clips at every site, in version 1."""
    model = files.transform(folds.fold(files.read(path), files.HEAD_DIM), use_hadamard=True)
    model.ours["ggml_ext.transform.clip"] = [0.9, 1.0, 0.8, 1.0] * model.blocks
    return model


@pytest.mark.parametrize("source", [files.llama_f32, files.mixtral_f32], ids=["llama", "mixtral"])
def test_both_versions_give_the_same_bits(source: Callable[[Path], Path], base: Path, tmp_path: Path) -> None:
    """With and without an adapter of every matrix."""
    path = source(base)
    model = everything(path)
    old = model.write(tmp_path / "1.gguf")
    new = files.upgrade(model).write(tmp_path / "2.gguf")
    validate_keys(read_header(new))
    shapes = folds.shapes_of(path, (*folds.TARGETS, *folds.EXPERT_TARGETS))
    adapter = folds.write_adapter(tmp_path / "a.gguf", shapes)
    with folds.AdapterModel(old) as a, folds.AdapterModel(new) as b:
        for adapters in ([], [(adapter, 1.0)]):
            assert a.log_probabilities(adapters).tobytes() == b.log_probabilities(adapters).tobytes()


def without_v(path: Path) -> files.Model:
    """A site that version 1 has no place for: q and k read what is transformed online, v what was folded."""
    model = files.read(path)
    plain = dict(model.tensors)
    files.transform(model)
    for block in range(model.blocks):
        model.tensors[f"blk.{block}.attn_v.weight"] = plain[f"blk.{block}.attn_v.weight"]
    d = np.where(np.arange(256) % 3, 2.0, -0.5).astype(np.float32)
    for block in range(model.blocks):
        model.tensors[f"blk.{block}.attn_norm.weight"] /= d
        for name in "qkv":
            folded = plain[f"blk.{block}.attn_{name}.weight"] * d
            if name != "v":
                left, right = (model.tensors[f"blk.{block}.attn_q.fq_{side}"] for side in "lr")
                folded = files.dual_rows(folded, left.astype(np.float64), right.astype(np.float64))
            model.tensors[f"blk.{block}.attn_{name}.weight"] = folded
    files.upgrade(model)
    model.ours["ggml_ext.site.online"] = [2, 1, 2, 1] * model.blocks
    model.ours["ggml_ext.site.folded"] = [1, 0, 0, 0] * model.blocks
    model.ours["ggml_ext.fold.sizes"] = [256, 0, 0, 0] * model.blocks
    model.ours["ggml_ext.fold.diagonals"] = d.tolist() * model.blocks
    return model


@pytest.fixture(scope="module")
def mixed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_v(llama).write(tmp_path_factory.mktemp("mixed") / "m.gguf")


def test_a_reader_that_only_the_fold_concerns(llama: Path, mixed: Path, tmp_path: Path) -> None:
    """The same function as before, and with adapters of every matrix."""
    shapes = folds.shapes_of(llama, folds.TARGETS)
    adapter = folds.write_adapter(tmp_path / "a.gguf", shapes)
    with folds.AdapterModel(llama) as a, folds.AdapterModel(mixed) as b:
        plain = a.log_probabilities()
        assert folds.divergence(plain, b.log_probabilities()) <= 1e-6
        adapted = a.log_probabilities([(adapter, 1.0)])
        assert folds.divergence(adapted, b.log_probabilities([(adapter, 1.0)])) <= 1e-6
        assert folds.divergence(plain, adapted) > 1e-3


def state_of(path: Path) -> bytes:
    with Model(path, threads=1) as model:
        model.start(n_ctx=64, n_seq=1, n_batch=32)
        positions = np.arange(8, dtype=np.int32)
        model.decode(positions, positions, np.zeros_like(positions), np.ones(8, bool))
        api = bindings()
        size = api.llama_state_seq_get_size(model._context, 0)
        data = (ctypes.c_uint8 * size)()
        assert api.llama_state_seq_get_data(model._context, data, size, 0) == size
        return bytes(data)


def digest_of(path: Path) -> int:
    """The number behind GGXT."""
    data = state_of(path)
    at = data.index(b"GGXT") + 4
    return int(struct.unpack_from("<Q", data, at)[0])


def fnv(*parts: bytes | str | int | NDArray[Any]) -> int:
    """FNV-1a of 64 bits. Texts and arrays have their length in front."""
    state = 0xCBF29CE484222325
    for part in parts:
        data = part
        if isinstance(part, str):
            data = struct.pack("<Q", len(part)) + part.encode()
        elif isinstance(part, np.ndarray):
            data = struct.pack("<Q", part.size) + part.tobytes()
        assert isinstance(data, bytes)
        for byte in data:
            state = ((state ^ byte) * 0x100000001B3) % 2**64
    return state


def test_states_of_version_1_stay_valid(llama: Path, tmp_path: Path) -> None:
    """The digest is that of the build that saved them: docs/gguf.md names its parts."""
    model = files.read(llama)
    model.tensors["blk.0.attn_q.fq_l"] = EYE
    model.ours = {
        "ggml_ext.version": 1,
        "ggml_ext.transform.name": "flatquant",
        "ggml_ext.transform.hadamard": [16, 0, 0, 0, 0, 0, 0, 512],
        "ggml_ext.transform.clip": [1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0],
        "ggml_ext.fold.sizes": [0, 0, 0, 512, 0, 0, 0, 0],
        "ggml_ext.fold.diagonals": [2.0] * 512,
        "ggml_ext.fold.orders": [0, 64],
        "ggml_ext.fold.heads": np.eye(64, dtype=np.float32).flatten().tolist(),
    }
    none, two, head = np.empty(0, np.float32), np.full(512, 2, np.float32), np.eye(64, dtype=np.float32)
    expected = fnv(
        "blk.0.attn_q.fq_l",
        EYE,
        "flatquant",
        np.array(model.ours["ggml_ext.transform.hadamard"], np.uint32),
        np.array(model.ours["ggml_ext.transform.clip"], np.float32),
        "a8",
        *(none, none, none, two, none),
        *(none, none, none, none, head),
    )
    assert digest_of(model.write(tmp_path / "m.gguf")) == expected


def test_the_digest_has_the_table(llama: Path, tmp_path: Path) -> None:
    def changed(**columns: Any) -> int:
        model = files.upgrade(folds.fold(files.read(llama), files.HEAD_DIM))
        model.ours |= {f"ggml_ext.site.{name}": value for name, value in columns.items()}
        return digest_of(model.write(tmp_path / "m.gguf"))

    same = changed()
    assert changed() == same
    assert changed(online=[2, 1, 2, 1] * 2, folded=[1, 0, 0, 0] * 2) != same
    assert changed(first=[0, 0, 0, 0] * 2) == same


Change = Callable[[files.Model], object]


def column(name: str, value: list[Any]) -> Change:
    return lambda model: model.ours.update({f"ggml_ext.{name}": value})


def no_key(name: str) -> Change:
    return lambda model: model.ours.pop(f"ggml_ext.{name}")


def element(name: str, index: int, value: Any) -> Change:
    def change(model: files.Model) -> None:
        values = list(model.ours[f"ggml_ext.{name}"])
        values[index] = value
        model.ours[f"ggml_ext.{name}"] = values

    return change


def both(*changes: Change) -> Change:
    return lambda model: [change(model) for change in changes]


def put(name: str, value: NDArray[Any]) -> Change:
    return lambda model: model.tensors.update({name: value})


def version_1(model: files.Model) -> None:
    model.ours["ggml_ext.version"] = 1


# What is done to a sound file of version 2, what the loader says of it, and whether the keys alone show it.
MALFORMED: dict[str, tuple[Change, str, bool]] = {
    "version 1": (version_1, "key 'ggml_ext.site.readers' is one of version 2", True),
    "no readers": (no_key("site.readers"), "key 'ggml_ext.site.readers' is missing", True),
    "no makers": (no_key("site.makers"), "key 'ggml_ext.site.makers' is missing", True),
    "fewer makers": (column("site.makers", [""]), "key 'ggml_ext.site.makers' has 1 elements", True),
    "fewer readers": (
        column("site.readers", ["blk.0.attn_q.weight"]),
        "key 'ggml_ext.site.readers' has 1 elements, 'ggml_ext.site.online' and",
        True,
    ),
    "nothing reads": (
        both(
            element("site.online", 1, 0),
            lambda model: model.ours["ggml_ext.site.readers"].remove("blk.0.attn_output.weight"),
        ),
        "key 'ggml_ext.site.online' element 1 is 0",
        True,
    ),
    "a reader twice": (
        element("site.readers", 1, "blk.0.attn_q.weight"),
        "key 'ggml_ext.site.readers' names 'blk.0.attn_q.weight' twice",
        True,
    ),
    "another reader's rows": (
        element("site.readers", 1, "blk.0.attn_qk.weight"),
        "key 'ggml_ext.site.readers' names 'blk.0.attn_qk.weight', but the file lacks it",
        False,
    ),
    "rows of another length": (
        both(
            element("site.readers", 1, "blk.0.ffn_down.weight"),
            element("site.readers", 6, "blk.0.attn_k.weight"),
        ),
        "key 'ggml_ext.site.readers' names 'blk.0.ffn_down.weight', whose rows have length 512, not 256",
        False,
    ),
    "outside of blocks": (
        element("site.readers", 0, "output.weight"),
        "key 'ggml_ext.site.readers' names 'output.weight', which is of no block",
        False,
    ),
    "no such block": (
        element("site.readers", 0, "blk.2.attn_q.weight"),
        "key 'ggml_ext.site.readers' names 'blk.2.attn_q.weight', which is of no block",
        False,
    ),
    "nobody online": (
        both(element("site.online", 0, 0), element("site.folded", 0, 3)),
        "tensor 'blk.0.attn_q.fq_l' has a transform that runs with the model, but no matrix that reads it",
        False,
    ),
    "no such maker": (
        element("site.makers", 1, "blk.0.attn_w.weight"),
        "key 'ggml_ext.site.makers' speaks of what 'blk.0.attn_output.weight' reads: the file lacks",
        False,
    ),
    "rows of no matrix": (
        element("site.rows", 0, 256),
        "key 'ggml_ext.site.makers' speaks of what 'blk.0.attn_q.weight' reads: rows of no matrix",
        False,
    ),
    "rows behind the end": (
        element("site.first", 3, 1),
        "key 'ggml_ext.site.makers' speaks of what 'blk.0.ffn_down.weight' reads: rows 1 to 513",
        False,
    ),
    "too few rows": (
        element("site.rows", 3, 256),
        "key 'ggml_ext.site.makers' speaks of what 'blk.0.ffn_down.weight' reads: 256 rows for 512 channels",
        False,
    ),
    "heads that do not fit": (
        element("site.head", 1, 48),
        "key 'ggml_ext.site.makers' speaks of what 'blk.0.attn_output.weight' reads: 128 rows in heads of 48",
        False,
    ),
    "not an anchor": (
        put("blk.0.attn_k.fq_l", EYE),
        "tensor 'blk.0.attn_k.fq_l' is a transform of no site",
        False,
    ),
    "fewer sizes": (
        both(column("fold.sizes", [256]), column("fold.diagonals", [2.0] * 256)),
        "key 'ggml_ext.fold.sizes' has 1 elements, not one for each of the 8 sites",
        True,
    ),
    "clip of another length": (
        column("transform.clip", [1.0] * 9),
        "key 'ggml_ext.transform.clip' has 9 elements, not one for each of the 8 sites",
        True,
    ),
    "a matrix before no head": (
        both(column("fold.orders", [64, *[0] * 7]), column("fold.heads", [0.5] * 4096)),
        "key 'ggml_ext.fold.orders' speaks of what 'blk.0.attn_q.weight' reads: its attention has no values",
        False,
    ),
    "a matrix of another order": (
        both(column("fold.orders", [0, 16, *[0] * 6]), column("fold.heads", [0.5] * 256)),
        "key 'ggml_ext.fold.orders' speaks of what 'blk.0.attn_output.weight' reads: a matrix of order 16",
        False,
    ),
    "a diagonal of query heads": (
        both(
            column("fold.sizes", [0, 256, *[0] * 6]),
            column("fold.diagonals", [2.0] * 64 + [3.0] * 192),
        ),
        "key 'ggml_ext.fold.diagonals' speaks of what 'blk.0.attn_output.weight' reads: a diagonal that",
        False,
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_table_is_refused_by_name(
    case: str, llama: Path, patched_lib_dir: Path, tmp_path: Path
) -> None:
    change, message, by_keys = MALFORMED[case]
    model = files.upgrade(files.transform(files.read(llama)))
    change(model)
    path = model.write(tmp_path / "t.gguf")
    result = run(patched_lib_dir, path, tmp_path / "out.npy")
    assert result.returncode == 1
    assert "error loading model: ggml-ext: " in result.stderr
    assert message in result.stderr
    if by_keys:
        with pytest.raises(GgmlExtError, match=message.split("'")[1]):
            validate_keys(read_header(path))
    else:
        validate_keys(read_header(path))


def test_a_table_of_no_sites(llama: Path, patched_lib_dir: Path, tmp_path: Path) -> None:
    """Where the graph has no place for a transform, nothing was folded, and adapters fit as they are."""
    header, path = read_header(llama), tmp_path / "m.gguf"
    texts, integers = ("readers", "makers"), ("online", "folded", "first", "rows", "head")
    keys = dict(header.keys)
    keys["ggml_ext.version"] = uint32_key("ggml_ext.version", 2)
    keys["ggml_ext.transform.name"] = string_key("ggml_ext.transform.name", "awq")
    for write, names in ((string_array_key, texts), (uint32_array_key, integers)):
        keys |= {f"ggml_ext.site.{name}": write(f"ggml_ext.site.{name}", []) for name in names}
    out = [
        OutTensor(described.name, tensor.dims, described.type_id, tensor.n_bytes)
        for described, tensor in zip(header.tensors, open_gguf(llama).tensors, strict=True)
    ]
    with path.open("wb") as file:
        write_header(file, keys, out, header.alignment)
        file.write(llama.read_bytes()[header.data :])
    validate_keys(read_header(path))
    adapter = folds.write_adapter(tmp_path / "a.gguf", folds.shapes_of(llama, folds.TARGETS))
    found = []
    for source in (llama, path):
        result = run(patched_lib_dir, source, tmp_path / "out.npy", "--lora", str(adapter))
        assert result.returncode == 0, result.stderr[-2000:]
        found.append(np.load(tmp_path / "out.npy"))
    assert np.array_equal(*found)
