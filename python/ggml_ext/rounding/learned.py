"""Learned rounding: sign descent on the block's output error, after AutoRound (arXiv 2309.05516).

Scales stay as the encoder or GPTQ left them. Each weight has a position between the levels of its grid; its
level is the nearest one. Positions move by the sign of the straight-through gradient of

    |block(hidden; rounded weights and activations) - block(hidden)|^2

with a step that falls linearly to zero. The first level of every weight is the one it came with. The result
is the best state seen on batches that are kept out of the training: never worse than the start on those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ggml_ext.rounding import grid as grids
from ggml_ext.rounding.grid import Bytes
from ggml_ext.sites import SiteKind

_MAX_OFFSET = 0.2  # of a gap: how far a start may lie from its level towards the weight; docs/rounding.md
_TRAVEL = 0.4  # of a gap: how far a position gets if all its gradients have the same sign
_CHECKS = 8  # evaluations on the batches kept out, spread over the steps
_KEPT_OUT = 8  # one batch in so many, 4 at most

Inputs = Mapping[SiteKind, Callable[[Tensor], Tensor]]


class Runs(Protocol):
    """What is needed of blocks.Block."""

    def run(
        self, hidden: Tensor, *, weights: Mapping[str, Tensor] | None = None, inputs: Inputs | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Matrix:
    """A rounded matrix of the block. ``data`` uint8 [rows, row bytes]: its encoding, experts' rows one after
    another. ``wanted`` float32 [rows, n]: the weights before rounding. ``original``: maps weights [rows, n]
    as they are rounded, in the transformed basis, to the block's own basis and shape; linear."""

    tensor: str
    type_name: str
    data: Bytes
    wanted: Tensor
    original: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Learned:
    """``data``: tensor -> encoding. ``before``, ``after``: mean squared error of the block's output, relative
    to the output's mean square, on the batches kept out."""

    data: dict[str, Bytes] = field(repr=False)
    before: float
    after: float


class _Positions:
    """The positions of one matrix's weights, in gaps from their first level."""

    def __init__(self, matrix: Matrix, device: torch.device) -> None:
        grid = grids.decode(matrix.type_name, matrix.data)
        groups = grid.scale.shape

        def on_device(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self.matrix = matrix
        self._shape = grid.levels.shape
        self._grouped = (*groups, grid.group)
        self._scale, self._offset = on_device(grid.scale)[..., None], on_device(grid.offset)[..., None]
        self._book = on_device(grid.book).long()
        self._books = on_device(grid.books)
        self._middles = (self._books[:, 1:] + self._books[:, :-1]) / 2
        gaps = np.gradient(grid.books, axis=1).astype(np.float32)
        levels = on_device(grid.levels).long().reshape(self._grouped)
        self._gap = on_device(gaps)[self._book[..., None], levels] * self._scale.abs()
        self._start = self._value(levels)
        distance = (matrix.wanted.to(device).reshape(self._grouped) - self._start) / self._gap
        at = torch.nan_to_num(distance, 0.0, 0.0, 0.0).clamp(-_MAX_OFFSET, _MAX_OFFSET)
        self.at = at.requires_grad_(True)

    def _value(self, levels: Tensor) -> Tensor:
        return self._scale * self._books[self._book[..., None], levels] + self._offset

    def levels(self) -> Tensor:
        """The nearest level of each position, int64 [rows, groups, group]. A position that has not left its
        first level's cell keeps that level."""
        position = (self._start + self.at.detach() * self._gap - self._offset) / self._scale
        middles = self._middles[self._book]
        levels = torch.zeros(self._grouped, dtype=torch.int64, device=position.device)
        for i in range(middles.shape[-1]):
            levels += position > middles[..., i : i + 1]
        return levels

    def rounded(self) -> Tensor:
        """The rounded weights in the block's own basis, gradients passed straight through."""
        position = self._start + self.at * self._gap
        value = position + (self._value(self.levels()) - position).detach()
        return self.matrix.original(value.reshape(self._shape))

    def encoded(self) -> Bytes:
        levels = self.levels().reshape(self._shape).to(torch.uint8).cpu().numpy()
        return grids.encode(self.matrix.type_name, self.matrix.data, levels)


def refine_block(
    block: Runs,
    matrices: Sequence[Matrix],
    batches: Sequence[Tensor],
    targets: Sequence[Tensor],
    inputs: Inputs,
    *,
    steps: int = 200,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Learned:
    """Learns the levels of ``matrices`` together.

    batches, targets: hidden states [batch, tokens, hidden] and the float block's outputs for them; one pair
    per step, drawn at random with ``seed``; every eighth is kept out (a single one is used for both). inputs:
    what rounding does to the activations of each site, in the block's own basis. progress gets the relative
    error of each step's batch. Deterministic with one thread.
    """
    device = batches[0].device
    trained = [_Positions(matrix, device) for matrix in matrices]
    checked = list(range(0, len(batches), _KEPT_OUT))[:4]
    used = [i for i in range(len(batches)) if i not in checked] or checked

    def error(pairs: Sequence[int]) -> Tensor:
        weights = {positions.matrix.tensor: positions.rounded() for positions in trained}
        losses = []
        for i in pairs:
            output, target = block.run(batches[i], weights=weights, inputs=inputs).float(), targets[i].float()
            losses.append((output - target).square().mean() / target.square().mean())
        return torch.stack(losses).mean()

    def check() -> float:
        with torch.no_grad():
            return float(error(checked))

    before = best = check()
    data = {matrix.tensor: matrix.data for matrix in matrices}
    order = torch.Generator().manual_seed(seed)
    for step in range(steps):
        i = used[int(torch.randint(len(used), (), generator=order))]
        loss = error([i])
        gradients = torch.autograd.grad(loss, [positions.at for positions in trained])
        rate = 2 * _TRAVEL / steps * (1 - step / steps)
        with torch.no_grad():
            for positions, gradient in zip(trained, gradients, strict=True):
                positions.at -= rate * gradient.sign()
        if progress is not None:
            progress(float(loss))
        if (step + 1) * _CHECKS // steps > step * _CHECKS // steps:
            now = check()
            if now < best:
                best = now
                data = {positions.matrix.tensor: positions.encoded() for positions in trained}
    return Learned(data, before, best)
