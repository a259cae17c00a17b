"""Per-head transforms of a quantised KV cache: k' = k P, q' = q P^-T; v' = v P, P^-1 after the attention.

Rounding k' to blocks with one scale leaves about the same error variance s in all channels, s in proportion
to tr(P^T Hk P); what it does to the scores q' k'^T is s tr(P^-1 Hq P^-T). The product of both traces depends
on P P^T alone and is smallest where P^T Hk P = P^-1 Hq P^-T: the balanced realisation of control theory
(B. C. Moore, 1981), with both equal to a diagonal S. Any rotation may follow; Walsh-Hadamard makes all
channels' variances equal. For V, the reader's moments are W^T W of the output projection, summed over the heads."""

from __future__ import annotations

import torch
from torch import Tensor

from ggml_ext.errors import GgmlExtError
from ggml_ext.transforms.matrices import spreading

_DAMPING = 1e-3  # of the mean diagonal; bounds P's condition number by its inverse


def cache_transform(cached: Tensor, reader: Tensor) -> Tensor:
    """P [head_dim, head_dim] float64 for second moments of what the cache holds (rows k or v) and of what
    reads it (rows q, or the rows of the output projection per head), both [head_dim, head_dim], any scale.

    Raises GgmlExtError for moments with NaN or Inf, or that are all zero.
    """
    a, b = _damped(cached), _damped(reader)
    lower = torch.linalg.cholesky(a)
    values, vectors = torch.linalg.eigh(lower.T @ b @ lower)
    # With lower^T b lower = V S^2 V^T and P = lower^-T V S^(1/2): P^T a P = P^-1 b P^-T = S.
    balanced = torch.linalg.solve_triangular(lower.T, vectors * values.clamp_min(0) ** 0.25, upper=True)
    balanced = balanced / (balanced.norm() / len(balanced) ** 0.5)
    transform: Tensor = balanced @ spreading(len(balanced))
    return transform


def output_gram(weight: Tensor, head_dim: int) -> Tensor:
    """The reader's moments for V: the output projection's W [n_out, heads * head_dim] -> sum over its heads
    of W_h^T W_h, float64."""
    heads = weight.double().unflatten(-1, (-1, head_dim))
    return torch.einsum("ohi,ohj->ij", heads, heads)


def _damped(moments: Tensor) -> Tensor:
    h = moments.double()
    mean = h.diagonal().mean()
    if not bool(h.isfinite().all()) or not mean > 0:
        raise GgmlExtError(
            "moments of the KV cache hold NaN, Inf or only zeros; check the model and the text"
        )
    return (h + h.T) / (2 * mean) + _DAMPING * torch.eye(len(h), dtype=torch.float64, device=h.device)
