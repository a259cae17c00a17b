"""The extension of GGUF: tensor type FQ4 for the ``gguf`` package, and the keys under ``ggml_ext.``.

Importing this module makes gguf.GGUFReader and gguf.GGUFWriter handle FQ4 tensors (as uint8 arrays whose last
dimension is bytes, as for gguf's own quantised types). docs/gguf.md specifies the format; ggml_ext.fq4 is the
type in plain numpy. The rules for keys are the patched loader's (ggml_ext/llama/metadata.cpp).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import gguf
from gguf import GGUFValueType

from ggml_ext import fq4
from ggml_ext.errors import GgmlExtError
from ggml_ext.fq4 import dequantize, dot_q8_k, quantize, quantize_blocks
from ggml_ext.header import Header
from ggml_ext.header import value as header_value

__all__ = [
    "FORMAT_VERSION",
    "FQ4",
    "KEYS",
    "PREFIX",
    "Calibration",
    "ExtMetadata",
    "add_ext_keys",
    "dequantize",
    "dot_q8_k",
    "quantize",
    "quantize_blocks",
    "read_ext",
    "validate_keys",
]

FORMAT_VERSION = 1
PREFIX = "ggml_ext."

_FQ4_ID = 200


@dataclass(frozen=True)
class Key:
    """A key of the format: its value's type and what it says."""

    type: GGUFValueType
    meaning: str
    element: GGUFValueType | None = None  # of an array


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
        "Per block four factors in (0, 1] on a token's largest transformed activation, at which it is cut off.",
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
        GGUFValueType.ARRAY, "Relative squared error of each, as ggml_ext.error.kind says.", GGUFValueType.FLOAT32
    ),
    "ggml_ext.error.kind": Key(
        GGUFValueType.STRING,
        'Of what: "output" (of the products, on the calibration text) or "weight".',
    ),
}

ONLINE_TRANSFORMS = ("hadamard", "flatquant")
TRANSFORMS = ("none", "smoothquant", "awq", *ONLINE_TRANSFORMS)
_ERROR_KINDS = ("output", "weight")


@dataclass(frozen=True)
class Calibration:
    """What importances were computed from. hash: SHA-256 of the text, hexadecimal; length in tokens."""

    hash: str | None = None
    samples: int | None = None
    length: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class ExtMetadata:
    """The keys under ggml_ext. of one file; None where the file lacks the key."""

    rounding: str | None = None
    transform: str | None = None
    calibration: Calibration | None = None
    version: int = FORMAT_VERSION


def _register() -> gguf.GGMLQuantizationType:
    """Adds the member FQ4 to gguf's enumeration, which as a closed IntEnum offers no other way."""
    types = gguf.GGMLQuantizationType
    if "FQ4" not in types.__members__:
        member = int.__new__(types, _FQ4_ID)
        member._name_ = "FQ4"
        member._value_ = _FQ4_ID
        types._member_names_.append("FQ4")
        types._member_map_["FQ4"] = member
        types._value2member_map_[_FQ4_ID] = member
    gguf.GGML_QUANT_SIZES[types(_FQ4_ID)] = (fq4.BLOCK, fq4.BLOCK_BYTES)
    return types(_FQ4_ID)


FQ4 = _register()


def validate_keys(source: gguf.GGUFReader | Header) -> None:
    """Raises GgmlExtError, naming the key, for what the patched loader refuses under ggml_ext.: an unknown
    key, a value of another type, a missing or newer version, a transform other than "none"."""
    keys = _typed_keys(source)
    for name, (type_, _) in keys.items():
        known = KEYS.get(name)
        if known is None:
            raise GgmlExtError(f"key {name} is not known to this version; a newer ggml-ext may read the file")
        if type_ != known.type:
            raise GgmlExtError(
                f"key {name} must be of type {known.type.name}, is {type_.name}; convert the model again"
            )
    if not keys:
        return
    if "ggml_ext.version" not in keys:
        raise GgmlExtError(
            "key ggml_ext.version is missing beside other ggml_ext. keys; convert the model again"
        )
    version = keys["ggml_ext.version"][1]
    if not 1 <= version <= FORMAT_VERSION:
        raise GgmlExtError(
            f"key ggml_ext.version is {version}, this version reads 1 to {FORMAT_VERSION}; "
            "a newer ggml-ext may read the file"
        )
    transform = keys.get("ggml_ext.transform.name")
    if transform is not None and transform[1] != "none":
        raise GgmlExtError(
            f"key ggml_ext.transform.name is '{transform[1]}', this version knows only 'none'; "
            "a newer ggml-ext may read the file"
        )


def read_ext(source: gguf.GGUFReader | Header) -> ExtMetadata | None:
    """The keys under ggml_ext., None for a file without any. Raises GgmlExtError as validate_keys does."""
    validate_keys(source)
    keys = {name: value for name, (_, value) in _typed_keys(source).items()}
    if not keys:
        return None
    prefix = "ggml_ext.calibration."
    calibration = {name.removeprefix(prefix): keys[name] for name in keys if name.startswith(prefix)}
    return ExtMetadata(
        rounding=keys.get("ggml_ext.rounding"),
        transform=keys.get("ggml_ext.transform.name"),
        calibration=Calibration(**calibration) if calibration else None,
        version=keys["ggml_ext.version"],
    )


def add_ext_keys(writer: gguf.GGUFWriter, meta: ExtMetadata) -> None:
    """Adds the keys that ``meta`` has values for."""
    values = {
        "ggml_ext.version": meta.version,
        "ggml_ext.rounding": meta.rounding,
        "ggml_ext.transform.name": meta.transform,
    }
    if meta.calibration is not None:
        for field in fields(meta.calibration):
            values[f"ggml_ext.calibration.{field.name}"] = getattr(meta.calibration, field.name)
    for name, value in values.items():
        if value is not None:
            writer.add_key_value(name, value, KEYS[name].type)


def _typed_keys(source: gguf.GGUFReader | Header) -> dict[str, tuple[GGUFValueType, Any]]:
    """The keys under ggml_ext.: name -> type and value, which is None for a wrong type or unknown key."""
    if isinstance(source, Header):
        found = {name: _header_type(entry) for name, entry in source.keys.items()}
    else:
        found = {name: field.types[0] for name, field in source.fields.items() if field.types}
    typed = {}
    for name, type_ in found.items():
        if name.startswith(PREFIX):
            right = name in KEYS and KEYS[name].type == type_
            typed[name] = (type_, _value(source, name) if right else None)
    return typed


def _header_type(entry: bytes) -> GGUFValueType:
    (length,) = struct.unpack_from("<Q", entry)
    (number,) = struct.unpack_from("<I", entry, 8 + length)
    return GGUFValueType(number)


def _value(source: gguf.GGUFReader | Header, name: str) -> Any:
    if isinstance(source, Header):
        return header_value(source.keys[name])
    return source.fields[name].contents()
