"""Small random sites with correlated activations, and their statistics."""

from __future__ import annotations

import torch

from ggml_ext.methods.sites import Fold, Linear, Site, SiteStats

KINDS = ("norm", "attention", "middle", "experts", "unfoldable")


def make(kind: str, *, seed: int) -> tuple[Site, SiteStats]:
    """One of KINDS: a norm's output, grouped heads, a down-projection's input, a mixture's, a site without
    fold."""
    if kind == "attention":
        return attention(4, 2, 16, seed=seed)
    if kind == "middle":
        return plain(96, seed=seed, names=("ffn_down",))
    if kind == "experts":
        return plain(64, seed=seed, experts=3)
    return plain(64, seed=seed, foldable=kind != "unfoldable")


def plain(
    n: int,
    *,
    seed: int,
    names: tuple[str, ...] = ("ffn_gate", "ffn_up"),
    experts: int = 0,
    foldable: bool = True,
    outliers: int = 0,
) -> tuple[Site, SiteStats]:
    """A site of n channels that one or two matrices read."""
    suffix = "_exps" if experts else ""
    linears = tuple(_linear(f"blk.0.{name}{suffix}.weight", 24, n, experts, seed) for name in names)
    fold = Fold("blk.0.ffn_norm.weight", rows=False, n=n) if foldable else None
    site = Site(f"blk.0.{names[0]}{suffix}", n, linears, fold)
    return site, _stats(n, seed, experts, outliers)


def attention(n_head: int, n_head_kv: int, head_dim: int, *, seed: int) -> tuple[Site, SiteStats]:
    """The input of an output projection whose value heads are shared."""
    n = n_head * head_dim
    fold = Fold("blk.0.attn_v.weight", rows=True, n=n_head_kv * head_dim)
    linear = _linear("blk.0.attn_output.weight", 24, n, 0, seed)
    site = Site(
        "blk.0.attn_output",
        n,
        (linear,),
        fold,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
    )
    return site, _stats(n, seed, 0, 0)


def block(*, hidden: int, ffn: int, heads: int, kv_heads: int) -> dict[str, Site]:
    """The sites of a Llama block by their anchors; weights zero."""
    head_dim = hidden // heads
    shapes: dict[str, tuple[int, tuple[int, ...]]] = {
        "attn_in": (hidden, (hidden, kv_heads * head_dim, kv_heads * head_dim)),
        "attn_out": (hidden, (hidden,)),
        "ffn_in": (hidden, (ffn, ffn)),
        "ffn_mid": (ffn, (hidden,)),
    }
    sites: dict[str, Site] = {}
    for anchor, (n, rows) in shapes.items():
        linears = tuple(Linear(f"{anchor}.{i}", torch.zeros(m, n)) for i, m in enumerate(rows))
        n_head, n_head_kv, dim = (heads, kv_heads, head_dim) if anchor == "attn_out" else (0, 0, 0)
        fold = Fold("f", rows=False, n=n)
        sites[anchor] = Site(anchor, n, linears, fold, n_head=n_head, n_head_kv=n_head_kv, head_dim=dim)
    return sites


def _linear(tensor: str, rows: int, n: int, experts: int, seed: int) -> Linear:
    generator = torch.Generator().manual_seed(seed + sum(map(ord, tensor)))
    shape = (experts, rows, n) if experts else (rows, n)
    return Linear(tensor, torch.randn(shape, generator=generator) / n**0.5)


def _stats(n: int, seed: int, experts: int, outliers: int) -> SiteStats:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator) / n**0.5 + torch.eye(n)
    x = torch.randn(4 * n + 64, n, generator=generator) @ mix
    x *= torch.linspace(0.3, 2, n)
    x[:, :outliers] *= 30
    h = x.T @ x / len(x)
    own = torch.stack([h * (1 + e) for e in range(experts)]) if experts else None
    tokens = torch.arange(experts) if experts else None  # the first expert saw none
    return SiteStats(h, x.abs().amax(0), x, len(x), own, expert_tokens=tokens)
