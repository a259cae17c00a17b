#!/usr/bin/env python3
"""Train the retrieval model: a small Llama that finds in 2048 tokens what it is asked for.

It judges compressed KV caches (docs/retrieval.md): 4 layers, 16 query heads on 8 key heads of 64, a
vocabulary of whole words. It reads the made language of ggml_ext.measure.tasks with statements of the five
tasks in it, in the training wordings and in random ones, and learns above all the answers. The held-out
wordings never occur.

    python scripts/train_retrieval_model.py -o retrieval.gguf --work build/retrieval-model

Needs torch. Interrupted, the same command goes on from its checkpoint; texts depend on seed and step alone,
so the result does not change.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import gguf
import numpy as np
from numpy.typing import NDArray

from ggml_ext.core.atomic import atomic_path
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.measure.tasks.filler import CONTENT, FUNCTION, STARTS, made_sentences, vocabulary
from ggml_ext.measure.tasks.templates import (
    CHAIN,
    LIST,
    PASS_KEY,
    STATEMENTS,
    TASKS,
    TRAINING,
    Needles,
    Template,
    make_needles,
)

try:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F
except ImportError as missing:
    sys.exit(f"train_retrieval_model.py: {missing}; pip install torch")

CONTEXT = 2048
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
REST_WEIGHT = 0.05  # of the loss of a token that is no answer's
AGAIN_WEIGHT = 0.5  # of what was said before, from the fourth token of the sentence on
CHECKPOINT_SECONDS = 120.0
PRINT_EVERY = 20
RANDOM_WORDING = 0.7
LOOK_BACK, FAST_PAIRS, CONSTANT, SHARPNESS = 3, 6, 4.0, 1.6  # Retriever._look_back

_PIECE = re.compile(r"[A-Za-z]+|[.,:?]")


class Stage(NamedTuple):
    """``steps`` of ``batch`` texts of ``length`` tokens, of which statements, questions and answers take half
    to all of ``share``; with 0 there are none, and every sentence is said twice."""

    length: int
    batch: int
    steps: int
    share: float


STAGES = (
    Stage(128, 32, 400, 0.0),
    Stage(128, 32, 300, 0.9),
    Stage(256, 16, 400, 0.9),
    Stage(512, 8, 300, 0.8),
    Stage(1024, 4, 150, 0.6),
    Stage(2048, 2, 120, 0.4),
)


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


class Vocabulary:
    """Bytes as GPT-2 names them, whole words with the blank before them, BOS and EOS."""

    def __init__(self) -> None:
        named = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in named]
        signs = {byte: chr(byte) for byte in named} | {byte: chr(256 + i) for i, byte in enumerate(others)}
        words = vocabulary()
        self.tokens = [*(signs[byte] for byte in range(256)), *(f"{signs[32]}{word}" for word in words)]
        self.bos, self.eos = len(self.tokens), len(self.tokens) + 1
        self.tokens += ["<s>", "</s>"]
        self._ids = {word: 256 + i for i, word in enumerate(words)} | {mark: ord(mark) for mark in ".,:?"}

    def encode(self, text: str) -> list[int]:
        """Tokens of a text of known words, each after a blank, and marks; without BOS."""
        return [self._ids[piece] for piece in _PIECE.findall(text)]


def random_template(task: str, random: np.random.Generator) -> Template:
    """A wording of random words, so that what is learnt is to compare, not to know wordings."""

    def some(most: int) -> str:
        pool = FUNCTION if random.random() < 0.6 else CONTENT
        return " ".join(random.choice(pool, random.integers(1, most + 1), replace=False))

    start = f"{random.choice(STARTS)} {some(2)}" if random.random() < 0.7 else some(2)
    between = some(2)
    if task in (PASS_KEY, LIST):
        before = f"{start} {between}"
    elif task == CHAIN:
        before = f"{start} {{name}} {between}"
    else:
        slots = ["{name}", "{thing}"]
        random.shuffle(slots)
        before = f"{start} {slots[0]} {between} {slots[1]} {some(2)}"
    lead = f"What {some(3)}? " if random.random() < 0.5 else ""
    if random.random() < 0.4:
        lead = f"What is {' '.join(before.split()[1:])}? "
    mark = ":" if task != CHAIN and random.random() < 0.5 else ""
    return Template(f"{before}{mark} {{value}}.", f"{lead}{before}{mark}")


def random_needles(task: str, random: np.random.Generator) -> Needles:
    """Statements of a task in a training wording or a random one, and the question."""
    options = TRAINING[task]
    template = (
        random_template(task, random)
        if random.random() < RANDOM_WORDING
        else options[int(random.integers(len(options)))]
    )
    fewest, most = STATEMENTS[task]
    count = int(random.integers(fewest, min(most, fewest + 2) + 1))
    words = [str(word) for word in random.permutation(CONTENT)]
    return make_needles(task, template, iter(words), count)


def make_text(stage: Stage, words: Vocabulary, random: np.random.Generator) -> tuple[list[int], list[float]]:
    """``stage.length`` + 1 tokens, and the weight of each in the loss.

    Text with the statements of several tasks, then all questions with their answers, in any order.
    """
    if stage.share == 0:
        return _said_twice(stage, words, random)
    room = stage.length
    most = room * random.uniform(stage.share / 2, stage.share)
    statements: list[list[int]] = []
    ends: list[list[tuple[int, float]]] = []
    taken = 0
    while True:
        needles = random_needles(TASKS[int(random.integers(len(TASKS)))], random)
        stated = [words.encode(statement) for statement in needles.statements]
        end = [(ord("."), REST_WEIGHT)]
        for question, answer in reversed(needles.steps):
            given, wanted = words.encode(question), words.encode(answer)
            end = [*((token, REST_WEIGHT) for token in given), *((token, 1.0) for token in wanted), *end]
        more = sum(map(len, stated)) + len(end)
        if ends and taken + more > most:
            break
        taken += more
        statements += stated
        ends.append(end)
    sentences = [words.encode(sentence) for sentence in made_sentences(room // 8, random)]
    lengths = np.cumsum([len(sentence) for sentence in sentences])
    sentences = sentences[: int(np.searchsorted(lengths, room - taken, side="right"))]
    for statement in statements:
        sentences.insert(int(random.integers(len(sentences) + 1)), statement)
    tokens, weights = [words.bos], [0.0]
    before: set[tuple[int, ...]] = set()
    for sentence in sentences:
        again = AGAIN_WEIGHT if tuple(sentence) in before else REST_WEIGHT
        before.add(tuple(sentence))
        tokens += sentence
        weights += [REST_WEIGHT] * 3 + [again] * (len(sentence) - 3)
    for i in random.permutation(len(ends)):
        tokens += [token for token, _ in ends[i]]
        weights += [weight for _, weight in ends[i]]
    return _filled(tokens, weights, stage, words)


def _said_twice(
    stage: Stage, words: Vocabulary, random: np.random.Generator
) -> tuple[list[int], list[float]]:
    """Sentences, and the same in another order: what follows is known from the fourth token of each on. The
    second half teaches with nearly every token to compare and to copy, which all tasks need first."""
    sentences = [words.encode(sentence) for sentence in made_sentences(stage.length // 20, random)]
    tokens = [words.bos, *(token for sentence in sentences for token in sentence)]
    weights = [REST_WEIGHT] * len(tokens)
    for i in random.permutation(len(sentences)):
        tokens += sentences[i]
        weights += [REST_WEIGHT] * 3 + [1.0] * (len(sentences[i]) - 3)
    return _filled(tokens, weights, stage, words)


def _filled(
    tokens: list[int], weights: list[float], stage: Stage, words: Vocabulary
) -> tuple[list[int], list[float]]:
    short = max(0, stage.length + 1 - len(tokens))
    tokens, weights = tokens + [words.eos] * short, weights + [0.0] * short
    return tokens[: stage.length + 1], weights[: stage.length + 1]


def make_batch(stage: Stage, words: Vocabulary, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Tokens int64 and weights float32 [batch, length + 1] of one step."""
    made = [make_text(stage, words, np.random.default_rng([seed, step, row])) for row in range(stage.batch)]
    return torch.tensor([tokens for tokens, _ in made]), torch.tensor([weights for _, weights in made])


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
        """x [batch, n, hidden]; turns complex64 [n, head / 2]."""
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
    """RoPE of x [batch, heads, n, head]."""
    pairs = torch.view_as_complex(x.contiguous().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)


