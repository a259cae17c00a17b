"""The model families that calibration understands: what their decoder blocks hold, and where it is in GGUF.

A family is a table over the modules of its Hugging Face decoder block: which matrices read each of the four
sites (sites.py), what they are called in GGUF (llama.cpp's converter, conversion/*.py and gguf-py's
tensor_mapping.py), and which module takes the offline part of each site's transform. ``check_block`` holds
the table against the block that transformers builds: a parameter that the table does not name is refused,
so that a variant of a family is never half understood.

The offline part of ffn_mid scales the rows of up_proj, which is exact because the intermediate is
act(gate) * up, whatever the activation. That of attn_out acts on the rows of v_proj: the attention's result
is linear in v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ggml_ext.errors import GgmlExtError
from ggml_ext.sites import Fold, Linear, Site, SiteKind

Names = Mapping[str, str]


@dataclass(frozen=True)
class Heads:
    """Attention heads of a block: query heads, key and value heads, channels per head."""

    n_head: int
    n_head_kv: int
    head_dim: int


@dataclass(frozen=True)
class Family:
    """``architecture``: its name in config.json. ``sites``: per site the modules that read it, HF module
    within the block -> GGUF tensor after ``blk.N.``, the anchor first. ``norms``: the same for vectors.
    ``folds``: the HF module that the offline part of a site goes into. ``router``: HF module of the mixture's
    gate. ``renamed``: HF module -> name in the checkpoint, where that differs; ``{}`` stands for the expert.
    ``prefix``: of the decoder's names in the checkpoint. ``permuted``: the converter reorders the rows of q
    and k (LlamaModel.permute in conversion/llama.py). ``softcap``: the attention scores are capped, which
    torch's fused attention cannot do."""

    architecture: str
    sites: Mapping[SiteKind, Names]
    norms: Names
    folds: Mapping[SiteKind, str]
    router: str = ""
    renamed: Names = field(default_factory=dict)
    prefix: str = "model."
    permuted: bool = False
    softcap: bool = False

    @property
    def modules(self) -> dict[str, str]:
        """Every module with parameters -> GGUF tensor after ``blk.N.``."""
        names = {module: tensor for site in self.sites.values() for module, tensor in site.items()}
        return names | dict(self.norms) | ({self.router: "ffn_gate_inp"} if self.router else {})


