#!/usr/bin/env python3
"""Train the demo model: a small Llama that speaks the Python documentation.

Reads nothing but the running interpreter's own documentation (demo_text.py), learns a SentencePiece
vocabulary and a Llama model from the training part on the CPU, and writes a Hugging Face folder that
llama.cpp's convert_hf_to_gguf.py accepts.

    python scripts/train_demo_model.py --out tests/models/pydoc-8m --work build/demo-model

Needs torch, transformers, sentencepiece and rich.  The work folder holds the text, the
vocabulary and a checkpoint; after an interruption the same command with ``--resume`` continues, and
because batches and dropout depend on seed and step alone the result does not change.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

import demo_text

try:
    import sentencepiece
    import torch
    import transformers
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from torch import Tensor, nn
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError as error:
    sys.exit(f"train_demo_model.py: {error}; pip install torch transformers sentencepiece rich")

VOCAB = 1024
STEPS = 1400
CONTEXT = 512
WIDTH = CONTEXT - 1  # tokens of the text in a window, after BOS
BATCH = 8
BOS, EOS = 1, 2
WARMUP_STEPS = 100
EVAL_EVERY = 200
PRINT_EVERY = 20
CHECKPOINT_SECONDS = 180.0
WEIGHT_DECAY = 0.1
DROPOUT = 0.1
LEARNING_RATE = 3e-3

console = Console(highlight=False, soft_wrap=True)


class TrainError(Exception):
    """A failure that is told in one line: what, where, remedy."""


@dataclass
class State:
    """What the README reports, kept in the checkpoint so that a resumed run adds up."""

    step: int = 0
    seconds: float = 0.0
    history: list[tuple[int, float]] = field(default_factory=list)


def model_config() -> LlamaConfig:
    """Shape of the model: every width a multiple of 256, as k-quants ask; 4 query heads share 2 key heads."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        use_cache=False,
    )


def prepare_text(work: Path) -> None:
    """Write training and held-out text, and learn a vocabulary in Llama's layout from the former.

    BPE, because llama.cpp merges by score as SentencePiece's BPE does; unk 0, bos 1, eos 2 are its defaults.
    """
    for name, text in zip(("train.txt", "heldout.txt"), demo_text.texts(), strict=True):
        (work / name).write_text(text, encoding="utf-8")
    model = io.BytesIO()  # given file names, SentencePiece would write them into the model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((work / "train.txt").read_text(encoding="utf-8").splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,  # indentation in one token
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    (work / "tokenizer.model").write_bytes(model.getvalue())


class Batches:
    """Windows of the training text: BOS and WIDTH tokens, each token once per epoch.

    Every epoch cuts the text at another offset, so that a token meets different contexts.
    """

    def __init__(self, tokens: Tensor, seed: int) -> None:
        self.tokens = tokens
        self.seed = seed
        self.per_epoch = len(tokens) // WIDTH - 1
        self.epoch = -1
        self.starts = torch.empty(0, dtype=torch.long)

    def window(self, index: int) -> Tensor:
        """The window with this running number, counted over all epochs."""
        epoch, position = divmod(index, self.per_epoch)
        if epoch != self.epoch:
            random = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            offset = int(torch.randint(WIDTH, (1,), generator=random))
            self.starts = torch.randperm(self.per_epoch, generator=random) * WIDTH + offset
            self.epoch = epoch
        start = int(self.starts[position])
        return torch.cat([torch.tensor([BOS]), self.tokens[start : start + WIDTH]])

    def at(self, step: int) -> Tensor:
        """Batch of one step, int64[BATCH, CONTEXT]."""
        return torch.stack([self.window(step * BATCH + row) for row in range(BATCH)])


def perplexity(model: LlamaForCausalLM, tokens: Tensor) -> float:
    """exp(mean negative log-likelihood) per token, in windows of BOS and WIDTH tokens.

    Every token of the text is scored once.  Arithmetic is the model's own unless autocast is on.
    """
    whole = len(tokens) // WIDTH * WIDTH
    parts = [*torch.split(tokens[:whole].view(-1, WIDTH), BATCH), tokens[whole:][None]]
    total = 0.0
    model.train(False)
    with torch.inference_mode():
        for rows in parts:
            inputs = torch.cat([torch.full((len(rows), 1), BOS), rows], dim=1)
            logits = model(input_ids=inputs).logits[:, :-1].float()
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), rows.flatten(), reduction="sum"))
    model.train()
    return math.exp(total / len(tokens))