class Retriever(nn.Module):
    """The model; parameters have the names of GGUF's tensors."""

    def __init__(self, shape: Shape, tokens: int) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(tokens, shape.hidden)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.output_norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.output = nn.Linear(shape.hidden, tokens, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=1.0 if "embd" in name else parameter.shape[1] ** -0.5)
        for block in self.blk:
            nn.init.zeros_(block.ffn_down.weight)
        self._look_back()

    @torch.no_grad()
    def _look_back(self) -> None:
        """Let the first key heads of the first block begin by looking 1, 2, 3 tokens back: what to compare
        with is there at once, and training need not find it.

        A channel of all embeddings is constant; from it alone come keys u and queries turned back by the
        distance, with u on the fastest pairs of RoPE, so that a score is largest at that distance.
        """
        self.token_embd.weight[:, 0] = CONSTANT
        first, size = self.blk[0], self.shape.head
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


def answered(logits: Tensor, targets: Tensor, weights: Tensor) -> float:
    """Share of the answers' tokens that are the most likely ones."""
    asked = weights == 1.0
    return float((logits.argmax(-1) == targets)[asked].float().mean())


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
    """A matrix of about the same singular vectors with singular values near 1: five Newton-Schulz steps."""
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        square = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T


class Training:
    """Model, optimisers and where they are; ``save`` renames into place: a kill leaves the old one whole."""

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
        """Write everything that a run needs to go on."""
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
        return float(each.detach()[weights == 1.0].mean()), answered(logits.detach(), targets, weights)

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


