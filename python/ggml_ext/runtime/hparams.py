"""Hyperparameters of a GGUF file that llama.cpp believes: it asserts on them, divides by them or loops over
them, where it could refuse the file. They are looked at before it gets to see them.

The file is read by ggml's own reader (gguf.h), which is what llama.cpp reads it with. What it cannot read is
left to llama.cpp to refuse. What only the graph of an architecture shows to be wrong ends in aborts.py.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import cffi

from ggml_ext.core import paths
from ggml_ext.core.errors import GgmlExtError

Numbers = list[float]

MAX_LAYERS, MAX_EXPERTS = 512, 1024
"""LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS of llama-hparams.h."""

_ROPE_SCALING = ("none", "linear", "yarn", "longrope")
_FEW_EXPERTS = ("hunyuan_vl", "hunyuan-dense")  # one expert counts as none, llama_model_base::load_hparams

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_QUERIES = (b".attn_q.weight", b".attn_qkv.weight")

_CDEF = """
struct gguf_init_params { bool no_alloc; void * ctx; };
struct gguf_context * gguf_init_from_file(const char * fname, struct gguf_init_params params);
void gguf_free(struct gguf_context * ctx);
int64_t gguf_get_n_kv(const struct gguf_context * ctx);
int64_t gguf_find_key(const struct gguf_context * ctx, const char * key);
const char * gguf_get_key(const struct gguf_context * ctx, int64_t key_id);
int gguf_get_kv_type(const struct gguf_context * ctx, int64_t key_id);
int gguf_get_arr_type(const struct gguf_context * ctx, int64_t key_id);
const char * gguf_get_val_str(const struct gguf_context * ctx, int64_t key_id);
const void * gguf_get_val_data(const struct gguf_context * ctx, int64_t key_id);
size_t gguf_get_arr_n(const struct gguf_context * ctx, int64_t key_id);
const void * gguf_get_arr_data(const struct gguf_context * ctx, int64_t key_id);
int64_t gguf_get_n_tensors(const struct gguf_context * ctx);
const char * gguf_get_tensor_name(const struct gguf_context * ctx, int64_t tensor_id);
"""


@lru_cache(maxsize=1)
def _reader() -> tuple[Any, Any]:
    """cffi's FFI object and libggml-base, for gguf.h."""
    ffi = cffi.FFI()
    ffi.cdef(_CDEF)
    return ffi, ffi.dlopen(str(paths.library("ggml-base")))


class Hparams:
    """``arch``: general.architecture. ``numbers``: of every key below it, without ``arch`` and the dot, whose
    value is a number or an array of numbers. ``texts``: the strings among these keys. ``attends``: whether a
    tensor makes queries. ``tokens``: of the vocabulary, None where the file has none."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.numbers: dict[str, Numbers] = {}
        self.texts: dict[str, str] = {}
        self.attends = False
        self.tokens: int | None = None

    def most(self, key: str, default: float = 0) -> float:
        """The largest number of the key, ``default`` where the file has none."""
        return max(self.numbers.get(key, ()), default=default)


def read(path: Path) -> Hparams | None:
    """The hyperparameters of a GGUF file, None where ggml's reader does not take it for one."""
    ffi, library = _reader()
    gguf = library.gguf_init_from_file(os.fsencode(path), {"no_alloc": True, "ctx": ffi.NULL})
    if gguf == ffi.NULL:
        return None
    try:
        arch = library.gguf_find_key(gguf, b"general.architecture")
        if arch < 0 or library.gguf_get_kv_type(gguf, arch) != _STRING:
            return None
        found = Hparams(ffi.string(library.gguf_get_val_str(gguf, arch)).decode("utf-8", "replace"))
        prefix = f"{found.arch}."
        for index in range(library.gguf_get_n_kv(gguf)):
            name = ffi.string(library.gguf_get_key(gguf, index)).decode("utf-8", "replace")
            if name.startswith(prefix):
                _add(found, name.removeprefix(prefix), gguf, index)
        names = (library.gguf_get_tensor_name(gguf, i) for i in range(library.gguf_get_n_tensors(gguf)))
        found.attends = any(ffi.string(name).endswith(_QUERIES) for name in names)
        tokens = library.gguf_find_key(gguf, b"tokenizer.ggml.tokens")
        if tokens >= 0 and library.gguf_get_kv_type(gguf, tokens) == _ARRAY:
            found.tokens = library.gguf_get_arr_n(gguf, tokens)
        return found
    finally:
        library.gguf_free(gguf)


