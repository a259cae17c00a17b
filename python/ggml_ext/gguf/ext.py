"""The extension of GGUF: tensor types FQ4, FQ4_64, FQ3 and FQ3_64 for the ``gguf`` package, keys under
``ggml_ext.``.

Importing this module makes gguf.GGUFReader and gguf.GGUFWriter handle tensors of these (as uint8 arrays whose
last dimension is bytes, as for gguf's own quantised types). docs/gguf.md specifies the format; fq4.py,
fq4_64.py, fq3.py and fq3_64.py are the types in plain numpy, keys.py the table of keys.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import gguf

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf import fq3, fq3_64, fq4, fq4_64
from ggml_ext.gguf.fq4 import dequantize, dot_q8_k, quantize, quantize_blocks
from ggml_ext.gguf.header import Header
from ggml_ext.gguf.keys import FORMAT_VERSION, KEYS, PREFIX, check_values, typed_keys, value_of

__all__ = [
    "FORMAT_VERSION",
    "FQ3",
    "FQ3_64",
    "FQ4",
    "FQ4_64",
    "KEYS",
    "PREFIX",
    "Calibration",
    "ExtMetadata",
    "TensorErrors",
    "add_ext_keys",
    "dequantize",
    "dot_q8_k",
    "quantize",
    "quantize_blocks",
    "read_ext",
    "validate_keys",
]


@dataclass(frozen=True)
class Calibration:
    """What importances were computed from. hash: SHA-256 of the text, hexadecimal; length in tokens."""

    hash: str | None = None
    samples: int | None = None
    length: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class TensorErrors:
    """Relative squared errors ``values`` of ``tensors``. ``kind``: "output", tr(dW H dW^T) / tr(W H W^T) with
    the mean H of x^T x on the calibration text, or "weight", |dW|^2 / |W|^2."""

    kind: str
    tensors: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class TensorLosses:
    """What ``tensors`` cost in ``types``: KL divergences in nats per token, ``values`` [tensors, types], -1
    where a tensor cannot have a type."""

    tensors: tuple[str, ...]
    types: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class ExtMetadata:
    """The keys under ggml_ext. of one file; None or empty where the file lacks the key. ``hadamard``,
    ``clip`` and ``fold_sizes``: one per site, of which version 1 has four per block; ``fold_orders``: one per
    site, in version 1 per block. The table of sites and what was folded stay in the file: they can be
    millions of numbers."""

    rounding: str | None = None
    transform: str | None = None
    calibration: Calibration | None = None
    version: int = 1
    hadamard: tuple[int, ...] = ()
    clip: tuple[float, ...] = ()
    fold_sizes: tuple[int, ...] | None = None
    fold_orders: tuple[int, ...] = ()
    activation_bits: int | None = None
    activation_group: int | None = None
    errors: TensorErrors | None = None
    losses: TensorLosses | None = None


def _register(name: str, number: int, block: int, size: int) -> gguf.GGMLQuantizationType:
    """Adds a member to gguf's enumeration, which as a closed IntEnum offers no other way."""
    types = gguf.GGMLQuantizationType
    if name not in types.__members__:
        member = int.__new__(types, number)
        member._name_ = name
        member._value_ = number
        types._member_names_.append(name)
        types._member_map_[name] = member
        types._value2member_map_[number] = member
    gguf.GGML_QUANT_SIZES[types(number)] = (block, size)
    return types(number)


FQ4 = _register("FQ4", 200, fq4.BLOCK, fq4.BLOCK_BYTES)
FQ4_64 = _register("FQ4_64", 201, fq4_64.BLOCK, fq4_64.BLOCK_BYTES)
FQ3 = _register("FQ3", 202, fq3.BLOCK, fq3.BLOCK_BYTES)
FQ3_64 = _register("FQ3_64", 203, fq3_64.BLOCK, fq3_64.BLOCK_BYTES)


