"""A llama-server for the length of a test."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Ask = Callable[..., tuple[int, Any]]


def _content(answer: str) -> Any:
    try:
        return json.loads(answer)
    except ValueError:
        return answer


@contextmanager
def server(program: Path, model: Path, log: Path, *options: str) -> Iterator[Ask]:
    """Yields a function that sends a JSON body (None: GET) to a path and returns status and answer, a text
    where that is no JSON."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(program), "-m", str(model), "--port", str(port), "-t", "1", "-np", "1", "--no-warmup"]
    with log.open("w") as out:
        process = subprocess.Popen([*command, *options], stdout=out, stderr=subprocess.STDOUT)

    def ask(path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", data)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, _content(reply.read().decode())
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                if ask("health")[0] == 200:
                    break
            except OSError:
                pass
            time.sleep(0.1)
        yield ask
    finally:
        process.kill()
        process.wait()
