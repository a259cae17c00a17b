"""The vocabulary of calibration: sites, their statistics, and what a transform does to them.

A site is what some weight matrices of a block read, as llama.cpp's graph says (observe/). Activations are
row vectors x of n channels; a linear layer computes y = x W^T with W [n_out, n].

A transform replaces x by x' = x T and W by W' = W T^-T, so that x' W'^T = x W^T, with

    T = diag(1 / diag) (I (x) head) (left (x) right)

The first two factors are folded into the tensors before the site (``Fold``), the Kronecker product runs
online: with x reshaped to X [n1, n2] (row-major), x' is left^T X right. docs/flatquant.md has the
mathematics, docs/gguf.md the layout in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """A matrix that reads a site. ``tensor``: its GGUF name. ``weight``: float32 [n_out, n], or [experts,
    n_out, n], rows in the file's order."""

    tensor: str
    weight: Tensor


@dataclass(frozen=True)
class Fold:
    """Where the offline part of a site's transform goes: the channels of the site are elements (``rows`` =
    False: a norm's gain, GGUF vector [n]) or output rows first .. first + n - 1 of a matrix (``rows`` =
    True, GGUF matrix [n_out, n_in] or [experts, n_out, n_in]; with ``n`` above n_out the rows of all matrices
    of the stack, one after the other). ``bias``: GGUF vector, or [experts, n_out], that is added to the same
    channels, or "". The n_kv * head_dim rows of v each feed several channels."""

    tensor: str
    rows: bool
    first: int = 0
    n: int = 0
    bias: str = ""


@dataclass(frozen=True)
class Site:
    """``anchor``: GGUF name, without ".weight", of the first of ``linears``; transform tensors are named
    after it. ``n``: channels. ``linears``: the matrices that read the site behind the online part.
    ``folded``: those that are rounded too, but read it in front of the online part, so only the folded part
    concerns them. ``also``: GGUF names of matrices that stay in float32 and read it there (the router of a
    mixture). ``online``: whether the graph lets a Kronecker product run before ``linears``. ``fold`` is
    None where nothing can be folded. ``n_head``, ``n_head_kv``, ``head_dim``: of what attention makes of v,
    0 elsewhere. ``mixes_heads``: whether what reads v's rows is linear in all channels of a head together,
    so that ``SiteTransform.head`` can be folded."""

    anchor: str
    n: int
    linears: tuple[Linear, ...]
    fold: Fold | None
    folded: tuple[Linear, ...] = ()
    also: tuple[str, ...] = ()
    online: bool = True
    n_head: int = 0
    n_head_kv: int = 0
    head_dim: int = 0
    mixes_heads: bool = True


@dataclass(frozen=True)
class SiteStats:
    """What calibration saw at a site, all float32. ``hessian`` [n, n]: mean of x^T x over tokens.
    ``absmax`` [n]: largest |x| per channel. ``sample`` [m, n]: some tokens' activations, drawn evenly.
    ``expert_hessian``: [n, n] of each expert, mean over the tokens routed to each expert, or None for dense
    sites and where too few tokens reach an expert; ``expert_diagonal`` [experts, n]: its diagonals, also
    there; ``expert_tokens`` int64 [experts]."""

    hessian: Tensor
    absmax: Tensor
    sample: Tensor
    n_tokens: int
    expert_hessian: Sequence[Tensor] | None = None
    expert_diagonal: Tensor | None = None
    expert_tokens: Tensor | None = None


@dataclass(frozen=True)
class ActivationSpec:
    """How activations are rounded at run time. ``bits``: 8 or 4. ``group``: values that share a scale, 0
    for the whole token (llama.cpp's own Q8_K: 8 bits, 256)."""

    bits: int = 8
    group: int = 256


