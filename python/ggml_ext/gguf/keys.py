"""The keys under ``ggml_ext.``: names, types, and the values that they may have.

The rules are the patched loader's (ggml_ext/transform/metadata.cpp); docs/gguf.md specifies them.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
from gguf import GGUFValueType

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.registry import TRANSFORMS
from ggml_ext.gguf.header import Header
from ggml_ext.gguf.header import value as header_value

FORMAT_VERSION = 2
PREFIX = "ggml_ext."


@dataclass(frozen=True)
class Key:
    """A key of the format: its value's type and what it says. ``element``: type of an array's elements."""

    type: GGUFValueType
    meaning: str
    element: GGUFValueType | None = None

    @property
    def type_name(self) -> str:
        """As in "UINT32" or "ARRAY of FLOAT32"."""
        return self.type.name if self.element is None else f"{self.type.name} of {self.element.name}"


def _texts(meaning: str) -> Key:
    return Key(GGUFValueType.ARRAY, meaning, GGUFValueType.STRING)


def _integers(meaning: str) -> Key:
    return Key(GGUFValueType.ARRAY, meaning, GGUFValueType.UINT32)


def _floats(meaning: str) -> Key:
    return Key(GGUFValueType.ARRAY, meaning, GGUFValueType.FLOAT32)


KEYS: Mapping[str, Key] = {
    "ggml_ext.version": Key(
        GGUFValueType.UINT32,
        "Version of this extension, from 1. Present whenever another key under ggml_ext. is. "
        "A reader refuses a version above its own.",
    ),
    "ggml_ext.rounding": Key(
        GGUFValueType.STRING,
        'How weights were rounded: "rtn" (nearest), "imatrix" (nearest, weighted by an importance matrix), '
        '"gptq"; "learned" in files of earlier builds.',
    ),
    "ggml_ext.transform.name": Key(
        GGUFValueType.STRING,
        "Transform of the activations that the weights expect: one of registry.TRANSFORMS. A reader refuses "
        "others.",
    ),
    "ggml_ext.site.readers": _texts(
        "Tensors that read each site, one site after the other: first those that read what is transformed "
        "online, the first of all being the site's anchor."
    ),
    "ggml_ext.site.online": _integers("Per site how many of its readers read what is transformed online."),
    "ggml_ext.site.folded": _integers("Per site how many of its readers only what was folded concerns."),
    "ggml_ext.site.makers": _texts("Per site the matrix whose rows make its channels, or an empty string."),
    "ggml_ext.site.first": _integers("Per site the first of these rows."),
    "ggml_ext.site.rows": _integers("Per site how many they are."),
    "ggml_ext.site.head": _integers(
        "Per site the size of a value head where attention hands these rows on, or 0."
    ),
    "ggml_ext.transform.hadamard": _integers(
        "Per site the order of a Walsh-Hadamard matrix in the place of the right factor: powers of two, 0 "
        "or 1 for none. Version 1 has four sites per block: attn_in, attn_out, ffn_in, ffn_mid."
    ),
    "ggml_ext.transform.clip": _floats(
        "Per site a factor in (0, 1]: a token's transformed activations are clamped to that factor times "
        "the largest of their magnitudes."
    ),
    "ggml_ext.fold.sizes": _integers(
        "Per site the length of the diagonal that the transform folded into the weights, 0 for none. "
        "Absent in version 1: not recorded, so LoRA adapters are refused."
    ),
    "ggml_ext.fold.diagonals": _floats(
        "These diagonals, one after the other: the site's channels were divided by them."
    ),
    "ggml_ext.fold.orders": _integers(
        "Per site (version 1: per block) the order of the matrix that mixes the channels of each value head, "
        "0 for none."
    ),
    "ggml_ext.fold.heads": _floats("These matrices, row after row: v became v times it."),
    "ggml_ext.activation.bits": Key(
        GGUFValueType.UINT32,
        "Bits of the activations that quantised weights are multiplied with: 8 (llama.cpp's own) or 4.",
    ),
    "ggml_ext.activation.group": Key(
        GGUFValueType.UINT32, "Activations that share a scale with 4 bits: 32, 256, or 0 for a whole token."
    ),
    "ggml_ext.calibration.hash": Key(
        GGUFValueType.STRING, "SHA-256 of the calibration text's bytes, 64 lower-case hexadecimal digits."
    ),
    "ggml_ext.calibration.samples": Key(GGUFValueType.UINT32, "Token sequences taken from the text."),
    "ggml_ext.calibration.length": Key(GGUFValueType.UINT32, "Tokens per sequence."),
    "ggml_ext.calibration.seed": Key(GGUFValueType.UINT32, "Seed of the choice of sequences."),
    "ggml_ext.error.tensors": _texts("Names of the tensors that ggml_ext.error.values is about."),
    "ggml_ext.error.values": _floats("Relative squared error of each, as ggml_ext.error.kind says."),
    "ggml_ext.error.kind": Key(
        GGUFValueType.STRING,
        'Of what: "output" (of the products, on the calibration text) or "weight".',
    ),
    "ggml_ext.loss.tensors": _texts("Names of the tensors whose types were chosen by what they cost."),
    "ggml_ext.loss.types": _texts("Names of the types that were compared."),
    "ggml_ext.loss.values": _floats(
        "Per tensor and type the KL divergence, in nats per token, that plain rounding of this tensor alone "
        "adds; -1 where the tensor cannot have the type."
    ),
}

_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "ggml_ext.activation.bits": (8, 4),
    "ggml_ext.activation.group": (0, 32, 256),
    "ggml_ext.error.kind": ("output", "weight"),
}


def check_values(values: Mapping[str, Any], n_blocks: int | None) -> None:
    """Raises GgmlExtError, naming the key, for a value that the loader refuses. ``values``: all of the right
    type. ``n_blocks``: of the model, None where that is unknown."""
    transform = values.get("ggml_ext.transform.name", "none")
    if transform not in TRANSFORMS:
        raise GgmlExtError(
            f"key ggml_ext.transform.name is '{transform}', this version knows only {', '.join(TRANSFORMS)}; "
            "a newer ggml-ext may read the file"
        )
    version = values.get("ggml_ext.version", 1)
    _check_sites(values, version)
    _check_lengths(values, n_blocks)
    for i, order in enumerate(values.get("ggml_ext.transform.hadamard", ())):
        element = f"key ggml_ext.transform.hadamard element {i} is {order}"
        if order & (order - 1):
            raise GgmlExtError(f"{element}, not 0 or a power of two; convert the model again")
        if order > 1 and not TRANSFORMS[transform].online:
            raise GgmlExtError(
                f"{element}, but the transform '{transform}' has no online part; convert the model again"
            )
    for i, clip in enumerate(values.get("ggml_ext.transform.clip", ())):
        if not 0 < clip <= 1:
            raise GgmlExtError(
                f"key ggml_ext.transform.clip element {i} is {clip}, not in (0, 1]; convert the model again"
            )
    _check_folds(values, transform, version)
    for name, allowed in _CHOICES.items():
        if name in values and values[name] not in allowed:
            raise GgmlExtError(
                f"key {name} is {values[name]}, not one of {', '.join(map(str, allowed))}; "
                "convert the model again"
            )
    _check_errors(values)
    _check_losses(values)


def _check_sites(values: Mapping[str, Any], version: int) -> None:
    """The table of sites, which version 2 has, whole."""
    names = [name for name in KEYS if name.startswith("ggml_ext.site.")]
    found = [name for name in names if name in values]
    if version == 1 and found:
        raise GgmlExtError(f"key {found[0]} is one of version 2, the file has version 1; convert it again")
    if version == 1:
        return
    if len(found) < len(names):
        (missing, *_) = [name for name in names if name not in values]
        raise GgmlExtError(f"key {missing} is missing from a file of version 2; convert the model again")
    readers, online, folded = (values[name] for name in names[:3])
    for name in names[2:]:
        if len(values[name]) != len(online):
            raise GgmlExtError(
                f"key {name} has {len(values[name])} elements, {names[1]} has {len(online)}; "
                "convert the model again"
            )
    counts = [sum(pair) for pair in zip(online, folded, strict=True)]
    if 0 in counts:
        raise GgmlExtError(
            f"key {names[1]} element {counts.index(0)} is 0, {names[2]} too; convert the model again"
        )
    if len(readers) != sum(counts):
        raise GgmlExtError(
            f"key {names[0]} has {len(readers)} elements, {sum(counts)} are announced; "
            "convert the model again"
        )
    twice = [name for name, times in Counter(readers).items() if times > 1]
    if twice:
        raise GgmlExtError(f"key {names[0]} names {twice[0]} twice; convert the model again")


def _check_lengths(values: Mapping[str, Any], n_blocks: int | None) -> None:
    n_sites = len(values["ggml_ext.site.online"]) if values.get("ggml_ext.version", 1) > 1 else None
    if n_sites is None and n_blocks is None:
        return
    for name, each, words in (
        ("ggml_ext.transform.hadamard", 4, "four"),
        ("ggml_ext.transform.clip", 4, "four"),
        ("ggml_ext.fold.sizes", 4, "four"),
        ("ggml_ext.fold.orders", 1, "one"),
    ):
        length = len(values.get(name, ()))
        wanted = each * (n_blocks or 0) if n_sites is None else n_sites
        each_of = (
            f"{words} for each of the {n_blocks} blocks"
            if n_sites is None
            else f"one for each of {n_sites} sites"
        )
        if length and length != wanted:
            raise GgmlExtError(f"key {name} has {length} elements, not {each_of}; convert the model again")


def _check_folds(values: Mapping[str, Any], transform: str, version: int) -> None:
    present = [name for name in KEYS if name.startswith("ggml_ext.fold.") and name in values]
    if present and "ggml_ext.fold.sizes" not in values and version == 1:
        raise GgmlExtError(f"key ggml_ext.fold.sizes is missing beside {present[0]}; convert the model again")
    if present and transform == "none":
        raise GgmlExtError(
            f"key {present[0]} says what a transform folded, but the transform is 'none'; "
            "convert the model again"
        )
    sizes, orders = (values.get(f"ggml_ext.fold.{name}", ()) for name in ("sizes", "orders"))
    for name, length in (
        ("ggml_ext.fold.diagonals", sum(sizes)),
        ("ggml_ext.fold.heads", sum(order * order for order in orders)),
    ):
        numbers = values.get(name, ())
        if len(numbers) != length:
            raise GgmlExtError(
                f"key {name} has {len(numbers)} elements, {length} are announced; convert the model again"
            )
        for i, number in enumerate(numbers):
            if not math.isfinite(number) or (name.endswith("diagonals") and not _invertible(number)):
                raise GgmlExtError(f"key {name} element {i} is {number}; convert the model again")


def _invertible(number: float) -> bool:
    """Whether float32 has the number's inverse with all its digits."""
    return number != 0 and 2.0**-126 <= abs(1 / number) < 2.0**128


