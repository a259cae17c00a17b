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

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from devtools.retrieval_model.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
