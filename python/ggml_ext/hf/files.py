"""The files of a Hugging Face folder: JSON, safetensors headers and the list of weight files.

They come from strangers. Whatever they hold, the answer is a value that was checked or one GgmlExtError.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggml_ext.core.errors import GgmlExtError

MAX_HEADER = 100 * 1024 * 1024  # safetensors' own limit
_MAX_DIM = 2**48  # of a shape; keeps products of shapes that are nonsense small

# Bits of a value by safetensors' name of its type (safetensors/src/tensor.rs, Dtype).
DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}

# Weight files and their index, in the order in which llama.cpp's converter looks for them.
_KINDS = (("model", ".safetensors"), ("pytorch_model", ".bin"))

SMALL = (
    *("*config*.json", "*.index.json", "params.json", "modules.json"),
    *("tokenizer*", "tekken.json", "special_tokens_map.json", "added_tokens.json", "*vocab*", "merges*"),
    *("*.model", "*.tiktoken", "chat_template*", "*.jinja", "*.py", "README.md", "mask_embedding.pt"),
)
"""What llama.cpp's converter reads of a folder beside the weights, and transformers for the tokens of a text.
JSON goes by name: the figures of our commands may lie there too."""

SMALL_IN_FOLDERS = (
    "additional_chat_templates/*.jinja",
    "[0-9]_*/config.json",
    "[0-9]_Dense/model.safetensors",
)
"""The same in folders within it; those with a number are the modules of sentence-transformers."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file. ``start``, ``end``: where its data lies in the file, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        return sum(1 for n in self.shape if n > 1) >= 2


def shown(text: str, most: int = 120) -> str:
    """A name or line of a stranger's as it may stand in a message: printable, ``most`` characters."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def read_json(path: Path, *, unique: bool = False) -> Any:
    """Content of a JSON file. unique: refuse a key that occurs twice. Raises GgmlExtError."""
    try:
        return _parse(path.read_bytes(), unique=unique)
    except OSError as exc:
        raise GgmlExtError(f"{path}: {exc.strerror}; check its permissions") from exc
    except (ValueError, RecursionError) as exc:
        raise GgmlExtError(f"{path}: not valid JSON ({exc}); download the file again") from exc


def _parse(text: bytes, *, unique: bool) -> Any:
    """Raises ValueError (for a wrong encoding and wrong JSON too) and RecursionError."""
    return json.loads(text.decode("utf-8"), object_pairs_hook=_no_key_twice if unique else None)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"key {shown(twice)} occurs twice")
    return found


def read_object(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """The same for a file whose content is an object."""
    content = read_json(path, unique=unique)
    if not isinstance(content, dict):
        raise GgmlExtError(f"{path}: not a JSON object; download the file again")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder. Raises GgmlExtError if it is missing or no object."""
    path = folder / "config.json"
    if not path.is_file():
        raise GgmlExtError(
            f"{folder}: no config.json; give a Hugging Face model directory (config.json, safetensors, "
            "tokenizer) or a GGUF file"
        )
    return read_object(path)


