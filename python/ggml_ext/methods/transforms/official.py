"""Transforms that the official FlatQuant code has saved (github.com/ruikangliu/FlatQuant).

Its ``flat_matrices.pth`` is a dictionary: block index -> name within the decoder layer -> tensor,
with these names (save_flat_matrices in flatquant/flat_utils.py, modules in flatquant/trans_utils.py):

    self_attn.ln_trans.{matrix_left, matrix_right, diag_scale}      attn_in
    self_attn.o_trans.matrix          over heads                    attn_out
    self_attn.vcache_trans.matrix     within a head                 attn_out
    mlp.up_gate_trans.{matrix_left, matrix_right, diag_scale}       ffn_in
    mlp.down_trans.{matrix_left, matrix_right, diag_scale}          ffn_mid
    self_attn.kcache_trans.matrix                                   the K cache (load_official_kv)
    ....act_quantizer.clip_factor_a_max, clip_factor_a_min          logits of activation clips
    ....clip_factor_w_max, clip_factor_w_min                        of the weights' clips: not used here

There x' = (x diag_scale) (matrix_left (x) matrix_right), so our diag is 1 / diag_scale and left and right are
the same matrices; ``*_inv`` and ``*_inv_t`` are their saved inverses, which are computed here instead.
Quantisers there belong to a linear; a site takes the clip of the first of its linears, the smaller of both
signs'.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.files import require_no_device
from ggml_ext.hf.folder import pickled_call
from ggml_ext.methods.sites import SiteTransform
from ggml_ext.methods.transforms.flatquant import MAX_CONDITION, condition
from ggml_ext.methods.transforms.structure import stored

Saved = Mapping[str, Tensor]
SiteKind = Literal["attn_in", "attn_out", "ffn_in", "ffn_mid"]
SITE_KINDS: tuple[SiteKind, ...] = ("attn_in", "attn_out", "ffn_in", "ffn_mid")

_KRONECKER: dict[SiteKind, tuple[str, str]] = {  # site -> its transform, a linear that reads it
    "attn_in": ("self_attn.ln_trans", "self_attn.q_proj"),
    "ffn_in": ("mlp.up_gate_trans", "mlp.up_proj"),
    "ffn_mid": ("mlp.down_trans", "mlp.down_proj"),
}
_EXPORT = "save it with the official code's save_flat_matrices"


def load_official(path: Path) -> list[dict[SiteKind, SiteTransform]]:
    """The transforms of every block, in order, with factors rounded to F16 as the GGUF file stores them.

    path: flat_matrices.pth, or the folder that holds it. Unpickles tensors only (weights_only).
    Raises GgmlExtError for a file that is none, parameters that the code has not turned into matrices yet
    (flat_parameters.pth), a missing matrix, shapes that do not fit together, NaN or Inf, and a factor with a
    condition number above 100.
    """
    path = path / "flat_matrices.pth" if path.is_dir() else path
    blocks = _load(path)
    return [_block(blocks[index], f"{path}: block {index}") for index in range(len(blocks))]


def sha256(path: Path) -> str:
    """SHA-256 of the file that load_official reads, hexadecimal. Raises GgmlExtError if it cannot be read."""
    path = path / "flat_matrices.pth" if path.is_dir() else path
    require_no_device(path)
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as exc:
        raise GgmlExtError(f"{path}: {exc.strerror or exc}; check the path") from exc


def load_official_kv(path: Path) -> list[Tensor | None]:
    """P of k' = k P for the K cache of every block, [head_dim, head_dim] float64, None where none was saved.
    Errors as load_official."""
    path = path / "flat_matrices.pth" if path.is_dir() else path
    blocks = _load(path)
    name = "self_attn.kcache_trans.matrix"
    return [
        _matrix(blocks[i], name, f"{path}: block {i}") if name in blocks[i] else None
        for i in range(len(blocks))
    ]


def _load(path: Path) -> dict[int, Saved]:
    require_no_device(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as exc:
        raise GgmlExtError(f"{path}: {exc.strerror or exc}; check the path") from exc
    except Exception as exc:  # of every kind, since the file decides what fails
        wanted = pickled_call(exc)
        if wanted:
            problem = f"no file of tensors only, wants to call {wanted}; do not trust it"
        else:
            problem = f"no file of tensors saved by torch; {_EXPORT}"
        raise GgmlExtError(f"{path}: {problem}") from exc
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(key, int) for key in loaded):
        raise GgmlExtError(f"{path}: not a dictionary of blocks 0, 1, ...; {_EXPORT}")
    if set(loaded) != set(range(len(loaded))):
        raise GgmlExtError(f"{path}: not a dictionary of blocks 0, 1, ...; {_EXPORT}")
    for index, block in loaded.items():
        if not isinstance(block, Mapping) or not all(isinstance(v, Tensor) for v in block.values()):
            raise GgmlExtError(f"{path}: block {index} is no dictionary of tensors; {_EXPORT}")
        if any(".linear_" in name or name.endswith(".linear.weight") for name in block):
            raise GgmlExtError(f"{path}: block {index} holds parameters of matrices; {_EXPORT}")
    return loaded


def _block(saved: Saved, where: str) -> dict[SiteKind, SiteTransform]:
    found: dict[SiteKind, SiteTransform] = {}
    for kind, (name, linear) in _KRONECKER.items():
        left, right = (_matrix(saved, f"{name}.matrix_{side}", where) for side in ("left", "right"))
        n = left.shape[0] * right.shape[0]
        diag = torch.ones(n, dtype=torch.float64)
        if f"{name}.diag_scale" in saved:
            diag = 1 / _finite(saved, f"{name}.diag_scale", where)
            if diag.shape != (n,) or not bool(diag.isfinite().all()):
                raise GgmlExtError(f"{where}: {name}.diag_scale is not {n} values other than 0; {_EXPORT}")
        found[kind] = SiteTransform(
            diag, left=stored(left), right=stored(right), clip=_clip(saved, linear, where)
        )
    heads, head = (_matrix(saved, f"self_attn.{name}.matrix", where) for name in ("o_trans", "vcache_trans"))
    found["attn_out"] = SiteTransform(
        torch.ones(len(heads) * len(head), dtype=torch.float64),
        head=head,
        left=stored(heads),
        clip=_clip(saved, "self_attn.o_proj", where),
    )
    for kind, transform in found.items():
        if not condition(transform) <= MAX_CONDITION:
            raise GgmlExtError(
                f"{where}: a factor of {kind} has the condition number {condition(transform):.0f}, more than "
                f"{MAX_CONDITION:.0f}; train it again"
            )
    return {kind: found[kind] for kind in SITE_KINDS}


def _matrix(saved: Saved, name: str, where: str) -> Tensor:
    matrix = _finite(saved, name, where)
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise GgmlExtError(f"{where}: {name} is no square matrix but {list(matrix.shape)}; {_EXPORT}")
    return matrix


def _finite(saved: Saved, name: str, where: str) -> Tensor:
    if name not in saved:
        raise GgmlExtError(f"{where}: no {name}; {_EXPORT}")
    tensor = saved[name]
    # A view may repeat the bytes of its file to any size.
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.is_floating_point()
    if not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise GgmlExtError(f"{where}: {name} is no tensor of floats with values of its own; {_EXPORT}")
    values = tensor.double()
    if not bool(values.isfinite().all()):
        raise GgmlExtError(f"{where}: {name} holds NaN or Inf; train it again")
    return values


def _clip(saved: Saved, linear: str, where: str) -> float:
    """The smaller of the factors on the largest and on the smallest activation; 1 where none was learned."""
    names = [f"{linear}.act_quantizer.clip_factor_a_{end}" for end in ("max", "min")]
    logits = [_finite(saved, name, where) for name in names if name in saved]
    return min((float(logit.sigmoid().min()) for logit in logits), default=1.0)