def add_dropout(model: LlamaForCausalLM) -> None:
    """Dropout on what each block adds to the residual stream; transformers' Llama has none of its own."""

    def drop(module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, DROPOUT, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the blocks' matrices, AdamW for embeddings, head and norms.

    ``match_rms_adamw`` (Liu et al. 2025, arXiv:2502.16982) scales Muon's step so that one rate serves both.
    """
    blocks = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in blocks}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(blocks, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_at(step: int, steps: int) -> float:
    """Learning rate: linear warm-up, then linear decay to zero."""
    return LEARNING_RATE * min((step + 1) / WARMUP_STEPS, (steps - step) / max(1, steps - WARMUP_STEPS))


class Checkpoint:
    """Everything a run needs to go on, renamed into place so that a kill leaves the old one whole."""

    def __init__(self, path: Path, settings: dict[str, int], model: LlamaForCausalLM) -> None:
        self.path = path
        self.settings = settings
        self.model = model
        self.optimizers = make_optimizers(model)
        self.written = time.monotonic()
        self.interrupted = False

    def interrupt(self, _number: int, _frame: FrameType | None) -> None:
        """Signal handler: lets the step end first, since half a step cannot be continued."""
        self.interrupted = True

    def due(self) -> bool:
        """Whether it is time to write one."""
        return self.interrupted or time.monotonic() - self.written > CHECKPOINT_SECONDS

    def save(self, state: State) -> None:
        """Write state, weights and optimisers."""
        beside = self.path.with_suffix(".tmp")
        content = {
            "settings": self.settings,
            "state": asdict(state),
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        torch.save(content, beside)
        beside.replace(self.path)
        self.written = time.monotonic()

    def load(self) -> State:
        """Read it back; a run with other settings is not the same run."""
        content = torch.load(self.path, weights_only=True)
        if content["settings"] != self.settings:
            raise TrainError(f"{self.path}: made with {content['settings']}; pass the same options again")
        self.model.load_state_dict(content["model"])
        for optimizer, saved in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return State(**content["state"])


def train_step(checkpoint: Checkpoint, batch: Tensor, step: int) -> float:
    """One step of all optimisers on int64[BATCH, CONTEXT]; gives the mean loss in nats per token."""
    for optimizer in checkpoint.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, checkpoint.settings["steps"])
    torch.manual_seed(checkpoint.settings["seed"] * 1_000_003 + step)  # of dropout
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = checkpoint.model(input_ids=batch).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(checkpoint.model.parameters(), 1.0)
    for optimizer in checkpoint.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def train(checkpoint: Checkpoint, data: Batches, heldout: Tensor, state: State) -> None:
    """Run the steps that are left, with a progress line, evaluations and checkpoints."""
    steps = checkpoint.settings["steps"]
    begun = time.monotonic() - state.seconds
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    mean_loss, pull = 0.0, 1.0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=steps, completed=state.step)
        while state.step < steps:
            mean_loss += pull * (train_step(checkpoint, data.at(state.step), state.step) - mean_loss)
            pull = 0.05
            state.step += 1
            state.seconds = time.monotonic() - begun
            speed = state.step * BATCH * CONTEXT / state.seconds
            line = f"loss {mean_loss:.3f}  {speed:,.0f} tokens/s"
            progress.update(task, completed=state.step, description=line)
            if not console.is_terminal and state.step % PRINT_EVERY == 0:
                minutes = (steps - state.step) * BATCH * CONTEXT / speed / 60
                console.print(f"step {state.step}/{steps}  {line}  {minutes:.0f} min left")
            if state.step % EVAL_EVERY == 0 or state.step == steps:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    state.history.append((state.step, perplexity(checkpoint.model, heldout)))
                console.print(f"step {state.step}/{steps}  held-out perplexity {state.history[-1][1]:.3f}")
            if checkpoint.due() or state.step == steps:
                checkpoint.save(state)
            if checkpoint.interrupted and state.step < steps:
                raise TrainError(f"stopped at step {state.step}: {checkpoint.path} saved; --resume continues")


def readme(options: argparse.Namespace, facts: dict[str, str], state: State, epochs: float) -> str:
    """The model's README: what it is, how it was made, what was measured."""
    tokens = f"{options.steps:,} steps of {BATCH} x {CONTEXT} = {options.steps * BATCH * CONTEXT:,} tokens"
    rows = facts | {
        "training": f"{tokens}, {epochs:.1f} epochs, seed {options.seed}",
        "recipe": f"Muon and AdamW, rate {LEARNING_RATE} after {WARMUP_STEPS} steps of warm-up, "
        f"linear decay to zero, weight decay {WEIGHT_DECAY}, dropout {DROPOUT}, bfloat16 autocast",
        "time": f"{state.seconds / 60:.0f} minutes of wall time, --threads {options.threads}",
        "on the way": ", ".join(f"{value:.1f} at step {step}" for step, value in state.history),
        "made with": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""\
# pydoc-8m

A Llama that was trained from nothing on the documentation of Python's standard library: help topics,
docstrings and comment blocks of the interpreter that ran the training.  It exists so that conversion,
evaluation and comparison can be shown and tested on a real, if small, language model; it is of no
other use.  Made by `scripts/train_demo_model.py`; `scripts/demo_text.py` builds the text and the split.

| | |
|---|---|
{table}

The held-out perplexity is that of the bfloat16 weights in this folder over the whole held-out text, in
windows of BOS and {WIDTH} tokens, every token but BOS scored.  Python's documentation is under the
PSF licence.
"""


def write_model(beside: Path, model: LlamaForCausalLM, vocabulary: Path) -> None:
    """Write weights, shape and vocabulary into the new folder ``beside``."""
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    model.config.use_cache = model.generation_config.use_cache = True
    model.bfloat16().save_pretrained(beside)
    shutil.copyfile(vocabulary, beside / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    rules = {"add_bos_token": True, "add_eos_token": False, "legacy": False, "model_max_length": CONTEXT}
    text = json.dumps({"tokenizer_class": "LlamaTokenizer", **names, **rules}, indent=2) + "\n"
    (beside / "tokenizer_config.json").write_text(text, encoding="utf-8")


def run(options: argparse.Namespace) -> None:
    """Text, vocabulary, training, model folder."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    out, work = Path(options.out), Path(options.work)
    if out.exists():
        raise TrainError(f"{out}: exists already; remove it or choose another --out")
    work.mkdir(parents=True, exist_ok=True)
    path = work / "checkpoint.pt"
    resumed = path.exists()
    if resumed and not options.resume:
        raise TrainError(f"{path}: belongs to an earlier run; pass --resume to continue it, or remove it")
    if not resumed:
        prepare_text(work)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(work / "tokenizer.model"))
    texts = [(work / name).read_text(encoding="utf-8") for name in ("train.txt", "heldout.txt")]
    tokens, heldout = (torch.tensor(tokenizer.encode(text)) for text in texts)
    encoded = zip(texts, (tokens, heldout), strict=True)
    sizes = [f"{len(text.encode()):,} bytes, {len(ids):,} tokens" for text, ids in encoded]

    model = LlamaForCausalLM(model_config())
    add_dropout(model)
    model.train()
    checkpoint = Checkpoint(path, {"steps": options.steps, "seed": options.seed}, model)
    state = checkpoint.load() if resumed else State()
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"text: {sizes[0]}; held out: {sizes[1]}; {parameters:,} parameters")
    signal.signal(signal.SIGTERM, checkpoint.interrupt)
    signal.signal(signal.SIGINT, checkpoint.interrupt)
    data = Batches(tokens, options.seed)
    train(checkpoint, data, heldout, state)

    beside = out.with_name(out.name + ".tmp")
    write_model(beside, model, work / "tokenizer.model")
    result = perplexity(LlamaForCausalLM.from_pretrained(beside, dtype=torch.float32), heldout)
    bits = math.log2(result) * len(heldout) / len(texts[1].encode())
    facts = {
        "shape": f"{parameters:,} parameters, {model.config.num_hidden_layers} layers; more in config.json",
        "vocabulary": f"{VOCAB} pieces, SentencePiece BPE with byte fallback, learnt from the training text",
        "training text": sizes[0],
        "held-out text": f"{sizes[1]}, never trained on",
        "held-out perplexity": f"**{result:.3f}** per token, {bits:.3f} bits per byte",
    }
    epochs = options.steps * BATCH / data.per_epoch
    (beside / "README.md").write_text(readme(options, facts, state, epochs), encoding="utf-8")
    beside.rename(out)
    console.print(f"{out}: held-out perplexity {result:.3f}")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the demo model on the Python documentation.")
    parser.add_argument("--out", default="tests/models/pydoc-8m", help="folder to write (%(default)s)")
    parser.add_argument("--work", default="build/demo-model", help="text and checkpoint (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of 4096 tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of everything random (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (all)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --work")
    options = parser.parse_args()
    try:
        run(options)
    except (TrainError, OSError) as error:
        system = (
            f"{error.filename}: {error.strerror}; check path and space" if isinstance(error, OSError) else ""
        )
        print(f"{parser.prog}: {system or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