def write_gguf(path: Path, model: Retriever, words: Vocabulary) -> None:
    """The model as F16 GGUF of the architecture llama. Its tokenizer is BPE without merges that takes whole
    words as they are (pre-tokenizer llama-bpe)."""
    shape = model.shape
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        writer.add_name("retrieval")
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        writer.add_context_length(CONTEXT)
        writer.add_embedding_length(shape.hidden)
        writer.add_block_count(shape.layers)
        writer.add_feed_forward_length(shape.ffn)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_key_length(shape.head)
        writer.add_value_length(shape.head)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(shape.head)
        writer.add_rope_freq_base(shape.rope_base)
        writer.add_vocab_size(len(words.tokens))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list(words.tokens)
        normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
        writer.add_token_types([normal] * (len(words.tokens) - 2) + [control] * 2)
        writer.add_token_merges(["a b"])  # llama.cpp wants one; it makes no token that there is
        writer.add_bos_token_id(words.bos)
        writer.add_eos_token_id(words.eos)
        writer.add_add_bos_token(True)
        for name, parameter in model.named_parameters():
            values: NDArray[np.float32] = parameter.detach().float().numpy()
            writer.add_tensor(name, values.astype(np.float16) if values.ndim == 2 else values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the retrieval model.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="GGUF file to write")
    parser.add_argument("--work", type=Path, default=Path("build/retrieval-model"), help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of everything random (%(default)s)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on the number of steps (%(default)s)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="(all)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stages = [stage._replace(steps=max(1, round(options.scale * stage.steps))) for stage in STAGES]
    try:
        options.work.mkdir(parents=True, exist_ok=True)
        training = Training(Shape(), stages, options.seed, options.work / "checkpoint.pt")
        if training.path.exists():
            training.load()

        def stop(_number: int, _frame: FrameType | None) -> None:
            training.stopped = True

        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        parameters = sum(p.numel() for p in training.model.parameters())
        print(f"{parameters:,} parameters, {training.steps} steps, at {training.step}", flush=True)
        training.run()
        write_gguf(options.output, training.model, training.words)
        print(f"{options.output}: written after {training.seconds / 60:.0f} minutes of training")
    except (GgmlExtError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