def _check_errors(values: Mapping[str, Any]) -> None:
    names = [f"ggml_ext.error.{part}" for part in ("tensors", "values", "kind")]
    present = [name for name in names if name in values]
    if present and len(present) < len(names):
        (missing, *_) = [name for name in names if name not in values]
        raise GgmlExtError(f"key {missing} is missing beside {present[0]}; convert the model again")
    if present and len(values[names[0]]) != len(values[names[1]]):
        raise GgmlExtError(
            f"key {names[1]} has {len(values[names[1]])} elements, {names[0]} has {len(values[names[0]])}; "
            "convert the model again"
        )


def _check_losses(values: Mapping[str, Any]) -> None:
    names = [f"ggml_ext.loss.{part}" for part in ("tensors", "types", "values")]
    present = [name for name in names if name in values]
    if not present:
        return
    if len(present) < len(names):
        (missing, *_) = [name for name in names if name not in values]
        raise GgmlExtError(f"key {missing} is missing beside {present[0]}; convert the model again")
    tensors, types, losses = (values[name] for name in names)
    if len(losses) != len(tensors) * len(types):
        raise GgmlExtError(
            f"key {names[2]} has {len(losses)} elements, not one for each of {len(tensors)} tensors and "
            f"{len(types)} types; convert the model again"
        )


def typed_keys(source: gguf.GGUFReader | Header) -> dict[str, str]:
    """The keys under ggml_ext.: name -> name of the value's type, as Key.type_name."""
    if isinstance(source, Header):
        found = {name: _header_types(entry) for name, entry in source.keys.items()}
    else:
        found = {name: list(field.types[:2]) for name, field in source.fields.items() if field.types}
    return {
        name: " of ".join(type_.name for type_ in types)
        for name, types in found.items()
        if name.startswith(PREFIX)
    }


def value_of(source: gguf.GGUFReader | Header, name: str) -> Any:
    """The value of a key, None where the file lacks it."""
    if isinstance(source, Header):
        return header_value(source.keys[name]) if name in source.keys else None
    return source.fields[name].contents() if name in source.fields else None


def _header_types(entry: bytes) -> list[GGUFValueType]:
    (length,) = struct.unpack_from("<Q", entry)
    type_, inner = struct.unpack_from("<II", entry + bytes(4), 8 + length)
    types = [GGUFValueType(type_)]
    return [*types, GGUFValueType(inner)] if types[0] == GGUFValueType.ARRAY else types