_ATTENTION: Mapping[SiteKind, Names] = {
    "attn_in": {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    "attn_out": {"self_attn.o_proj": "attn_output"},
}
_DENSE: Mapping[SiteKind, Names] = {
    "ffn_in": {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"},
    "ffn_mid": {"mlp.down_proj": "ffn_down"},
}
_EXPERTS: Mapping[SiteKind, Names] = {
    "ffn_in": {"mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps"},
    "ffn_mid": {"mlp.experts.down_proj": "ffn_down_exps"},
}
_FUSED: Mapping[SiteKind, Names] = {
    "attn_in": {"self_attn.qkv_proj": "attn_qkv"},
    "attn_out": {"self_attn.o_proj": "attn_output"},
    "ffn_in": {"mlp.gate_up_proj": "ffn_up"},
    "ffn_mid": {"mlp.down_proj": "ffn_down"},
}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_GEMMA_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_FOLDS: Mapping[SiteKind, str] = {
    "attn_in": "input_layernorm",
    "attn_out": "self_attn.v_proj",
    "ffn_in": "post_attention_layernorm",
    "ffn_mid": "mlp.up_proj",
}
_GEMMA_FOLDS = {**_FOLDS, "ffn_in": "pre_feedforward_layernorm"}
_EXPERT_FOLDS = {**_FOLDS, "ffn_mid": "mlp.experts.up_proj"}
_FUSED_FOLDS = {**_FOLDS, "attn_out": "self_attn.qkv_proj", "ffn_mid": "mlp.gate_up_proj"}

_MIXTRAL_NAMES = {
    "mlp.gate": "block_sparse_moe.gate",
    "mlp.experts.gate_proj": "block_sparse_moe.experts.{}.w1",
    "mlp.experts.up_proj": "block_sparse_moe.experts.{}.w3",
    "mlp.experts.down_proj": "block_sparse_moe.experts.{}.w2",
}
_QWEN_EXPERT_NAMES = {f"mlp.experts.{name}": f"mlp.experts.{{}}.{name}" for name in ("gate_proj", "up_proj")}
_QWEN_EXPERT_NAMES["mlp.experts.down_proj"] = "mlp.experts.{}.down_proj"

_LIST = (
    Family("LlamaForCausalLM", {**_ATTENTION, **_DENSE}, _NORMS, _FOLDS, permuted=True),
    Family("MistralForCausalLM", {**_ATTENTION, **_DENSE}, _NORMS, _FOLDS, permuted=True),
    Family("Qwen2ForCausalLM", {**_ATTENTION, **_DENSE}, _NORMS, _FOLDS),
    Family("Qwen3ForCausalLM", {**_ATTENTION, **_DENSE}, {**_NORMS, **_QK_NORMS}, _FOLDS),
    Family("Gemma2ForCausalLM", {**_ATTENTION, **_DENSE}, _GEMMA_NORMS, _GEMMA_FOLDS, softcap=True),
    Family("Gemma3ForCausalLM", {**_ATTENTION, **_DENSE}, {**_GEMMA_NORMS, **_QK_NORMS}, _GEMMA_FOLDS),
    Family(
        "Gemma3ForConditionalGeneration",
        {**_ATTENTION, **_DENSE},
        {**_GEMMA_NORMS, **_QK_NORMS},
        _GEMMA_FOLDS,
        prefix="language_model.model.",
    ),
    Family("Phi3ForCausalLM", _FUSED, _NORMS, _FUSED_FOLDS),
    Family(
        "MixtralForCausalLM",
        {**_ATTENTION, **_EXPERTS},
        _NORMS,
        _EXPERT_FOLDS,
        router="mlp.gate",
        renamed=_MIXTRAL_NAMES,
        permuted=True,
    ),
    Family(
        "Qwen3MoeForCausalLM",
        {**_ATTENTION, **_EXPERTS},
        {**_NORMS, **_QK_NORMS},
        _EXPERT_FOLDS,
        router="mlp.gate",
        renamed=_QWEN_EXPERT_NAMES,
    ),
)
FAMILIES: Mapping[str, Family] = MappingProxyType({family.architecture: family for family in _LIST})
"""The supported families by their architecture in config.json."""


def family_of(architectures: list[str], where: object) -> Family:
    """The family of a config.json's ``architectures``. Raises GgmlExtError naming an unknown one."""
    for name in architectures:
        if name in FAMILIES:
            return FAMILIES[name]
    raise GgmlExtError(
        f"{where}: calibration does not know the architecture {', '.join(architectures) or '(none named)'}; "
        f"it knows {', '.join(FAMILIES)}"
    )


def check_block(family: Family, layer: nn.Module, index: int, where: object) -> dict[str, str]:
    """HF parameter of the decoder block -> GGUF tensor, for all parameters of the block.

    Matrices that read a site may have a bias. Raises GgmlExtError naming the module that the family's table
    does not account for, or that the block lacks.
    """
    found = {}
    matrices = {module for site in family.sites.values() for module in site}
    modules = family.modules
    for name, _ in [*layer.named_parameters(), *layer.named_buffers()]:
        module, _, leaf = name.rpartition(".")
        if module not in modules or not (leaf == "weight" or (leaf == "bias" and module in matrices)):
            raise GgmlExtError(
                f"{where}: block {index} holds {name}, which calibration does not understand in a "
                f"{family.architecture}; use transform none with rounding rtn or imatrix"
            )
        found[name] = f"blk.{index}.{modules[module]}.{leaf}"
    missing = [module for module in modules if f"{module}.weight" not in found]
    if missing:
        raise GgmlExtError(
            f"{where}: block {index} lacks {missing[0]}, which a {family.architecture} should have; "
            "use transform none with rounding rtn or imatrix"
        )
    return found


def checkpoint_name(family: Family, parameter: str, index: int) -> str:
    """What the checkpoint calls a block's parameter; with ``{}`` for the expert where each has a tensor."""
    module, _, leaf = parameter.rpartition(".")
    return f"{family.prefix}layers.{index}.{family.renamed.get(module, module)}.{leaf}"


def expected_rows(family: Family, module: str, n_out: int, heads: Heads) -> NDArray[np.int64]:
    """Row order of the converter: row i in GGUF is row result[i] of the HF module. int64 [n_out].

    Llama's q and k go from (half, pair) to (pair, half) within each head: rotary embeddings turn adjacent
    channels in llama.cpp's NORM layout, channels half a head apart in Hugging Face's.
    """
    rows = np.arange(n_out, dtype=np.int64)
    if family.permuted and module in ("self_attn.q_proj", "self_attn.k_proj"):
        rows = rows.reshape(-1, 2, heads.head_dim // 2).swapaxes(1, 2).reshape(-1)
    return rows


def build_sites(
    family: Family,
    index: int,
    weights: Mapping[str, Tensor],
    rows: Mapping[str, NDArray[np.int64]],
    heads: Heads,
) -> dict[SiteKind, Site]:
    """The four sites of block ``index``.

    weights: HF parameter -> float32 tensor (matrices and biases). rows: HF module -> its gguf_rows.
    """

    def tensor(module: str) -> str:
        return f"blk.{index}.{family.modules[module]}.weight"

    sites: dict[SiteKind, Site] = {}
    for kind, modules in family.sites.items():
        linears = tuple(Linear(tensor(m), weights[f"{m}.weight"], rows[m]) for m in modules)
        attention = kind == "attn_out"
        sites[kind] = Site(
            kind=kind,
            anchor=linears[0].tensor.removesuffix(".weight"),
            n=linears[0].weight.shape[-1],
            linears=linears,
            fold=_fold(family, kind, tensor(family.folds[kind]), weights, heads),
            also=(tensor(family.router),) if family.router and kind == "ffn_in" else (),
            n_head=heads.n_head if attention else 0,
            n_head_kv=heads.n_head_kv if attention else 0,
            head_dim=heads.head_dim if attention else 0,
        )
    return sites


def _fold(family: Family, kind: SiteKind, tensor: str, weights: Mapping[str, Tensor], heads: Heads) -> Fold:
    """The fold of a site. The channels of attn_out and ffn_mid are the last rows of the matrix before them:
    all rows of v_proj and up_proj, the v part of qkv_proj and the up part of gate_up_proj."""
    module = family.folds[kind]
    weight = weights[f"{module}.weight"]
    if kind in ("attn_in", "ffn_in"):
        return Fold(tensor, rows=False, n=weight.shape[0])
    n = heads.n_head_kv * heads.head_dim if kind == "attn_out" else _channels(family, kind, weights)
    bias = tensor.removesuffix("weight") + "bias" if f"{module}.bias" in weights else ""
    return Fold(tensor, rows=True, first=weight.shape[-2] - n, n=n, bias=bias)


def _channels(family: Family, kind: SiteKind, weights: Mapping[str, Tensor]) -> int:
    module = next(iter(family.sites[kind]))
    return weights[f"{module}.weight"].shape[-1]
