#!/usr/bin/env python3
"""How many requests with an equal beginning llama-server holds in the same bytes, and how fast it is.

Each request has 1024 tokens that all have and 64 of its own, and generates 64. Upstream's llama-server with a
unified cache (-kvu) holds as many as its cells allow; ours, paged, has no more bytes. A request is held if
its prompt, sent again at the end, is found in the cache. Both serve in turns, and the time of all requests
together is compared pair by pair: with equal beginnings, and with different ones.

    scripts/kv_server_table.py MODEL.gguf OUT.json --stock FOLDER [--slots 16] [--times 8] [--rounds 5] [-t N]

``--stock``: the programs of a build with -DGGML_EXT_STOCK=ON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ggml_ext.core import paths
from ggml_ext.core.outputs import write_json
from ggml_ext.runtime.llama import Model

COMMON, OWN, NEW = 1024, 64, 64
CACHE = ["-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"]


@dataclass
class Server:
    """Of one llama-server: ``bytes`` of its cache, as its log has them."""

    port: int
    log: Path

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", data)
        with urllib.request.urlopen(request, timeout=3600) as reply:
            return json.load(reply)

    @property
    def bytes(self) -> float:
        """MiB of the cache."""
        text = self.log.read_text(errors="replace")
        paged = re.findall(r"ggml-ext: paged: ([0-9.]+) MiB", text)
        return sum(map(float, paged or re.findall(r"KV buffer size = +([0-9.]+) MiB", text)))


@contextmanager
def serving(
    program: Path, model: Path, log: Path, slots: int, cells: int, kv: str, threads: int
) -> Iterator[Server]:
    """A server of so many slots and cells; kv: GGML_EXT_KV, empty for none."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [program, "-m", model, "--port", port, "-np", slots, "-c", cells, "-kvu", "-t", threads, *CACHE]
    command += [
        "--no-warmup",
        "--no-cache-idle-slots",
        "--cache-ram",
        0,
        "--slots",
        "-b",
        256,
        "-ub",
        256,
        "-lv",
        4,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "GGML_EXT_KV"}
    environment |= {"GGML_EXT_KV": kv} if kv else {}
    with log.open("w") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, env=environment)
    server = Server(port, log)
    try:
        for _ in range(600):
            if process.poll() is not None:
                sys.exit(f"{log}: {log.read_text(errors='replace')[-500:]}")
            try:
                server.ask("health")
                break
            except OSError:
                time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        process.wait()


def prompts(count: int, n_vocab: int, *, equal: bool, seed: int) -> list[list[int]]:
    """Of random tokens."""
    random = np.random.default_rng(seed)
    common = random.integers(100, n_vocab, COMMON).tolist()
    return [
        (common if equal else random.integers(100, n_vocab, COMMON).tolist())
        + random.integers(100, n_vocab, OWN).tolist()
        for _ in range(count)
    ]


def serve(server: Server, asked: list[list[int]], new: int = NEW) -> tuple[float, list[Any]]:
    """Seconds of all requests at once, one to a slot, and the answers."""

    def one(slot: int) -> Any:
        body = {
            "prompt": asked[slot],
            "n_predict": new,
            "id_slot": slot,
            "ignore_eos": True,
            "temperature": 0,
        }
        return server.ask("completion", body)

    begun = time.perf_counter()
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(one, range(len(asked))))
    return time.perf_counter() - begun, answers


def held(server: Server, asked: list[list[int]]) -> int:
    """Requests of which nearly all of the prompt is in the cache still, asked one by one."""
    found = 0
    for slot, prompt in enumerate(asked):
        body = {"prompt": prompt, "n_predict": 1, "id_slot": slot, "temperature": 0}
        found += server.ask("completion", body)["timings"]["prompt_n"] <= 1
    return found


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stock", type=Path, required=True)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="of timing, with --slots; 0: none")
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    with Model(options.model, weights=False) as model:
        n_vocab = model.n_vocab
    programs = {"stock": options.stock / "llama-server", "paged": paths.bin_dir() / "llama-server"}
    cells = options.slots * (COMMON + OWN + NEW)
    found: dict[str, Any] = {"cells": cells, "threads": options.threads}

    def run(name: str, slots: int, kv: str, n_cells: int) -> Any:
        log = options.out.with_suffix(f".{name}-{slots}.log")
        return serving(programs[name], options.model, log, slots, n_cells, kv, options.threads)

    with run("stock", options.slots, "", cells) as server:
        asked = prompts(options.slots, n_vocab, equal=True, seed=0)
        serve(server, asked)
        found["stock"] = {"slots": options.slots, "held": held(server, asked), "mib": server.bytes}
    many = options.slots * options.times
    budget = f"paged,budget={int(found['stock']['mib'] * 1024)}K"
    with run("paged", many, budget, many * (COMMON + OWN + NEW)) as server:
        asked = prompts(many, n_vocab, equal=True, seed=0)
        serve(server, asked)
        slots = [slot["kv"] for slot in server.ask("slots")]
        found["paged"] = {"slots": many, "held": held(server, asked), "mib": server.bytes}
        found["paged"]["shared"] = statistics.mean(slot["shared"] for slot in slots)
    for equal in (True, False):
        ratios = []
        for number in range(options.rounds):
            seconds = {}
            for name in sorted(programs, reverse=bool(number % 2)):
                kv = "" if name == "stock" else "paged"
                with run(name, options.slots, kv, cells) as server:
                    asked = prompts(options.slots, n_vocab, equal=equal, seed=number)
                    seconds[name] = serve(server, asked)[0]
            ratios.append(seconds["paged"] / seconds["stock"])
            print(
                f"{'equal' if equal else 'different'} beginnings, round {number}: {ratios[-1]:.3f}",
                flush=True,
            )
        if ratios:
            found["equal" if equal else "different"] = {"ratios": ratios, "median": statistics.median(ratios)}
    write_json(options.out, found)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
