"""Which tensors are quantised, and to which type.

The rules are llama-quantize's (llama.cpp, src/llama-quant.cpp: tensor_allows_quantization,
tensor_type_fallback, llama_tensor_get_type), so that a file of ours and a stock file of the same model
differ in the type and in nothing else. Layer-dependent mixes (Q4_K_M and the like) stay with llama-quantize
(STOCK_MIXES), except Q4_K_M itself, which a calibrated conversion needs too, and FQ4_M, the same mix with
FQ4 in the place of Q4_K (mixes.py).

Everything here works on names, shapes and type names (lower case, as in ``ggml_type_name``); no weights
are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.registry import FLOAT_TYPES as FLOAT_TYPES
from ggml_ext.core.registry import SOURCE_TYPES
from ggml_ext.gguf.source import Shape as Shape
from ggml_ext.types import mixes

# What llama-quantize's command line knows (tools/quantize/quantize.cpp, QUANT_OPTIONS), less two
# groups: f16, bf16 and f32, which are plain copies, and q3_k, q4_k, q5_k, which are aliases for the _M
# mixes there but name plain ggml types here.
# fmt: off
STOCK_MIXES = frozenset((
    "q1_0", "q2_0", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4_moe", "tq1_0", "tq2_0",
    "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m",
    "iq4_nl", "iq4_xs", "q2_k", "q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m",
    "q5_k_s", "q5_k_m", "q6_k",
))
# fmt: on

# Row length no multiple of the type's block: the type of smaller blocks that takes its place
# (tensor_type_fallback). FQ4 goes where Q4_K goes but for rows that FQ4_64 fits, FQ3 where Q3_K goes but for
# those that FQ3_64 fits.
_FALLBACK = {
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
    **dict.fromkeys(("q2_0", "q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
    "fq4": "fq4_64",
    "fq4_64": "q5_0",
    "fq3": "fq3_64",
    "fq3_64": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}

# tensor_allows_quantization: parts of names whose tensors are small or sensitive.
_NEVER = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)
# What no product reads although llama-quantize takes it for a matrix: llama.cpp's MUL aborts on rounded ones.
# Names and shapes do not tell such a tensor from a matrix, the graph does (Table.no_matrices). These are for
# conversions that look at no graph, of models that llama.cpp may not even know.
_NO_MATRICES = ("ple_conv1d", "ple_norm_")
_NEVER_NAMES = frozenset(("position_embd.weight", "token_types.weight"))
_NEVER_GLM5_NEXT = (
    "hc_",
    "indexer.attn_q_b",
    "indexer.attn_k",
    "indexer.proj",
    "indexer_compressor_gate",
    "indexer_compressor_ape",
    "ssm_f_a.weight",
    "ssm_f_b.weight",
    "ssm_g_a.weight",
    "ssm_g_b.weight",
    "ssm_beta.weight",
    "attn_kv_a_mqa.weight",
    "attn_k_b.weight",
    "attn_v_b.weight",
)
_Q8_GLM5_NEXT = ("attn_q_a", "attn_q_b", "nextn.eh_proj")

EMBEDDINGS = frozenset(("token_embd.weight", "per_layer_token_embd.weight"))
HEAD = "output.weight"

BlockSize = Callable[[str], int]


@dataclass(frozen=True)
class Rules:
    """The request. ``type_for``: first match (re.search) wins. ``keep`` is looked at before it.
    ``no_matrices``: tensors that no product of llama.cpp's graph reads, None where nobody has looked."""

    base: str
    type_for: tuple[tuple[re.Pattern[str], str], ...] = ()
    keep: tuple[re.Pattern[str], ...] = ()
    no_matrices: frozenset[str] | None = None


@dataclass(frozen=True)
class Choice:
    """The type for one tensor. ``fallback_from``: the type that its row length did not allow, or ""."""

    name: str
    target: str
    fallback_from: str = ""


def compile_rules(base: str, type_for: Sequence[tuple[str, str]], keep: Sequence[str]) -> Rules:
    """Compiles the patterns; type names become lower case. Raises GgmlExtError for a bad pattern."""
    return Rules(
        base.lower(),
        tuple((_compile("--type-for", pattern), type_name.lower()) for pattern, type_name in type_for),
        tuple(_compile("--keep", pattern) for pattern in keep),
    )


