"""The training run of the retrieval model: stages, batches, steps, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from devtools.retrieval_model.model import CONTEXT, Retriever, Shape
from devtools.retrieval_model.muon import Muon
from devtools.retrieval_model.texts import ANSWER_WEIGHT, Stage, make_text
from devtools.retrieval_model.vocabulary import Vocabulary
from ggml_ext.core.atomic import atomic_path
from ggml_ext.core.errors import GgmlExtError

LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
CHECKPOINT_SECONDS = 120.0
PRINT_EVERY = 20  # steps

STAGES = (
    Stage(128, 32, 400, 0.0),
    Stage(128, 32, 300, 0.9),
    Stage(256, 16, 400, 0.9),
    Stage(512, 8, 300, 0.8),
    Stage(1024, 4, 150, 0.6),
    Stage(2048, 2, 320, 0.4),
)


def make_batch(stage: Stage, words: Vocabulary, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Tokens int64 and weights float32 [batch, length + 1] of one step."""
    made = [make_text(stage, words, np.random.default_rng([seed, step, row])) for row in range(stage.batch)]
    return torch.tensor([tokens for tokens, _ in made]), torch.tensor([weights for _, weights in made])


def answered(logits: Tensor, targets: Tensor, weights: Tensor) -> float:
    """Share of the answers' tokens that are the most likely ones: of logits [batch, n, vocabulary], targets
    int64 and weights float32 [batch, n]."""
    asked = weights == ANSWER_WEIGHT
    return float((logits.argmax(-1) == targets)[asked].float().mean())


class Training:
    """Model, optimisers and where they are. What it computes depends on shape, stages and seed alone.

    ``path``: of the checkpoint. ``stopped``: set it, and ``run`` saves and ends after the step it is at.
    ``seconds``: of all runs together.
    """

    def __init__(self, shape: Shape, stages: Sequence[Stage], seed: int, path: Path) -> None:
        torch.manual_seed(seed)
        self.words = Vocabulary()
        self.model = Retriever(shape, len(self.words.tokens))
        self.stages, self.seed, self.path = stages, seed, path
        self.settings = {"shape": asdict(shape), "stages": [list(stage) for stage in stages], "seed": seed}
        self.step, self.seconds = 0, 0.0
        self.stopped = False
        blocks = [p for p in self.model.blk.parameters() if p.ndim == 2]
        inside = {id(p) for p in blocks}
        rest = [p for p in self.model.parameters() if id(p) not in inside]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(blocks, {"lr": LEARNING_RATE}),
            torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """The stage that ``step`` belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError(step)

    def save(self) -> None:
        """Write everything that a run needs to go on, whole or not at all."""
        content = {
            "settings": self.settings,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        with atomic_path(self.path) as temporary:
            torch.save(content, temporary)

    def load(self) -> None:
        """Read it back. Raises GgmlExtError for a run with other settings, which is not the same run."""
        content: dict[str, Any] = torch.load(self.path, weights_only=True)
        if content["settings"] != self.settings:
            raise GgmlExtError(f"{self.path}: of a run with other options; remove it or give another --work")
        self.step, self.seconds = content["step"], content["seconds"]
        self.model.load_state_dict(content["model"])
        for optimizer, saved in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def train_step(self) -> tuple[float, float]:
        """One step: mean loss of the answers' tokens in nats, and the share of them that are right."""
        tokens, weights = make_batch(self.stage(self.step), self.words, self.seed, self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min((self.step + 1) / WARMUP_STEPS, self._decay())
        logits = self.model(tokens[:, :-1])
        targets, weights = tokens[:, 1:], weights[:, 1:]
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
        torch.autograd.backward((each * weights).sum() / weights.sum())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        loss = float(each.detach()[weights == ANSWER_WEIGHT].mean())
        return loss, answered(logits.detach(), targets, weights)

    def _decay(self) -> float:
        """Of the rate: constant over the first half of the steps, then linear to a twentieth."""
        return min(1.0, 0.05 + 1.9 * (1 - self.step / self.steps))

    def run(self) -> None:
        """The steps that are left, with a line every PRINT_EVERY. Raises GgmlExtError when stopped."""
        begun = time.monotonic() - self.seconds
        saved, losses = time.monotonic(), []
        while self.step < self.steps:
            stage = self.stage(self.step)
            losses.append(self.train_step())
            self.seconds = time.monotonic() - begun
            if self.step % PRINT_EVERY == 0:
                loss, right = np.mean(losses, axis=0)
                losses = []
                print(
                    f"step {self.step}/{self.steps}, {stage.length} tokens: loss of answers {loss:.3f}, "
                    f"{100 * right:.1f} % of their tokens right, {self.seconds / 60:.1f} min, "
                    f"{self.minutes_left():.0f} left",
                    flush=True,
                )
            last = self.step == self.steps
            if self.stopped or last or time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = time.monotonic()
            if self.stopped and not last:
                raise GgmlExtError(f"stopped at step {self.step}; the same command goes on from {self.path}")

    def minutes_left(self) -> float:
        """By the tokens of the steps done and left, and what attention adds to them at their lengths."""
        costs = [stage.batch * stage.length * (1 + stage.length / CONTEXT) for stage in self.stages]
        all_costs = np.repeat(costs, [stage.steps for stage in self.stages])
        done = all_costs[: self.step].sum()
        return float(self.seconds / 60 * (all_costs.sum() - done) / done)
