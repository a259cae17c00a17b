"""Rounding of activations as llama.cpp does it at run time, in torch and with gradients.

A token's values are cut off at clip times the largest of them; each group of ``group`` values (the whole
token for 0) is then rounded to multiples of its largest value / (2^(bits - 1) - 1), as Q8_K, Q8_0 and
GGML_EXT_OP_ACT_ROUND do."""

from __future__ import annotations

import torch
from torch import Tensor

from ggml_ext.methods.sites import ActivationSpec

FLOAT_BITS = 16  # activations of so many bits are not rounded


def levels(spec: ActivationSpec) -> int:
    """Largest integer that an activation is rounded to."""
    return int(2 ** (spec.bits - 1) - 1)


def grouped(x: Tensor, group: int) -> Tensor:
    """x [..., n] as [..., groups, group]; a ragged last group is filled up with zeros."""
    n = x.shape[-1]
    size = min(group, n) if group > 0 else n
    if n % size:
        x = torch.nn.functional.pad(x, (0, size - n % size))
    return x.reshape(*x.shape[:-1], -1, size)


def fake_quant_activation(x: Tensor, spec: ActivationSpec, clip: float | Tensor = 1.0) -> Tensor:
    """x [..., n] after clipping and rounding, in x's dtype. Rounding passes gradients straight through; a
    clip that is a tensor gets its own."""
    if isinstance(clip, Tensor) or clip != 1.0:
        limit = x.abs().amax(-1, keepdim=True) * clip
        x = torch.minimum(torch.maximum(x, -limit), limit)
    if spec.bits >= FLOAT_BITS:
        return x
    q_max = levels(spec)
    groups = grouped(x, spec.group)
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / q_max
    codes = groups / scale
    codes = codes + (codes.round().clamp(-q_max, q_max) - codes).detach()
    return (codes * scale).flatten(-2)[..., : x.shape[-1]]


def expected_error(x: Tensor, spec: ActivationSpec, clip: float | Tensor) -> Tensor:
    """Expected squared error of each channel, [n], of rounding the tokens x [m, n], differentiable: step^2 /
    12 with the step of the channel's group, plus what the clip cuts off."""
    limit = x.abs().amax(-1, keepdim=True) * clip
    groups = grouped(x, spec.group)
    largest = torch.minimum(groups.abs().amax(-1), limit)
    rounding = largest.square().mean(0) / (12 * levels(spec) ** 2)
    cut = (x.abs() - limit).clamp_min(0).square().mean(0)
    return rounding.repeat_interleave(groups.shape[-1])[: x.shape[-1]] + cut