def validate_keys(source: gguf.GGUFReader | Header) -> None:
    """Raises GgmlExtError, naming the key, for what the patched loader refuses under ggml_ext.: an unknown
    key, a value of another type, a missing or newer version, a value that docs/gguf.md does not allow."""
    keys = typed_keys(source)
    for name, type_ in keys.items():
        known = KEYS.get(name)
        if known is None:
            raise GgmlExtError(f"key {name} is not known to this version; a newer ggml-ext may read the file")
        if type_ not in (known.type_name, known.type.name):  # GGUFReader does not tell an empty array's type
            raise GgmlExtError(
                f"key {name} must be of type {known.type_name}, is {type_}; convert the model again"
            )
    if not keys:
        return
    if "ggml_ext.version" not in keys:
        raise GgmlExtError(
            "key ggml_ext.version is missing beside other ggml_ext. keys; convert the model again"
        )
    values = {name: value_of(source, name) for name in keys}
    version = values["ggml_ext.version"]
    if not 1 <= version <= FORMAT_VERSION:
        raise GgmlExtError(
            f"key ggml_ext.version is {version}, this version reads 1 to {FORMAT_VERSION}; "
            "a newer ggml-ext may read the file"
        )
    architecture = value_of(source, "general.architecture")
    check_values(values, n_blocks=value_of(source, f"{architecture}.block_count"))


def read_ext(source: gguf.GGUFReader | Header) -> ExtMetadata | None:
    """The keys under ggml_ext., None for a file without any. Raises GgmlExtError as validate_keys does."""
    validate_keys(source)
    keys = {name: value_of(source, name) for name in typed_keys(source)}
    if not keys:
        return None
    prefix = "ggml_ext.calibration."
    calibration = {name.removeprefix(prefix): keys[name] for name in keys if name.startswith(prefix)}
    unrecorded = keys["ggml_ext.version"] == 1 and "ggml_ext.fold.sizes" not in keys
    errors = None
    if "ggml_ext.error.tensors" in keys:
        errors = TensorErrors(
            kind=keys["ggml_ext.error.kind"],
            tensors=tuple(keys["ggml_ext.error.tensors"]),
            values=tuple(keys["ggml_ext.error.values"]),
        )
    losses = None
    if "ggml_ext.loss.tensors" in keys:
        losses = TensorLosses(*(tuple(keys[f"ggml_ext.loss.{f.name}"]) for f in fields(TensorLosses)))
    return ExtMetadata(
        rounding=keys.get("ggml_ext.rounding"),
        transform=keys.get("ggml_ext.transform.name"),
        calibration=Calibration(**calibration) if calibration else None,
        version=keys["ggml_ext.version"],
        hadamard=tuple(keys.get("ggml_ext.transform.hadamard", ())),
        clip=tuple(keys.get("ggml_ext.transform.clip", ())),
        fold_sizes=None if unrecorded else tuple(keys.get("ggml_ext.fold.sizes", ())),
        fold_orders=tuple(keys.get("ggml_ext.fold.orders", ())),
        activation_bits=keys.get("ggml_ext.activation.bits"),
        activation_group=keys.get("ggml_ext.activation.group"),
        errors=errors,
        losses=losses,
    )


def add_ext_keys(writer: gguf.GGUFWriter, meta: ExtMetadata) -> None:
    """Adds the keys that ``meta`` has values for; folds it has not (ExtMetadata)."""
    values: dict[str, Any] = {
        "ggml_ext.version": meta.version,
        "ggml_ext.rounding": meta.rounding,
        "ggml_ext.transform.name": meta.transform,
        "ggml_ext.transform.hadamard": list(meta.hadamard) or None,
        "ggml_ext.transform.clip": list(meta.clip) or None,
        "ggml_ext.activation.bits": meta.activation_bits,
        "ggml_ext.activation.group": meta.activation_group,
    }
    parts = {
        "ggml_ext.calibration": meta.calibration,
        "ggml_ext.error": meta.errors,
        "ggml_ext.loss": meta.losses,
    }
    for prefix, part in parts.items():
        if part is not None:
            for field in fields(part):
                value = getattr(part, field.name)
                values[f"{prefix}.{field.name}"] = list(value) if isinstance(value, tuple) else value
    for name, value in values.items():
        if value is not None:
            writer.add_key_value(name, value, KEYS[name].type, KEYS[name].element)
