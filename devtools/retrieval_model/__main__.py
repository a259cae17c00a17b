"""scripts/train_retrieval_model.py: the options, and what stops a run."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from devtools.retrieval_model.texts import Stage
from ggml_ext.core.errors import GgmlExtError

try:
    import torch
except ImportError as missing:
    sys.exit(f"train_retrieval_model.py: {missing}; pip install torch")

from devtools.retrieval_model.export import write_gguf
from devtools.retrieval_model.model import Shape
from devtools.retrieval_model.training import STAGES, Training

_ABOUT = """Train the retrieval model, which judges compressed KV caches (docs/retrieval.md): a small Llama
that finds in 2048 tokens what it is asked for. Interrupted, the same command goes on from its checkpoint, and
the result does not change."""


def scaled(stages: Sequence[Stage], scale: float) -> list[Stage]:
    """``stages`` with ``scale`` times their steps, one at least."""
    return [stage._replace(steps=max(1, round(scale * stage.steps))) for stage in stages]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train_retrieval_model.py", description=_ABOUT)
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, help="GGUF file to write")
    add("--work", type=Path, default=Path("build/retrieval-model"), help="(%(default)s)")
    add("--seed", type=int, default=1, help="of everything random (%(default)s)")
    add("--scale", type=float, default=1.0, help="factor on the number of steps (%(default)s)")
    add("--threads", type=int, default=os.cpu_count() or 1, help="(all)")
    return parser


def _train(options: argparse.Namespace) -> None:
    """Train, from the checkpoint if there is one, and write the file."""
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    stages = scaled(STAGES, options.scale)
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


def main() -> int:
    """Runs the command line. Exit status: 0 done, 1 failed or stopped, 2 wrong usage."""
    parser = _parser()
    options = parser.parse_args()
    try:
        _train(options)
    except (GgmlExtError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
