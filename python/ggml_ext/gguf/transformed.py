"""What a GGUF file says of transforms in its weights: what stays true, and what cannot be done.

Rounding such weights anew undoes nothing, so the keys stay. Another calibration solves transforms of its own
and writes a table of its own: LoRA adapters and saved states would then be fitted to folds that are one half
of those in the weights, and an online transform would be lost.
"""

from __future__ import annotations

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.source import Source
from ggml_ext.gguf.writer import string_key

_NAME = "ggml_ext.transform.name"
_IN_WEIGHTS = ("ggml_ext.transform.", "ggml_ext.site.", "ggml_ext.fold.")
_KEYS = (*_IN_WEIGHTS, "ggml_ext.activation.")
_FACTORS = (".fq_l", ".fq_r", ".fq_h")
_NONE = {_NAME: string_key(_NAME, "none")}


def carried(source: Source) -> dict[str, bytes]:
    """The keys that hold for the source's weights however they are rounded; empty without a transform.

    Raises GgmlExtError for such keys without the version of their format.
    """
    found = _keys(source, _KEYS)
    if found in ({}, _NONE):
        return {}
    if "ggml_ext.version" not in source.keys:
        raise GgmlExtError(f"{source.path}: has {min(found)} without ggml_ext.version; make the file anew")
    return {**found, "ggml_ext.version": source.keys["ggml_ext.version"]}


def require_plain(source: Source) -> None:
    """Raises GgmlExtError for a source with a transform in its weights, which a calibration cannot take.

    Activations of few bits are no transform: the calibration decides them anew.
    """
    keys = _keys(source, _IN_WEIGHTS)
    factors = [tensor.name for tensor in source.tensors if tensor.name.endswith(_FACTORS)]
    if keys in ({}, _NONE) and not factors:
        return
    what = next((name for name in keys if keys[name] != _NONE.get(name)), *factors[:1])
    raise GgmlExtError(
        f"{source.path}: has a transform in its weights already ({what}), which neither another transform "
        "nor gptq can go on from; convert from the original float model, or change the type only, with "
        "--transform none and --rounding rtn or imatrix"
    )


def _keys(source: Source, prefixes: tuple[str, ...]) -> dict[str, bytes]:
    return {name: entry for name, entry in source.keys.items() if name.startswith(prefixes)}