def _add(found: Hparams, key: str, gguf: Any, index: int) -> None:
    ffi, library = _reader()
    type_id = library.gguf_get_kv_type(gguf, index)
    if type_id == _STRING:
        found.texts[key] = ffi.string(library.gguf_get_val_str(gguf, index)).decode("utf-8", "replace")
        return
    count, data = 1, None
    if type_id == _ARRAY:
        type_id, count = library.gguf_get_arr_type(gguf, index), library.gguf_get_arr_n(gguf, index)
        if type_id in _SCALARS and count:
            data = library.gguf_get_arr_data(gguf, index)
    else:
        data = library.gguf_get_val_data(gguf, index)
    if data is not None:
        layout = f"={count}{_SCALARS[type_id]}"
        found.numbers[key] = list(struct.unpack(layout, ffi.buffer(data, struct.calcsize(layout))))


def check(path: Path) -> None:
    """Raises GgmlExtError, naming file and key, for what would end the process in llama.cpp."""
    hparams = read(path)
    if hparams is None:
        return
    if hparams.tokens == 0:
        reason: str | None = "key tokenizer.ggml.tokens is empty"
    else:
        reason = next((f"key {hparams.arch}.{wrong}" for wrong in _wrong(hparams)), None)
    if reason is not None:
        raise GgmlExtError(f"{path}: {reason}; make the file anew from a sound model")


def _wrong(hparams: Hparams) -> Iterator[str]:
    yield from _wrong_floats(hparams.numbers)
    yield from _wrong_layers(hparams)
    yield from _wrong_experts(hparams)
    yield from _wrong_heads(hparams)
    scaling = hparams.texts.get("rope.scaling.type", "linear")
    if scaling not in _ROPE_SCALING:
        yield f"rope.scaling.type is {scaling[:40]!r}, not one of {', '.join(_ROPE_SCALING)}"


def _wrong_floats(numbers: Mapping[str, Numbers]) -> Iterator[str]:
    for key, values in numbers.items():
        for value in values:
            if math.isnan(value):  # infinite is what bounds are where there are none
                yield f"{key} is no number"
            if key.endswith(("epsilon", "eps")) and not 0 <= value < math.inf:
                yield f"{key} is {value:g}, not finite and at least 0"


def _wrong_layers(hparams: Hparams) -> Iterator[str]:
    if "block_count" not in hparams.numbers:
        return  # llama.cpp says that it is missing
    layers, extra = hparams.most("block_count"), hparams.most("nextn_predict_layers")
    if not 0 < layers <= MAX_LAYERS:
        yield f"block_count is {layers}, not from 1 to {MAX_LAYERS}"
    if extra > layers:
        yield f"nextn_predict_layers is {extra}, more than the {layers} blocks"


def _wrong_experts(hparams: Hparams) -> Iterator[str]:
    count, used = hparams.most("expert_count"), hparams.most("expert_used_count")
    groups, groups_used = hparams.most("expert_group_count"), hparams.most("expert_group_used_count")
    if count <= 1 and hparams.arch in _FEW_EXPERTS:
        count = used = 0
    if count > MAX_EXPERTS:
        yield f"expert_count is {count}, more than {MAX_EXPERTS}"
    if used > count or (count and not used):
        yield f"expert_used_count is {used}, of {count} experts"
    if groups and groups >= count:
        yield f"expert_group_count is {groups}, of {count} experts"
    if groups > 1 and count % groups:
        yield f"expert_group_count is {groups}, which does not divide {count} experts"
    if groups > 1 and not 0 < groups_used < groups:
        yield f"expert_group_used_count is {groups_used}, of {groups} groups"


def _wrong_heads(hparams: Hparams) -> Iterator[str]:
    width, heads = hparams.most("embedding_length"), hparams.most("attention.head_count")
    if heads > width:
        yield f"attention.head_count is {heads}, more than the {width} channels"
    if not heads and hparams.attends:
        yield "attention.head_count is missing or 0, and there are attn_q or attn_qkv tensors"
    if not 0 < heads <= width:
        return
    head = hparams.most("attention.key_length", width // heads)
    for suffix in ("", "_swa"):
        key = f"rope.dimension_count{suffix}"
        turned = hparams.most(key, 2)
        if turned % 2 or turned > hparams.most(f"attention.key_length{suffix}", head):
            yield f"{key} is {turned}, not an even number of at most a head's {head} channels"
