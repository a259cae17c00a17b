"""Dataclasses from parsed JSON that a file holds: every field there, of its type, and no other field."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

UINT32 = range(2**32)
"""What a key of GGUF's type uint32 can hold."""


def made_of(kind: type[T], facts: Mapping[str, Any]) -> T:
    """The dataclass ``kind`` with these values, of fields that are int, float, str, bool, None, Any, list and
    dict[str, ..] of those, tuples, whose elements are not looked at, and unions.

    Raises ValueError, naming the field, for one that is missing, unknown, or of another type.
    """
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for name in facts:
        if name not in known:
            raise ValueError(f"unknown field {name[:80]}")
    for name, field in known.items():
        if name not in facts:
            if field.default is MISSING and field.default_factory is MISSING:
                raise ValueError(f"no field {name}")
        elif not _fits(facts[name], hints[name]):
            raise ValueError(f"field {name} is of another type")
    return kind(**facts)


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is tuple:
        return isinstance(value, tuple)
    if origin is list:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(one, inner[1]) for one in value.values())
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)
