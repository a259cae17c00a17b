"""Program: runs the models whose paths come in on standard input, each in a process of its own.

Answers each line with one of its own: "loaded" after some tokens, "refused: " or "gave up: " and the reason,
or "status N" for any other end of the process, negative for a signal.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
from pathlib import Path
from typing import IO

import numpy as np

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.runtime.llama import Model, bindings

CTX, TOKENS = 64, 8
SECONDS, MEMORY = 60, 16 << 30


def decode(path: Path) -> None:
    """Loads, tokenizes and decodes as the commands do: a header alone, and then with and without flash
    attention."""
    text = b"the of and zebra quartz in that is was he for it with as his on be"
    with Model(path, weights=False) as model:
        tokens = model.tokenize(text)[:TOKENS]
        model.tokenize(b"<s> the </s>", special=True)
    tokens = tokens if len(tokens) else np.zeros(1, np.int32)
    positions = np.arange(len(tokens), dtype=np.int32)
    with Model(path, threads=1) as model:
        for exact in (False, True):
            model.start(n_ctx=CTX, n_seq=1, n_batch=CTX, exact=exact)
            model.decode(tokens, positions, np.zeros_like(positions), np.ones(len(tokens), np.bool_))


def child(path: Path, answer: IO[bytes]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(SECONDS)
    os.dup2(answer.fileno(), 2)
    try:
        decode(path)
        status = 0
    except GgmlExtError as error:
        answer.write(f"{error}\n".encode())
        status = 3
    except MemoryError:
        status = 3
    answer.flush()
    os._exit(status)


def ending(path: Path) -> str:
    with tempfile.TemporaryFile() as answer:
        pid = os.fork()
        if pid == 0:
            try:
                child(path, answer)
            finally:  # another exception, which has printed nothing yet
                os._exit(70)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answer.seek(0)
        last = answer.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
    if status in (0, 3):
        return f"refused: {last}" if status else "loaded"
    gave_up = status == 1 and "llama.cpp gave up " in last
    return f"gave up: {last}" if gave_up else f"status {status}: {last}"


if __name__ == "__main__":
    bindings()  # once, not in each process
    for line in sys.stdin:
        print(ending(Path(line.rstrip("\n"))), flush=True)
