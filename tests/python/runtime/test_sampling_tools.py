"""GGML_EXT_SAMPLER in llama.cpp's tools: the same text at temperature 0, the same draws by seed, grammar and
probabilities in the server, chains that stay upstream's.

What would break these: a hook before the chain is complete, a sampler that leaves no probabilities behind, a
token read where none was selected, a switch that is not off by default.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import eval_models
from ggml_ext.convert import convert

SWITCH = "GGML_EXT_SAMPLER"
PROMPT = "The function returns"
ONE_SAMPLER = "one sampler for top-k, top-p, min-p, temp-ext, dist"
LEFT = "leaves a sampler chain as it is: "


@pytest.fixture(scope="module")
def model(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.getbasetemp() / "pydoc-8m-f16.gguf"
    if not path.exists():
        convert(repo_root / "tests" / "models" / "pydoc-8m", path, type_name="f16")
    return path


def environment(value: str | None) -> dict[str, str]:
    """Of a process with this value of the switch."""
    found = {name: text for name, text in os.environ.items() if name != SWITCH}
    return found if value is None else {**found, SWITCH: value}


Complete = Callable[..., tuple[str, str]]


@pytest.fixture
def complete(patched_bin_dir: Path, model: Path) -> Complete:
    """Runs llama-completion with a value of the switch: its text and its log."""

    def run(value: str | None, *options: str) -> tuple[str, str]:
        command = [str(patched_bin_dir / "llama-completion"), "-m", str(model), "-p", PROMPT, "-n", "32"]
        for _ in range(5):
            result = subprocess.run(
                [*command, "-no-cnv", "--no-warmup", "-t", "1", "-v", *options],
                capture_output=True,
                text=True,
                timeout=120,
                env=environment(value),
                stdin=subprocess.DEVNULL,
            )
            assert result.returncode == 0, result.stderr[-2000:]
            # Text and log go through llama.cpp's log thread, which on a busy machine may end too early.
            if "unaccounted time" in result.stderr:
                return result.stdout, result.stderr
        pytest.fail(f"no end of the log: {result.stderr[-2000:]}")

    return run


def chain_in(log: str) -> str:
    (line,) = [line for line in log.splitlines() if "sampler chain: " in line]
    return line.split("sampler chain: ")[1].strip()


def test_off_is_stock(complete: Complete) -> None:
    unset, off = complete(None, "-s", "3"), complete("off", "-s", "3")
    assert unset[0] == off[0]
    for _, log in (unset, off):
        assert "top-k -> " in chain_in(log)
        assert SWITCH not in log


def test_greedy_text_is_stocks(complete: Complete) -> None:
    for options in ([], ["--top-k", "0", "--typical", "0.9"], ["--repeat-penalty", "1.4"]):
        stock = complete(None, "--temp", "0", *options)[0]
        ours, log = complete("fused", "--temp", "0", *options)
        assert ours == stock
        assert len(stock) > len(PROMPT) + 20
        assert "dist" not in chain_in(log), "replaced"


def test_a_seed_repeats_itself_and_is_told(complete: Complete) -> None:
    first, log = complete("fused", "-s", "7")
    assert log.count(ONE_SAMPLER) == 1
    assert "sampler seed: 7\n" in log
    assert complete("fused", "-s", "7")[0] == first
    other, log = complete("fused")
    assert "sampler seed: 4294967295" not in log
    assert other != first


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--mirostat", "2"], "it ends with mirostat-v2"),
        (["--xtc-probability", "0.5"], "xtc stands behind top-k"),
        (["--dynatemp-range", "0.3"], "its temperature is dynamic"),
        (["--backend-sampling"], "it is to run on a backend"),
        (
            ["--samplers", "top_k;penalties;temperature", "--repeat-penalty", "1.3"],
            "penalties stands behind top-k",
        ),
    ],
)
def test_other_chains_stay(complete: Complete, options: list[str], reason: str) -> None:
    stock, _ = complete(None, "-s", "5", *options)
    ours, log = complete("fused", "-s", "5", *options)
    assert ours == stock
    assert log.count(LEFT) == 1
    assert f"{LEFT}{reason}\n" in log


@pytest.mark.parametrize("value", ["", "on", "FUSED"])
def test_a_wrong_value_is_refused_at_load(value: str, patched_bin_dir: Path, model: Path) -> None:
    line = f"ggml-ext: environment variable {SWITCH} is '{value}'; set it to off or fused"
    for tool in ("llama-completion", "llama-server"):
        for _ in range(50):  # the tools sometimes end before their log's thread has written all, or anything
            result = subprocess.run(
                [str(patched_bin_dir / tool), "-m", str(model), "--port", "0", "--no-warmup"]
                if tool == "llama-server"
                else [str(patched_bin_dir / tool), "-m", str(model), "-p", PROMPT, "-n", "1", "-no-cnv"],
                capture_output=True,
                text=True,
                timeout=60,
                env=environment(value),
                stdin=subprocess.DEVNULL,
            )
            assert result.returncode == 1
            said = result.stderr + result.stdout
            if f"error loading model: {line}" in said:
                break
        assert f"error loading model: {line}" in said


def test_llama_cli(patched_bin_dir: Path, model: Path) -> None:
    options = ["-n", "24", "--temp", "0", "-st", "--no-warmup", "-t", "1", "--simple-io"]
    texts = []
    for value in (None, "fused"):
        result = subprocess.run(
            [str(patched_bin_dir / "llama-cli"), "-m", str(model), "-p", PROMPT, *options],
            capture_output=True,
            text=True,
            timeout=120,
            env=environment(value),
            stdin=subprocess.DEVNULL,
        )
        assert result.returncode == 0, result.stderr[-2000:]
        reply = result.stdout.partition(f"> {PROMPT}\n")[2]
        texts.append([line for line in reply.splitlines() if " t/s" not in line])
    assert texts[0] == texts[1]
    assert len("".join(texts[0])) > 20


Ask = Callable[..., dict[str, Any]]


@contextmanager
def server(program: Path, model: Path, log: Path, value: str | None, *options: str) -> Iterator[Ask]:
    """A llama-server; calls /completion with a JSON of these keys."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(program),
        "-m",
        str(model),
        "--port",
        str(port),
        "-t",
        "1",
        "--no-warmup",
        "-v",
        "-np",
        "1",
    ]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *options], stdout=out, stderr=subprocess.STDOUT, env=environment(value)
        )

    def ask(path: str = "completion", **body: Any) -> dict[str, Any]:
        data = json.dumps({"prompt": PROMPT, "n_predict": 16, **body}).encode() if body else None
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", data)
        with urllib.request.urlopen(request, timeout=60) as reply:
            found: dict[str, Any] = json.load(reply)
        return found

    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                ask("health")
                break
            except OSError:
                time.sleep(0.1)
        yield ask
    finally:
        process.kill()
        process.wait()