def safetensors_header(path: Path) -> dict[str, Entry]:
    """Tensor name -> where it lies, of a safetensors file.

    Layout: uint64 header length, JSON header, data. Raises GgmlExtError for a file that is cut off and for a
    header that is no description of tensors that lie one after the other within the file.
    """
    content, data, size = _read_header(path)
    header = {}
    for name, described in content.items():
        if name == "__metadata__":
            continue
        try:
            header[name] = _entry(name, described, data)
        except ValueError as exc:
            raise GgmlExtError(f"{path}: damaged header, {exc}; download it again") from exc
    end = max((entry.end for entry in header.values()), default=data)
    if size < end:
        raise GgmlExtError(f"{path}: cut off ({size} bytes of {end}); download it again")
    _check_overlap(path, header)
    return header


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header as it stands there, where the data begins, and the size of the file."""
    problem = "not a safetensors file, or cut off"
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER + 1
            if length <= min(MAX_HEADER, size - 8):
                content = _parse(file.read(length), unique=True)
                if isinstance(content, dict):
                    return content, 8 + length, size
    except OSError as exc:
        raise GgmlExtError(f"{path}: {exc.strerror}; check its permissions") from exc
    except (ValueError, RecursionError) as exc:
        problem = f"{problem} (its header is no JSON: {exc})"
    raise GgmlExtError(f"{path}: {problem}; download it again")


def _entry(name: str, described: Any, data: int) -> Entry:
    """Raises ValueError saying what is wrong."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise ValueError(f"the name {shown(name)} is no text") from exc
    if not isinstance(described, dict):
        raise ValueError(f"{shown(name)} is no object")
    dtype, shape, offsets = (described.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{shown(name)} has the unknown type {shown(str(dtype))}")
    if not (isinstance(shape, list) and all(_is_count(n, _MAX_DIM) for n in shape) and len(shape) <= 16):
        raise ValueError(f"{shown(name)} has no shape of whole numbers")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(_is_count(n, 2**62) for n in offsets)):
        raise ValueError(f"{shown(name)} has no data_offsets of two whole numbers")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(
            f"{shown(name)} of type {dtype} and shape {shape} takes {bits // 8} bytes, not "
            f"{offsets[1] - offsets[0]}"
        )
    return Entry(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _check_overlap(path: Path, header: Mapping[str, Entry]) -> None:
    before, end = "", 0
    for name, entry in sorted(header.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start < end and entry.end > entry.start:
            raise GgmlExtError(
                f"{path}: damaged header, {shown(before)} and {shown(name)} lie over each other; "
                "download it again"
            )
        if entry.end > end:
            before, end = name, entry.end


def weight_files(folder: Path) -> list[Path]:
    """The files with the model's weights, which llama.cpp's converter will read, all of them there.

    That is what the index of the safetensors files names, without one all of them, and pickled weights only
    where there are neither. Raises GgmlExtError for no weights, a missing shard and a damaged index.
    """
    for stem, suffix in _KINDS:
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            return _indexed(index, folder / f"{stem}{suffix}")
        found = sorted(path for path in folder.glob(f"{stem}*{suffix}") if path.is_file())
        if found:
            return found
    raise GgmlExtError(f"{folder}: holds no weights (model.safetensors); download them")


def _indexed(index: Path, whole: Path) -> list[Path]:
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if not name.endswith(whole.suffix):
            raise GgmlExtError(f"{index}: names {shown(name)}, no {whole.suffix} file; download it again")
        if (index.parent / name).is_file():
            continue
        if whole.is_file() and whole.name not in names:
            raise GgmlExtError(
                f"{index}: names {shown(name)}, which is missing, but {whole.name} is here; delete the index "
                "if that file is the whole model, else download the shards"
            )
        raise GgmlExtError(
            f"{index.parent / shown(name)}: missing, {index.name} names it; download this shard"
        )
    return [index.parent / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file of an index, all files within its folder."""
    found = read_object(index, unique=True).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise GgmlExtError(f"{index}: has no weight_map; download the file again")
    for name in found.values():
        plain = isinstance(name, str) and len(name) < 256 and not any(c in name for c in "/\\\0")
        if not plain or name in ("", ".", ".."):
            raise GgmlExtError(
                f"{index}: its weight_map names {shown(str(name))}, which is no file of the folder; "
                "download the index again"
            )
    return found


def check_weights(weights: Iterable[Path]) -> dict[Path, dict[str, Entry]]:
    """The headers of those files that are safetensors files.

    Raises GgmlExtError for a damaged one, for a tensor in two files and for one that the index does not have
    where it is.
    """
    headers = {path: safetensors_header(path) for path in weights if path.suffix == ".safetensors"}
    where: dict[str, Path] = {}
    for path, header in headers.items():
        for name in header:
            if name in where:
                raise GgmlExtError(
                    f"{path}: holds {shown(name)}, and so does {where[name].name}; move the file that is not "
                    "part of the model elsewhere"
                )
            where[name] = path
    if where:
        _check_index(next(iter(headers)).parent / "model.safetensors.index.json", where)
    return headers


def _check_index(index: Path, where: Mapping[str, Path]) -> None:
    if not index.is_file():
        return
    named = _weight_map(index)
    for names, others, what in ((named, where, "names"), (where, named, "does not name")):
        odd = sorted(set(names) - set(others))
        if odd:
            raise GgmlExtError(
                f"{index}: {what} {shown(odd[0])}, unlike the shards; download the index and the shards again"
            )
