"""The retrieval model's network: a Llama with grouped queries, as llama.cpp computes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONTEXT = 2048
"""Tokens that the model is trained for."""

LOOK_BACK, FAST_PAIRS, CONSTANT, SHARPNESS = 3, 6, 4.0, 1.6
"""Key heads that begin by looking back, the pairs of RoPE's channels in which they do, and the sizes of the
constant channel and of what it gives (Retriever._look_back)."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; heads have 64 channels."""

    hidden: int = 256
    layers: int = 4
    heads: int = 16
    kv_heads: int = 8
    ffn: int = 512
    head: int = 64
    rope_base: float = 500_000.0


class Block(nn.Module):
    """A Llama block; RoPE turns adjacent channels, as llama.cpp does for this architecture."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.attn_norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.attn_q = nn.Linear(shape.hidden, shape.heads * shape.head, bias=False)
        self.attn_k = nn.Linear(shape.hidden, shape.kv_heads * shape.head, bias=False)
        self.attn_v = nn.Linear(shape.hidden, shape.kv_heads * shape.head, bias=False)
        self.attn_output = nn.Linear(shape.heads * shape.head, shape.hidden, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.ffn_gate = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.ffn_up = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.ffn_down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """[batch, n, hidden] of x [batch, n, hidden]; turns complex64 [n, head / 2]. All float32."""
        batch, n, _ = x.shape
        h = self.attn_norm(x)

        def heads(values: Tensor, count: int) -> Tensor:
            return values.view(batch, n, count, self.shape.head).transpose(1, 2)

        q = turned(heads(self.attn_q(h), self.shape.heads), turns)
        k = turned(heads(self.attn_k(h), self.shape.kv_heads), turns)
        v = heads(self.attn_v(h), self.shape.kv_heads)
        group = self.shape.heads // self.shape.kv_heads
        k, v = (values.repeat_interleave(group, dim=1) for values in (k, v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_output(seen.transpose(1, 2).reshape(batch, n, -1))
        h = self.ffn_norm(x)
        down: Tensor = self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))
        return x + down


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """RoPE of x [batch, heads, n, head]; turns complex64 [n, head / 2]."""
    pairs = torch.view_as_complex(x.contiguous().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)


class Retriever(nn.Module):
    """The model; parameters have the names of GGUF's tensors."""

    def __init__(self, shape: Shape, tokens: int) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(tokens, shape.hidden)
        blocks = [Block(shape) for _ in range(shape.layers)]
        self.blk = nn.ModuleList(blocks)
        self.output_norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.output = nn.Linear(shape.hidden, tokens, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=1.0 if "embd" in name else parameter.shape[1] ** -0.5)
        for block in blocks:
            nn.init.zeros_(block.ffn_down.weight)
        self._look_back(blocks[0])

    @torch.no_grad()
    def _look_back(self, first: Block) -> None:
        """Let the first key heads of the ``first`` block begin by looking 1, 2, 3 tokens back: what to
        compare with is there at once, and training need not find it.

        A channel of all embeddings is constant; from it alone come keys u and queries turned back by the
        distance, with u on the fastest pairs of RoPE, so that a score is largest at that distance.
        """
        self.token_embd.weight[:, 0] = CONSTANT
        size = self.shape.head
        speeds = self.shape.rope_base ** -(torch.arange(FAST_PAIRS) * 2 / size)
        group = self.shape.heads // self.shape.kv_heads
        for g in range(min(LOOK_BACK, self.shape.kv_heads // 2)):
            key = first.attn_k.weight[g * size : (g + 1) * size]
            key.zero_()
            key[0 : 2 * FAST_PAIRS : 2, 0] = SHARPNESS
            for h in range(g * group, (g + 1) * group):
                query = first.attn_q.weight[h * size : (h + 1) * size]
                query.zero_()
                query[0 : 2 * FAST_PAIRS : 2, 0] = SHARPNESS * torch.cos(speeds * (g + 1))
                query[1 : 2 * FAST_PAIRS : 2, 0] = -SHARPNESS * torch.sin(speeds * (g + 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, n, vocabulary] of int64 tokens [batch, n]."""
        steps = torch.arange(0, self.shape.head, 2) / self.shape.head
        angles = torch.outer(torch.arange(tokens.shape[1]).float(), self.shape.rope_base**-steps)
        turns = torch.polar(torch.ones_like(angles), angles)
        x = self.token_embd(tokens)
        for block in self.blk:
            x = block(x, turns)
        logits: Tensor = self.output(self.output_norm(x))
        return logits
