"""Program: several models at once in one process give the logits that each gives alone.

    python concurrent_logits.py LIB_DIR MODEL.gguf...

Each model is run alone, then all of them twice in parallel threads. Prints "equal", or which model differs.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import logits


def main() -> None:
    lib_dir, *paths = sys.argv[1:]
    os.environ["LLAMA_CPP_LIB_PATH"] = os.environ["MTMD_CPP_LIB"] = lib_dir
    options = argparse.Namespace(
        flash=False, cache=None, lora=None, shift=False, no_repack=False, lock=False, save=None
    )
    alone = [logits.compute(path, options) for path in paths]
    with ThreadPoolExecutor(2 * len(paths)) as pool:
        together = list(pool.map(lambda path: logits.compute(path, options), 2 * paths))
    for path, expected, actual in zip(2 * paths, 2 * alone, together, strict=True):
        if expected.tobytes() != actual.tobytes():
            sys.exit(f"{path} differs")
    print("equal")


if __name__ == "__main__":
    main()