def test_server(patched_bin_dir: Path, model: Path, tmp_path: Path) -> None:
    program, log = patched_bin_dir / "llama-server", tmp_path / "fused.log"
    requests: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "n_probs": 5},
        {"temperature": 0, "grammar": "root ::= [0-9]+"},
        {"temperature": 0, "logit_bias": [[13, 5.0]], "repeat_penalty": 1.5},
    ]
    with server(program, model, tmp_path / "stock.log", None) as ask:
        stock = [ask(**request) for request in requests]
        settings = {"seed": 2, "n_probs": 50, "post_sampling_probs": True, "n_predict": 1}
        kept = ask(**settings)["completion_probabilities"][0]["top_probs"]
    with server(program, model, log, "fused") as ask:
        for request, expected in zip(requests, stock, strict=True):
            found = ask(**request)
            assert found["content"] == expected["content"]
            assert found.get("completion_probabilities") == expected.get("completion_probabilities")
        assert stock[2]["content"].isdigit()
        ours = ask(**settings)["completion_probabilities"][0]["top_probs"]
        drawn = [ask(seed=4)["content"] for _ in range(2)]
        assert drawn[0] == drawn[1]
        assert drawn[0] != ask(seed=5)["content"]
        xtc = ask(xtc_probability=0.5, seed=1)["content"]
    # What is left behind the samplers: upstream's tokens and probabilities, largest first.
    assert {entry["id"] for entry in ours} == {entry["id"] for entry in kept}
    assert [e["prob"] for e in ours] == pytest.approx([e["prob"] for e in kept], rel=1e-4)
    text = log.read_text()
    assert text.count(ONE_SAMPLER) == 1, "told once, not for every request"
    assert text.count(f"{LEFT}xtc stands behind top-k") == 1
    assert xtc


def test_server_with_a_draft_model(patched_bin_dir: Path, model: Path, tmp_path: Path) -> None:
    """The server clones and copies samplers while it speculates; the draft's chain is fused too."""
    draft = ["-md", str(model), "--spec-type", "draft-simple"]
    texts = []
    for value in (None, "fused"):
        log = tmp_path / f"{value}.log"
        with server(patched_bin_dir / "llama-server", model, log, value, *draft) as ask:
            found = ask(temperature=0, n_predict=24)
            assert found["timings"]["draft_n"] > 0, "speculated"
            texts.append(found["content"])
    assert texts[0] == texts[1]
    assert ONE_SAMPLER in (tmp_path / "fused.log").read_text()


def test_nan_is_an_error_of_the_request(patched_bin_dir: Path, tmp_path: Path) -> None:
    model = eval_models.make_model(tmp_path / "nan.gguf", nan=True)
    with server(patched_bin_dir / "llama-server", model, tmp_path / "log", "fused") as ask:
        for _ in range(2):
            with pytest.raises(urllib.error.HTTPError) as caught:
                ask(prompt="the of and")
            assert caught.value.code == 500
            assert "ggml-ext: no token can be sampled: a logit is NaN" in caught.value.read().decode()
        assert ask("health")["status"] == "ok", "the server lives on"