def _compile(option: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as exc:
        raise GgmlExtError(
            f"{option} {pattern}: not a regular expression ({exc}); it is searched in tensor names "
            "such as blk.0.attn_q.weight"
        ) from exc


def allows_quantization(tensor: Shape, arch: str) -> bool:
    """True if llama-quantize would quantise the tensor at all."""
    if _n_dims(tensor.dims) < 2 or not tensor.name.endswith("weight") or tensor.name in _NEVER_NAMES:
        return False
    parts = (*_NEVER, *(_NEVER_GLM5_NEXT if arch == "glm5-next" else ()))
    return not any(part in tensor.name for part in parts)


def is_matrix(tensor: Shape, no_matrices: frozenset[str] | None) -> bool:
    """Whether llama.cpp can use the tensor in a quantised type. no_matrices: see Rules."""
    if no_matrices is not None:
        return tensor.name not in no_matrices
    return not any(part in tensor.name for part in _NO_MATRICES)


def _quantises(tensor: Shape, arch: str, rules: Rules) -> bool:
    return allows_quantization(tensor, arch) and is_matrix(tensor, rules.no_matrices)


def _n_dims(dims: Sequence[int]) -> int:
    """Number of dimensions without trailing ones, as ggml_n_dims counts."""
    n = len(dims)
    while n > 1 and dims[n - 1] == 1:
        n -= 1
    return n


def fallback(type_name: str, row: int, block_size: BlockSize) -> str:
    """The type to use for rows of ``row`` weights: the type itself if its block divides them.

    Raises GgmlExtError for a type of large blocks that has no smaller relative.
    """
    if row % block_size(type_name) == 0:
        return type_name
    if type_name in _FALLBACK:
        return fallback(_FALLBACK[type_name], row, block_size)
    if block_size(type_name) > 32:
        raise GgmlExtError(
            f"rows of {row} weights do not fit type {type_name}, whose blocks have {block_size(type_name)}; "
            "choose another type for these tensors with --type-for"
        )
    return "f16"


def _default_type(
    tensor: Shape, base: str, mixed: Mapping[str, str], arch: str, tied: bool, block_size: BlockSize
) -> str:
    """llama_tensor_get_type_impl for a plain type; ``mixed``: what the mix changes, tensor -> type."""
    if base in FLOAT_TYPES:
        return base
    if arch == "glm5-next" and any(part in tensor.name for part in _Q8_GLM5_NEXT):
        return "q8_0"
    if tensor.name == HEAD or (tied and tensor.name in EMBEDDINGS):
        if arch == "falcon" or tensor.dims[0] % block_size(base) != 0:
            return "q8_0"
        return base if base == "q8_0" else "q6_k"
    return mixed.get(tensor.name, base)


def choose(tensors: Sequence[Shape], arch: str, rules: Rules, block_size: BlockSize) -> list[Choice]:
    """Decides for every tensor, in order.

    Raises GgmlExtError for a pattern that no tensor's name matches and for a tensor that is already
    quantised and would have to change its type.
    """
    _require_matches(tensors, rules)
    tied = all(tensor.name != HEAD for tensor in tensors)
    mixed: dict[str, str] = {}
    if rules.base in mixes.BODY:
        free = [t for t in tensors if _quantises(t, arch, rules) and _asked(t, arch, rules) is None]
        mixed = mixes.q4_k_m(tensors, free, arch)

    def default(tensor: Shape) -> str:
        base = mixes.BODY.get(rules.base, rules.base)
        return _default_type(tensor, base, mixed, arch, tied, block_size)

    return [_choose_one(tensor, arch, rules, default, block_size) for tensor in tensors]


def overrides(tensors: Sequence[Shape], arch: str, rules: Rules) -> dict[str, str]:
    """Tensor -> type for what ``keep`` and ``type_for`` ask and what it would get wrong: the rest is
    llama-quantize's.

    Raises GgmlExtError for a pattern that no tensor's name matches.
    """
    _require_matches(tensors, rules)
    asked = {tensor.name: _asked(tensor, arch, rules) for tensor in tensors}
    taken = [tensor for tensor in tensors if allows_quantization(tensor, arch)]
    asked |= {t.name: t.type_name for t in taken if not is_matrix(t, rules.no_matrices)}
    return {name: type_name for name, type_name in asked.items() if type_name is not None}


def without_effect(tensors: Sequence[Shape], arch: str, rules: Rules) -> list[str]:
    """Tensors that ``type_for`` names although they are never quantised."""
    patterns = [pattern for pattern, _ in rules.type_for]
    return [
        tensor.name
        for tensor in tensors
        if any(pattern.search(tensor.name) for pattern in patterns) and not _quantises(tensor, arch, rules)
    ]


def free(tensors: Sequence[Shape], arch: str, rules: Rules, choices: Sequence[Choice]) -> list[str]:
    """Tensors that are quantised and whose type nobody prescribes. ``choices``: of the tensors, in order."""
    return [
        tensor.name
        for tensor, choice in zip(tensors, choices, strict=True)
        if choice.target not in FLOAT_TYPES and _asked(tensor, arch, rules) is None
    ]


def _asked(tensor: Shape, arch: str, rules: Rules) -> str | None:
    """The type that ``keep`` or ``type_for`` gives the tensor, None if they do not concern it."""
    if any(pattern.search(tensor.name) for pattern in rules.keep):
        return tensor.type_name
    if not _quantises(tensor, arch, rules):
        return None
    return next((name for pattern, name in rules.type_for if pattern.search(tensor.name)), None)


def _choose_one(
    tensor: Shape, arch: str, rules: Rules, default: Callable[[Shape], str], block_size: BlockSize
) -> Choice:
    wanted = _asked(tensor, arch, rules)
    if wanted is None and not _quantises(tensor, arch, rules):
        return Choice(tensor.name, _float_copy(tensor, rules))
    wanted = wanted or default(tensor)
    target = fallback(wanted, tensor.dims[0], block_size)
    if target != tensor.type_name and tensor.type_name not in SOURCE_TYPES:
        raise GgmlExtError(
            f"{tensor.name} is already {tensor.type_name} and would lose accuracy as {target}; convert from "
            f"an f32, f16, bf16 or q8_0 model, or copy it as it is with --keep '{re.escape(tensor.name)}'"
        )
    return Choice(tensor.name, target, fallback_from=wanted if target != wanted else "")


def _float_copy(tensor: Shape, rules: Rules) -> str:
    """A tensor that is not quantised stays as it is, except that f16 <-> bf16 and f32 files are uniform."""
    if tensor.type_name in ("f16", "bf16") and rules.base in FLOAT_TYPES:
        return rules.base
    return tensor.type_name


def _require_matches(tensors: Sequence[Shape], rules: Rules) -> None:
    patterns = [("--type-for", pattern) for pattern, _ in rules.type_for]
    patterns += [("--keep", pattern) for pattern in rules.keep]
    for option, pattern in patterns:
        if not any(pattern.search(tensor.name) for tensor in tensors):
            raise GgmlExtError(
                f"{option} {pattern.pattern}: no tensor's name matches; "
                f"names look like {', '.join(tensor.name for tensor in tensors[:3])}"
            )
