"""The keys under ``ggml_ext.``: names, types, and the values that they may have.

The rules are the patched loader's (ggml_ext/llama/metadata.cpp and transform-load.cpp); docs/gguf.md
specifies them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
from gguf import GGUFValueType

from ggml_ext.errors import GgmlExtError
from ggml_ext.header import Header
from ggml_ext.header import value as header_value

FORMAT_VERSION = 1
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


KEYS: Mapping[str, Key] = {
    "ggml_ext.version": Key(
        GGUFValueType.UINT32,
        "Version of this extension, from 1. Present whenever another key under ggml_ext. is. "
        "A reader refuses a version above its own.",
    ),
    "ggml_ext.rounding": Key(
        GGUFValueType.STRING,
        'How weights were rounded: "rtn" (nearest), "imatrix" (nearest, weighted by an importance matrix), '
        '"gptq" or "learned".',
    ),
    "ggml_ext.transform.name": Key(
        GGUFValueType.STRING,
        "Transform of the activations that the weights expect: one of TRANSFORMS. A reader refuses others.",
    ),
    "ggml_ext.transform.hadamard": Key(
        GGUFValueType.ARRAY,
        "Per block four orders (attn_in, attn_out, ffn_in, ffn_mid) of Walsh-Hadamard matrices in the place "
        "of the right factor: powers of two, 0 or 1 for none.",
        GGUFValueType.UINT32,
    ),
    "ggml_ext.transform.clip": Key(
        GGUFValueType.ARRAY,
        "Per block four factors in (0, 1]: a token's transformed activations are clamped to that factor "
        "times the largest of their magnitudes.",
        GGUFValueType.FLOAT32,
    ),
    "ggml_ext.activation.bits": Key(
        GGUFValueType.UINT32, "Bits of activations that meet quantised weights: 8 (llama.cpp's own) or 4."
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
    "ggml_ext.error.tensors": Key(
        GGUFValueType.ARRAY, "Names of the tensors that ggml_ext.error.values is about.", GGUFValueType.STRING
    ),
    "ggml_ext.error.values": Key(
        GGUFValueType.ARRAY,
        "Relative squared error of each, as ggml_ext.error.kind says.",
        GGUFValueType.FLOAT32,
    ),
    "ggml_ext.error.kind": Key(
        GGUFValueType.STRING,
        'Of what: "output" (of the products, on the calibration text) or "weight".',
    ),
}

ONLINE_TRANSFORMS = ("hadamard", "flatquant")
TRANSFORMS = ("none", "smoothquant", "awq", *ONLINE_TRANSFORMS)
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
    _check_per_block(values, n_blocks)
    for i, order in enumerate(values.get("ggml_ext.transform.hadamard", ())):
        element = f"key ggml_ext.transform.hadamard element {i} is {order}"
        if order & (order - 1):
            raise GgmlExtError(f"{element}, not 0 or a power of two; convert the model again")
        if order > 1 and transform not in ONLINE_TRANSFORMS:
            raise GgmlExtError(
                f"{element}, but the transform '{transform}' has no online part; convert the model again"
            )
    for i, clip in enumerate(values.get("ggml_ext.transform.clip", ())):
        if not 0 < clip <= 1:
            raise GgmlExtError(
                f"key ggml_ext.transform.clip element {i} is {clip}, not in (0, 1]; convert the model again"
            )
    for name, allowed in _CHOICES.items():
        if name in values and values[name] not in allowed:
            raise GgmlExtError(
                f"key {name} is {values[name]}, not one of {', '.join(map(str, allowed))}; "
                "convert the model again"
            )
    _check_errors(values)


def _check_per_block(values: Mapping[str, Any], n_blocks: int | None) -> None:
    for name in ("ggml_ext.transform.hadamard", "ggml_ext.transform.clip"):
        length = len(values.get(name, ()))
        if length and n_blocks is not None and length != 4 * n_blocks:
            raise GgmlExtError(
                f"key {name} has {length} elements, not four for each of the {n_blocks} blocks; "
                "convert the model again"
            )


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