@dataclass(frozen=True)
class SiteTransform:
    """A solved transform T, float64 throughout. ``diag`` [n]. ``head`` [head_dim, head_dim]: behind
    attention only, the same for all heads, or None. ``left`` [n1, n1] and ``right`` [n2, n2]: None for the
    identity. ``hadamard``: order (a power of two) of a normalised Walsh-Hadamard matrix that takes
    right's place, 0 for none. ``clip``: factor on the token's largest |x'| at which x' is cut off, 1
    for none."""

    diag: Tensor
    head: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    hadamard: int = 0
    clip: float = 1.0
    notes: dict[str, float] = field(default_factory=dict)  # figures for the report: condition numbers, losses

    @property
    def n(self) -> int:
        return int(self.diag.numel())

    @property
    def online(self) -> bool:
        """Whether anything is left to do at run time besides the clip."""
        return self.left is not None or self.right is not None or self.hadamard > 1

    @property
    def is_identity(self) -> bool:
        """Whether nothing is folded, nothing runs online, and nothing is clipped."""
        return not self.online and self.clip == 1 and self.head is None and bool((self.diag == 1).all())

    def kron(self) -> tuple[Tensor, Tensor]:
        """left [n1, n1] and right [n2, n2] with identities and Hadamard matrices written out, float64."""
        right = hadamard(self.hadamard) if self.hadamard > 1 else self.right
        if right is None:
            n1 = self.left.shape[0] if self.left is not None else 1
            right = torch.eye(self.n // n1, dtype=torch.float64)
        left = (
            self.left if self.left is not None else torch.eye(self.n // right.shape[0], dtype=torch.float64)
        )
        return left, right

    def apply(self, x: Tensor) -> Tensor:
        """x T for x [..., n], in x's dtype."""
        left, right = (m.to(x.dtype) for m in self.kron())
        x = x / self.diag.to(x.dtype)
        if self.head is not None:
            head = self.head.to(x.dtype)
            x = (_split(x, head.shape[0]) @ head).flatten(-2)
        return _kron(x, left, right)

    def invert(self, x: Tensor) -> Tensor:
        """x' T^-1 for x' [..., n]."""
        left, right = (torch.linalg.inv(m).to(x.dtype) for m in self.kron())
        x = _kron(x, left, right)
        if self.head is not None:
            head = torch.linalg.inv(self.head).to(x.dtype)
            x = (_split(x, head.shape[0]) @ head).flatten(-2)
        return x * self.diag.to(x.dtype)

    def dual(self) -> SiteTransform:
        """The transform T^-T, which acts on the rows of weights: weight(W) = dual().apply(W)."""

        def dual(matrix: Tensor | None) -> Tensor | None:
            return None if matrix is None else torch.linalg.inv(matrix).T.contiguous()

        return replace(
            self,
            diag=1 / self.diag,
            head=dual(self.head),
            left=dual(self.left),
            right=dual(self.right),
            clip=1.0,
        )

    def weight(self, w: Tensor) -> Tensor:
        """W T^-T for W [..., n]: the weights that read x'. Computed in float64, returned in W's dtype."""
        return self.dual().apply(w.double()).to(w.dtype)

    @property
    def offline(self) -> SiteTransform:
        """The part that is folded: diagonal and head."""
        return SiteTransform(self.diag, head=self.head)

    def effective_weight(self, w: Tensor) -> Tensor:
        """W' T^T: what weights W' that read x' do to the untransformed x."""
        return self.dual().invert(w.double()).to(w.dtype)

    def hessian(self, h: Tensor) -> Tensor:
        """T^T H T for H [..., n, n]: the mean of x'^T x'. float64."""
        once = self.apply(h.double())
        return self.apply(once.transpose(-1, -2)).transpose(-1, -2)


def _split(x: Tensor, columns: int) -> Tensor:
    """x [..., rows * columns] as [..., rows, columns]."""
    return x.reshape(*x.shape[:-1], -1, columns)


def _kron(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    product: Tensor = left.T @ _split(x, right.shape[0]) @ right
    return product.flatten(-2)


def identity(n: int) -> SiteTransform:
    """The transform that changes nothing."""
    return SiteTransform(torch.ones(n, dtype=torch.float64))


def hadamard(order: int) -> Tensor:
    """The normalised Walsh-Hadamard matrix (Sylvester's), [order, order] float64, symmetric and
    orthogonal: element (i, j) is (-1)^popcount(i & j) / sqrt(order). ``order`` is a power of two."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    if h.shape[0] != order:
        raise ValueError(f"Walsh-Hadamard matrices have orders that are powers of two, not {order}")
    normalised: Tensor = h / order**0.5
    return normalised
