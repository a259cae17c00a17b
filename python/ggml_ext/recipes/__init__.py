"""How a model is to be converted: transform x rounding x type x activation, from options and named recipes.

A recipe is a TOML file in the folder recipes/. Options given beside it win. What cannot work is refused here,
before any work is done; what works but may surprise is said in a line of remarks.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ggml_ext.core import paths
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.registry import FLOAT_TYPES, OWN_TYPES, ROUNDINGS, TRANSFORMS
from ggml_ext.runtime import native
from ggml_ext.types import mixes
from ggml_ext.types.rules import STOCK_MIXES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ACTIVATIONS: dict[str, tuple[int, int] | None] = {
    "a8": None,
    "a4": (4, 0),
    "a4/32": (4, 32),
    "a4/256": (4, 256),
}
"""Name -> (bits, values per scale, 0 for the whole token); a8 is llama.cpp's own, which the type decides."""

_FP4 = ("nvfp4", "mxfp4")


@dataclass(frozen=True)
class Method:
    """``type_name``: a ggml type or a mix. ``transform``, ``rounding``: names of the registry.
    ``activation``: one of ACTIVATIONS. ``transform_bits``: bits per weight that online factors may take,
    None for no limit. ``samples``: windows of the calibration text, 0 for as many as the widest matrix asks
    for. ``size``: bytes of the file, ``bpw``: bits per weight of all of its tensors together, if each
    tensor's type is to be chosen by what it costs; ``stock``: among the types of unpatched llama.cpp."""

    type_name: str = "fq4"
    transform: str = "none"
    rounding: str = "rtn"
    activation: str = "a8"
    transform_bits: float | None = None
    samples: int = 0
    size: int | None = None
    bpw: float | None = None
    stock: bool = False

    @property
    def allocates(self) -> bool:
        """Whether each tensor's type is chosen by what it costs."""
        return self.size is not None or self.bpw is not None

    @property
    def blockwise(self) -> bool:
        """Whether the model itself must run, block by block, to convert it."""
        return self.transform != "none" or ROUNDINGS[self.rounding].compensates or self.allocates

    @property
    def online(self) -> bool:
        """Whether something is left to do at run time, which only the patched llama.cpp does."""
        return TRANSFORMS[self.transform].online or ACTIVATIONS[self.activation] is not None

    def describe(self) -> str:
        """The four axes in one phrase."""
        return (
            f"type {self.type_name}, transform {self.transform}, rounding {self.rounding}, "
            f"activations {self.activation}"
        )


@dataclass(frozen=True)
class Recipe:
    """A named method. ``description``: one line that says what it is for."""

    name: str
    description: str
    method: Method


@dataclass(frozen=True)
class Options:
    """What the command line says; None where it says nothing."""

    type_name: str | None = None
    transform: str | None = None
    rounding: str | None = None
    activation: str | None = None
    samples: int | None = None
    size: int | None = None
    bpw: float | None = None
    stock: bool | None = None


def names() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def load(name: str) -> Recipe:
    """The recipe of that name. Raises GgmlExtError, naming those that exist."""
    path = _folder() / f"{name}.toml"
    if name not in names():
        raise GgmlExtError(f"--recipe {name}: no such recipe; there are: {', '.join(names())}")
    with path.open("rb") as file:
        content: dict[str, Any] = tomllib.load(file)
    description = content.pop("description")
    method = Method(type_name=content.pop("type"), **content)
    return Recipe(name, description, method)


def _folder() -> Path:
    return paths.PACKAGE / "recipes"


def resolve(recipe: str | None, options: Options, *, importances: bool) -> Method:
    """The method that a recipe (None: plain FQ4) and the options beside it describe.

    importances: whether a calibration text or an importance matrix is given; without a recipe and --rounding
    it decides between rtn and imatrix, and a transform's rounding is gptq. Raises GgmlExtError for unknown
    names.
    """
    given = {key: value for key, value in vars(options).items() if value is not None}
    given = {key: value.lower() if isinstance(value, str) else value for key, value in given.items()}
    if given.keys() & {"size", "bpw", "stock"}:
        return _allocating(recipe, given)
    base = Method() if recipe is None else load(recipe).method
    _check_names(given)
    if base.allocates and "type_name" in given:
        base = replace(base, bpw=None)
    if recipe is None and "rounding" not in given:
        if given.get("transform", "none") != "none":
            given["rounding"] = "gptq"
        elif importances:
            given["rounding"] = "imatrix"
    return replace(base, **given)


def _check_names(given: Mapping[str, Any]) -> None:
    for option, known in (
        ("transform", tuple(TRANSFORMS)),
        ("rounding", tuple(ROUNDINGS)),
        ("activation", tuple(ACTIVATIONS)),
    ):
        if given.get(option, known[0]) not in known:
            raise GgmlExtError(f"--{option} {given[option]}: unknown; there are: {', '.join(known)}")


