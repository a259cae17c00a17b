#!/usr/bin/env python3
"""What a rotated scalar cache of 2 bits would cost: the rival of coupled codes in docs/kv-cache.md.

PyTorch runs a Llama (architecture llama, no biases) in float32. Keys behind RoPE and values of old tokens are
turned by a Hadamard matrix, head by head, and take one of the four levels that are best for a Gaussian (Max
1960), with the best scale for each token and head: 2 bits and 16 per head. Sinks and recent tokens stay as
they are, as in a cache of ours whose blocks have 64 slots. The second half of each window is scored.

    scripts/scalar_cache.py MODEL.gguf TEXT [--ctx 2048] [--windows 8] [--recent 128]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from ggml_ext.runtime.llama import Model

SINK, BLOCK = 16, 64
LEVELS = torch.tensor([-1.51, -0.4528, 0.4528, 1.51])  # of a standard Gaussian, two bits

Rounded = Callable[[Tensor], Tensor]


def hadamard(order: int) -> Tensor:
    """[order, order], orthonormal; a power of two."""
    found = torch.ones(1, 1)
    while len(found) < order:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found / order**0.5


def scalar(x: Tensor) -> Tensor:
    """x [tokens, heads, d] as the scalar cache would give it back."""
    turn = hadamard(x.shape[-1])
    y = x @ turn
    z = y / y.square().mean(-1, keepdim=True).sqrt()
    level = LEVELS[(z[..., None] - LEVELS).abs().argmin(-1)]
    scale = (y * level).sum(-1, keepdim=True) / level.square().sum(-1, keepdim=True)
    return (level * scale) @ turn.T


class Llama:
    """Weights of a GGUF file, and what they compute of one window."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)

        def key(name: str) -> float:
            return float(reader.fields[f"llama.{name}"].contents())

        self.weights = {
            t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).astype(np.float32))
            for t in reader.tensors
        }
        self.layers, self.heads = int(key("block_count")), int(key("attention.head_count"))
        self.kv_heads, self.epsilon = (
            int(key("attention.head_count_kv")),
            key("attention.layer_norm_rms_epsilon"),
        )
        self.base = key("rope.freq_base")
        self.size = len(self.weights["blk.0.attn_q.weight"]) // self.heads

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.weights[f"{name}.weight"]
        )

    def _turned(self, x: Tensor) -> Tensor:
        """RoPE of adjacent channels, x [tokens, heads, size]."""
        rates = self.base ** (-torch.arange(0, self.size, 2, dtype=torch.float64) / self.size)
        angles = (torch.arange(len(x), dtype=torch.float64)[:, None] * rates)[:, None]
        turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    def _attention(self, layer: int, x: Tensor, recent: int, rounded: Rounded | None) -> Tensor:
        q, k, v = (
            (x @ self.weights[f"blk.{layer}.attn_{w}.weight"].T).unflatten(-1, (n, self.size))
            for w, n in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
        )
        q, k = self._turned(q), self._turned(k)
        at = torch.arange(len(x))
        # A block is old once all of it is `recent` tokens behind the block of the query.
        old = (at // BLOCK * BLOCK + BLOCK - 1)[None] < (at // BLOCK * BLOCK - recent + 1)[:, None]
        old = old & (at[None] >= SINK) & (rounded is not None)
        k_old, v_old = (k, v) if rounded is None else (rounded(k), rounded(v))
        out = torch.empty_like(q)
        for head in range(self.heads):
            kv = head * self.kv_heads // self.heads
            scores = torch.where(old, q[:, head] @ k_old[:, kv].T, q[:, head] @ k[:, kv].T)
            scores = (scores * self.size**-0.5).masked_fill(at[None] > at[:, None], -torch.inf)
            weight = torch.softmax(scores, -1)
            out[:, head] = (weight * ~old) @ v[:, kv] + (weight * old) @ v_old[:, kv]
        return out.flatten(1)

    def log_probabilities(self, tokens: Tensor, recent: int, rounded: Rounded | None = None) -> Tensor:
        """Of the second half of a window, [n, vocabulary]."""
        h = self.weights["token_embd.weight"][tokens]
        for layer in range(self.layers):
            name = f"blk.{layer}"
            attended = self._attention(layer, self._norm(h, f"{name}.attn_norm"), recent, rounded)
            h = h + attended @ self.weights[f"{name}.attn_output.weight"].T
            x = self._norm(h, f"{name}.ffn_norm")
            gate, up, down = (self.weights[f"{name}.ffn_{part}.weight"] for part in ("gate", "up", "down"))
            h = h + (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        head = self.weights.get("output.weight", self.weights["token_embd.weight"])
        half = h[len(tokens) // 2 : -1]
        return torch.log_softmax(self._norm(half, "output_norm") @ head.T, -1)


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--recent", type=int, default=128)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    with Model(options.model, weights=False) as model:
        tokens = model.tokenize(options.text.read_bytes()).astype(np.int64)
    windows = torch.from_numpy(tokens[: len(tokens) // options.ctx * options.ctx]).view(-1, options.ctx)
    llama = Llama(options.model)
    found = []
    for number, window in enumerate(windows[: options.windows], 1):
        exact, coded = (llama.log_probabilities(window, options.recent, how) for how in (None, scalar))
        found.append(float((exact.exp() * (exact - coded)).sum(-1).mean()))
        if number > 1:
            error = np.std(found, ddof=1) / number**0.5
            print(f"{number} windows: KL divergence {np.mean(found):.6f} ± {error:.6f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
