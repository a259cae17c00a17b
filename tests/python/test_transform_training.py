"""Transforms trained on a block's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import random_sites
from ggml_ext.sites import ActivationSpec, Site, SiteKind, SiteStats, SiteTransform
from ggml_ext.transforms import TransformRequest, solve, train

A4 = ActivationSpec(4, 0)


class OneLayer:
    """What train needs of a Block: a gated feed-forward layer with the sites ffn_in and ffn_mid."""

    def __init__(self) -> None:
        self.sites: dict[SiteKind, Site] = {
            "ffn_in": random_sites.plain(64, seed=1)[0],
            "ffn_mid": random_sites.plain(24, seed=1, kind="ffn_mid")[0],
        }

    def run(
        self,
        hidden: Tensor,
        *,
        weights: Mapping[str, Tensor] | None = None,
        inputs: Mapping[SiteKind, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        own = {linear.tensor: linear.weight for site in self.sites.values() for linear in site.linears}
        gate, up, down = (
            {**own, **(weights or {})}[f"blk.0.ffn_{name}.weight"] for name in ("gate", "up", "down")
        )
        inputs = inputs or {}
        read = inputs.get("ffn_in", lambda x: x)(hidden)
        middle = torch.nn.functional.silu(read @ gate.T) * (read @ up.T)
        return inputs.get("ffn_mid", lambda x: x)(middle) @ down.T

    def collect(self, batches: Iterable[Tensor], **_: Any) -> dict[SiteKind, SiteStats]:
        seen: dict[SiteKind, list[Tensor]] = {kind: [] for kind in self.sites}

        def observe(kind: SiteKind) -> Callable[[Tensor], Tensor]:
            def take(x: Tensor) -> Tensor:
                seen[kind].append(x.flatten(0, -2))
                return x

            return take

        for hidden in batches:
            self.run(hidden, inputs={kind: observe(kind) for kind in self.sites})
        rows = {kind: torch.cat(parts) for kind, parts in seen.items()}
        return {
            kind: SiteStats(x.T @ x / len(x), x.abs().amax(0), x, len(x), None, None)
            for kind, x in rows.items()
        }


@pytest.fixture(scope="module")
def problem() -> tuple[OneLayer, list[Tensor], list[Tensor]]:
    torch.set_num_threads(1)
    layer = OneLayer()
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=generator) / 8 * torch.linspace(0.1, 3, 64)
    batches = [torch.randn(2, 32, 64, generator=generator) @ mix for _ in range(6)]
    return layer, batches, [layer.run(hidden) for hidden in batches]


def request(name: str, rounding: str = "imatrix", steps: int = 30) -> TransformRequest:
    types = {f"blk.0.ffn_{part}.weight": "q8_0" for part in ("gate", "up")} | {"blk.0.ffn_down.weight": "f16"}
    return TransformRequest(name, types, A4, rounding=rounding, steps=5, train_steps=steps)


def solved(layer: OneLayer, batches: list[Tensor], name: str) -> dict[SiteKind, SiteTransform]:
    stats = layer.collect(batches)
    return {kind: solve(site, stats[kind], request(name)) for kind, site in layer.sites.items()}


@pytest.mark.parametrize("name", ["none", "hadamard", "flatquant"])
def test_training_lowers_the_blocks_error(name: str, problem: Any) -> None:
    """By its own measure, with freshly rounded weights; and the result is still exact and storable."""
    layer, batches, targets = problem
    start = solved(layer, batches, name)
    trained = train(layer, start, batches, targets, request(name))  # type: ignore[arg-type]
    notes = trained["ffn_in"].notes
    if name == "flatquant":
        assert notes["block_loss"] < notes["block_loss_start"]
    assert notes["block_loss"] <= notes["block_loss_start"]
    for kind, site in layer.sites.items():
        transform = trained[kind]
        assert 0 < transform.clip <= 1
        w = site.linears[0].weight.double()
        x = torch.randn(4, site.n).double()
        assert torch.allclose(transform.apply(x) @ transform.weight(w).T, x @ w.T, atol=1e-9)
        for factor in (transform.left, transform.right):
            assert factor is None or torch.equal(factor, factor.half().double())


def test_a_start_that_cannot_be_beaten_is_kept(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are much too long must not harm."""
    layer, batches, targets = problem
    start = solved(layer, batches, "flatquant")
    monkeypatch.setattr("ggml_ext.transforms.training._FACTOR_RATE", 3.0)
    monkeypatch.setattr("ggml_ext.transforms.training._CLIP_RATE", 300.0)
    trained = train(layer, start, batches, targets, request("flatquant", steps=6))  # type: ignore[arg-type]
    for kind in layer.sites:
        assert torch.equal(trained[kind].diag, start[kind].diag)
        assert trained[kind].clip == start[kind].clip
        assert trained[kind].notes["block_loss"] == trained[kind].notes["block_loss_start"]


def test_training_repeats_bit_by_bit(problem: Any) -> None:
    """A resumed calibration has to make the same file."""
    layer, batches, targets = problem
    start = solved(layer, batches, "flatquant")
    one, two = (
        train(layer, start, batches, targets, request("flatquant", steps=8))  # type: ignore[arg-type]
        for _ in range(2)
    )
    for kind in layer.sites:
        assert torch.equal(one[kind].diag, two[kind].diag)
        assert (one[kind].clip, one[kind].notes) == (two[kind].clip, two[kind].notes)