def _allocating(recipe: str | None, given: dict[str, Any]) -> Method:
    """The method with --size, --bpw or --stock: best's, unless a recipe is named, with what stock llama.cpp
    can do where it has to."""
    _check_names(given)
    option = next(f"--{name}" for name in ("size", "bpw", "stock") if name in given)
    if "type_name" in given:
        raise GgmlExtError(
            f"--type {given['type_name']} beside {option}, which chooses types; leave out one of the two, or "
            "give single tensors theirs with --type-for"
        )
    if "size" in given and "bpw" in given:
        raise GgmlExtError("--size beside --bpw: two sizes; give one of the two")
    best = load("best").method
    stock = given.get("stock", False)
    base = load(recipe or ("stock4" if stock else "best")).method
    method = replace(base, type_name="q4_k" if stock else best.type_name, **given)
    if method.size is not None:
        method = replace(method, bpw=None)
    elif method.bpw is None:
        method = replace(method, bpw=best.bpw)
    if method.transform_bits is None:
        method = replace(method, transform_bits=best.transform_bits)
    if stock and method.online:
        raise GgmlExtError(
            f"--stock with {method.describe()}: unpatched llama.cpp cannot do that; use --transform awq or "
            "folded, and activations a8"
        )
    return method


def with_matrices(method: Method, options: Options, matrices: Path | None) -> Method:
    """The method when transforms are given in a file: flatquant. Raises GgmlExtError for another one."""
    if matrices is None or method.transform == "flatquant":
        return method
    if options.transform is not None:
        raise GgmlExtError(
            f"--matrices {matrices}: holds FlatQuant's transforms; leave out --transform {options.transform}"
        )
    rounding = method.rounding if options.rounding is not None else "gptq"
    return replace(method, transform="flatquant", rounding=rounding)


def check(
    method: Method,
    type_for: Sequence[tuple[str | re.Pattern[str], str]],
    *,
    text: bool,
    imatrix: bool,
) -> None:
    """Refuses what cannot work, with the reason.

    text, imatrix: a calibration text or an observation of one, an importance matrix is given. Raises
    GgmlExtError.
    """
    if imatrix and text:
        raise GgmlExtError(
            "--imatrix beside --calibration or --observed: two sources of importances; give one of the two"
        )
    _check_types(method, [name for _, name in type_for])
    if method.allocates and not ROUNDINGS[method.rounding].measures:
        raise GgmlExtError(
            f"--rounding {method.rounding}: types are chosen by what they cost with gptq or imatrix; use one "
            "of these, or name a --type"
        )
    if method.blockwise:
        _check_blockwise(method, imatrix=imatrix)
    elif ACTIVATIONS[method.activation] is not None:
        raise GgmlExtError(
            f"--activation {method.activation}: nothing prepares this model for it; add --transform or "
            "--rounding gptq, or switch a finished model with GGML_EXT_ACT"
        )
    elif not ROUNDINGS[method.rounding].measures and (text or imatrix):
        raise GgmlExtError(
            f"--rounding {method.rounding}: without a transform it uses no calibration; leave out "
            "--calibration, --observed and --imatrix, or use --rounding imatrix"
        )


def _check_types(method: Method, others: Sequence[str]) -> None:
    plain = list(others)
    if method.type_name not in STOCK_MIXES and method.type_name not in mixes.BODY:
        plain.append(method.type_name)
    for name in sorted(set(plain)):
        try:
            native.needs_imatrix(name)
        except native.UnknownTypeError as exc:
            known = ", ".join(sorted(STOCK_MIXES))
            raise GgmlExtError(
                f"unknown type {name}; use fq4, f16, bf16, f32, another ggml type or, for the whole file, "
                f"fq4_m or one of llama-quantize's: {known}"
            ) from exc


def require_packages() -> None:
    """Raises GgmlExtError if a package that running a model takes is not installed."""
    for name in ("torch", "safetensors"):
        if importlib.util.find_spec(name) is None:
            raise GgmlExtError(f"calibration needs the package {name}; pip install 'ggml-ext[calibrate]'")


def _check_blockwise(method: Method, *, imatrix: bool) -> None:
    require_packages()
    asked = f"--rounding {method.rounding}"
    if method.transform != "none":
        asked = f"--transform {method.transform}"
    if imatrix:
        raise GgmlExtError(
            f"{asked}: takes its statistics from the text, in the transformed basis; give --calibration TEXT "
            "instead of --imatrix"
        )
    if method.type_name in FLOAT_TYPES and ROUNDINGS[method.rounding].compensates:
        raise GgmlExtError(
            f"--rounding {method.rounding}: type {method.type_name} leaves nothing to round; "
            "use --rounding rtn or a quantised type"
        )
    if method.type_name in STOCK_MIXES and method.type_name not in mixes.BODY:
        try:
            native.needs_imatrix(method.type_name)
        except native.UnknownTypeError as exc:
            raise GgmlExtError(
                f"--type {method.type_name}: only llama-quantize knows this mix and it rounds by itself; "
                f"with {asked} use q4_k_m, fq4_m or a plain type, and --type-for"
            ) from exc


def remarks(method: Method, used_types: Sequence[str]) -> list[str]:
    """What works but may surprise, a line each. ``used_types``: types of the quantised matrices."""
    lines = []
    fp4 = sorted(set(used_types) & set(_FP4))
    if fp4 and TRANSFORMS[method.transform].scales:
        lines.append(
            f"warning: diagonal scaling is known to hurt {', '.join(fp4)}, whose small groups have scales of "
            "their own; compare with --transform none or hadamard"
        )
    if method.online and not set(OWN_TYPES) & set(used_types):
        what = "the transform is" if TRANSFORMS[method.transform].online else "4-bit activations are"
        lines.append(f"{what} left for run time: stock llama.cpp will not run this file as it is meant")
    return lines
