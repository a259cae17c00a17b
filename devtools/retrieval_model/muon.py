"""The optimiser of the retrieval model's matrices."""

from __future__ import annotations

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): the momentum of a matrix, made orthogonal. In float32, since torch's own
    takes bfloat16, which processors without it emulate at a tenth of the speed. Scaled as AdamW's steps are
    (Liu et al. 2025, arXiv:2502.16982)."""

    MOMENTUM = 0.95

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all matrices."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - self.MOMENTUM)
                update = orthogonal(p.grad.lerp(state["momentum"], self.MOMENTUM))
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonal(x: Tensor) -> Tensor:
    """A matrix [m, n] of about the same singular vectors with singular values near 1: five Newton-Schulz
    steps."""
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        square = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    found: Tensor = wide if x.shape[0] <= x.shape[1] else wide.T
    return found
