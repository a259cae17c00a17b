"""What calibrating a model will take, from its configuration alone: memory, disk, arithmetic.

Memory is that of one block on the device that computes. The factors for training count the tensors that
autograd keeps for a block whose four inputs and all matrices pass through a transform and a straight-through
quantiser; they and the rest are held against a measured run in docs/families.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ggml_ext.moments import MAX_EXPERT_BYTES, PANEL
from ggml_ext.skeleton import Skeleton, open_skeleton

_WORKSPACE = 2**29  # Python, torch and its kernels' buffers
_KEPT_HIDDEN, _KEPT_QUERY, _KEPT_FFN = 20, 10, 9  # tensors per token that training keeps, by their width
_SQUARES = 9  # n x n float64 matrices while the widest site is solved and rounded
_KEPT_WEIGHTS = 6  # copies of all matrices: transformed, rounded, what their gradients need, the gradients


@dataclass(frozen=True)
class Plan:
    """Bytes, except for counts. ``collect``: peak memory of the pass that gathers statistics. ``solve``: of
    the transforms and the rounding that follow (second moments and their factors in float64, the block's
    matrices in GGUF's order and transformed). ``train``: of training steps.
    ``peak``: the largest of those that the run needs. ``disk_activations``: two buffers of hidden states for
    all tokens. ``disk_checkpoints``: the rounded blocks. ``forward_macs``: multiply-adds of one forward pass
    of all tokens through all blocks. ``statistics_macs``: of the second moments. ``n_weights``: in all
    blocks' matrices."""

    n_blocks: int
    n_tokens: int
    n_weights: int
    collect: int
    solve: int
    train: int
    peak: int
    disk_activations: int
    disk_checkpoints: int
    forward_macs: int
    statistics_macs: int


@dataclass(frozen=True)
class _Shape:
    """Sizes of the largest block. ``sites``: channels and experts (0: dense) per site. ``weights``: elements
    of its matrices, ``active`` those that one token meets."""

    hidden: int
    query: int
    ffn: int
    heads: int
    weights: int
    active: int
    sites: tuple[tuple[int, int], ...]


def plan(
    folder: Path,
    *,
    samples: int,
    context: int,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    training: bool = False,
    sample_tokens: int = 4096,
    bits: float = 6.5625,
) -> Plan:
    """samples, context: texts and tokens per text. batch: texts per forward pass. dtype: of the blocks'
    arithmetic and of the hidden states on disk. training: whether transforms or roundings are learned by
    steps. sample_tokens: as in Block.collect. bits: per weight in the checkpoints (6.5625: Q6_K).

    Raises GgmlExtError as BlockModel does, but reads no weights.
    """
    skeleton = open_skeleton(folder)
    shape = _shape(skeleton)
    n_tokens, size = samples * context, dtype.itemsize
    weights = shape.weights * (4 if size == 4 else 4 + size)
    hessians = sum(n * n * 4 * (1 + _stored_experts(n, experts)) for n, experts in shape.sites)
    sample = sample_tokens * sum(n for n, _ in shape.sites) * 4
    statistics = hessians + sample
    tokens = batch * context
    scores = 3 * batch * shape.heads * context * context * 4 if skeleton.family.softcap else 0
    forward = tokens * (8 * shape.hidden + 6 * shape.query + 4 * shape.ffn) * size + scores
    kept = tokens * (_KEPT_HIDDEN * shape.hidden + _KEPT_QUERY * shape.query + _KEPT_FFN * shape.ffn) * size
    collect = _WORKSPACE + weights + statistics + forward
    solve = _WORKSPACE + weights + 2 * shape.weights * 4 + statistics
    solve += _SQUARES * max(n for n, _ in shape.sites) ** 2 * 8
    train = _WORKSPACE + weights + statistics + _KEPT_WEIGHTS * shape.weights * 4 + kept + scores
    blocks = len(skeleton.layers)
    attention = context * shape.query  # q k^T and scores v over half the context each on average
    return Plan(
        n_blocks=blocks,
        n_tokens=n_tokens,
        n_weights=blocks * shape.weights,
        collect=collect,
        solve=solve,
        train=train,
        peak=max(collect, solve, train) if training else max(collect, solve),
        disk_activations=2 * n_tokens * shape.hidden * size,
        disk_checkpoints=int(blocks * shape.weights * bits / 8),
        forward_macs=blocks * n_tokens * (shape.active + attention),
        statistics_macs=blocks * n_tokens * sum(n * (n + min(n, PANEL)) // 2 for n, _ in shape.sites),
    )


def widest(skeleton: Skeleton) -> int:
    """Channels of the widest matrix in a block: down's, in most models."""
    return max(n for n, _ in _shape(skeleton).sites)


def _stored_experts(n: int, experts: int) -> int:
    """Experts of a site that second moments are kept for."""
    return experts if experts * n * n * 4 <= MAX_EXPERT_BYTES else 0


def _shape(skeleton: Skeleton) -> _Shape:
    shapes = [_layer_shape(skeleton, layer) for layer in skeleton.layers]
    return max(shapes, key=lambda shape: shape.weights)


def _layer_shape(skeleton: Skeleton, layer: Any) -> _Shape:
    used = getattr(skeleton.config, "num_experts_per_tok", 0)
    sites, weights, active, width = [], 0, 0, {}
    for kind, modules in skeleton.family.sites.items():
        matrices = [layer.get_parameter(f"{module}.weight") for module in modules]
        experts = matrices[0].shape[0] if matrices[0].dim() == 3 else 0
        count = sum(matrix.numel() for matrix in matrices)
        weights += count
        active += count // experts * used if experts else count
        width[kind] = matrices[0].shape[-1]
        sites.append((width[kind], experts))
    heads = skeleton.heads.n_head
    ffn = width["ffn_mid"] * max(used, 1)
    return _Shape(width["attn_in"], width["attn_out"], ffn, heads, weights, active, tuple(sites))
