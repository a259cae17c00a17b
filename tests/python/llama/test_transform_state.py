"""Saved states, slots and prompt caches: a file takes those of one with the same transforms, and no others.

What would break these: a way of saving that leaves the digest out, a digest that misses a part of the
transform, one in the state of a file that has no transform.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fold_files as folds
import server_files
import transform_files as files
from ggml_ext.runtime.llama import Model, bindings

HEAD_DIM = 64
TOKENS = 24
F32_CACHE = ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]  # values in another basis round differently in f16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def variants(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of one model. "again" has the transforms of "folded"."""
    folder = tmp_path_factory.mktemp("state")
    llama = files.llama_f32(base)

    def folded(**more: Any) -> files.Model:
        return folds.fold(files.read(llama), HEAD_DIM, **more)

    clipped = folded()
    clipped.ours["ggml_ext.transform.clip"] = [0.9] * 8
    named = folded(record=False)
    named.ours["ggml_ext.transform.name"] = "smoothquant"
    made = {
        "folded": folded(),
        "again": folded(),
        "other": folded(seed=1),
        "online": files.transform(folded()),
        "other online": files.transform(folded(), seed=1),
        "heads": files.transform_heads(folded(), HEAD_DIM),
        "clipped": clipped,
        "old": folded(record=False),
        "old named": named,
    }
    plain = files.read(llama).write(folder / "plain2.gguf")
    paths = {name: model.write(folder / f"{name.replace(' ', '-')}.gguf") for name, model in made.items()}
    return {"plain": llama, "plain again": plain, **paths}


def whole_file(api: Any, context: Any, path: bytes) -> tuple[Callable[[], bool], Callable[[], bool]]:
    """Save and load, by llama_state_*_file."""
    tokens = (api.llama_token * TOKENS)(*range(TOKENS))
    count = ctypes.c_size_t(0)
    return (
        lambda: bool(api.llama_state_save_file(context, path, tokens, TOKENS)),
        lambda: bool(api.llama_state_load_file(context, path, tokens, TOKENS, ctypes.byref(count))),
    )


def sequence_file(api: Any, context: Any, path: bytes) -> tuple[Callable[[], bool], Callable[[], bool]]:
    """Likewise for one sequence, which is what the server's slots use."""
    tokens = (api.llama_token * TOKENS)(*range(TOKENS))
    count = ctypes.c_size_t(0)
    return (
        lambda: api.llama_state_seq_save_file(context, path, 0, tokens, TOKENS) > 0,
        lambda: api.llama_state_seq_load_file(context, path, 0, tokens, TOKENS, ctypes.byref(count)) > 0,
    )


def whole_memory(api: Any, context: Any, path: bytes) -> tuple[Callable[[], bool], Callable[[], bool]]:
    """Likewise without llama.cpp's file format."""
    file = Path(path.decode())

    def save() -> bool:
        data = (ctypes.c_uint8 * api.llama_state_get_size(context))()
        n_bytes = api.llama_state_get_data(context, data, len(data))
        file.write_bytes(bytes(data)[:n_bytes])
        return bool(n_bytes == len(data))

    def load() -> bool:
        data = file.read_bytes()
        array = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        return bool(api.llama_state_set_data(context, array, len(data)) == len(data))

    return save, load


WAYS = {"file": whole_file, "sequence": sequence_file, "memory": whole_memory}


@pytest.fixture(scope="module")
def outcomes(variants: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    """ "way: saver -> loader" -> whether it was taken; a state that is taken predicts as before."""
    folder = tmp_path_factory.mktemp("states")
    api = bindings()
    running: dict[str, Model] = {}
    next_token: dict[str, Any] = {}
    for name, path in variants.items():
        model = running[name] = Model(path, threads=1)
        model.start(n_ctx=64, n_seq=1, n_batch=32)
        decode(model, range(TOKENS))
        for way, functions in WAYS.items():
            assert functions(api, model._context, str(folder / f"{name}.{way}").encode())[0](), (name, way)
        next_token[name] = decode(model, [TOKENS])
    taken = {}
    for way, functions in WAYS.items():
        for saver in variants:
            for loader, model in running.items():
                model.clear()
                load = functions(api, model._context, str(folder / f"{saver}.{way}").encode())[1]
                taken[f"{way}: {saver} -> {loader}"] = load()
                if taken[f"{way}: {saver} -> {loader}"]:
                    largest = np.abs(next_token[saver]).max()
                    difference = np.abs(decode(model, [TOKENS]) - next_token[saver]).max()
                    assert difference <= 1e-3 * largest, (way, saver, loader)
    for model in running.values():
        model.close()
    return taken


def decode(model: Model, positions: Any) -> Any:
    """Logits of the last of the positions, whose tokens follow from them."""
    where = np.array(positions, np.int32)
    return model.decode(where * 7 % 320, where, np.zeros_like(where), where == where[-1])[0].copy()


@pytest.mark.parametrize("way", WAYS)
def test_a_state_goes_with_its_transforms(
    way: str, variants: dict[str, Path], outcomes: dict[str, bool]
) -> None:
    same = {"again": "folded", "plain again": "plain"}
    for saver in variants:
        for loader in variants:
            expected = same.get(saver, saver) == same.get(loader, loader)
            assert outcomes[f"{way}: {saver} -> {loader}"] == expected, (saver, loader)


def test_a_stock_file_writes_what_stock_llama_writes(
    base: Path, patched_lib_dir: Path, stock_build: Path, tmp_path: Path
) -> None:
    """Byte for byte, and it reads it."""
    states = []
    for lib_dir in (patched_lib_dir, stock_build):
        state = tmp_path / "state"
        result = files.run(
            lib_dir, files.llama_f32(base), tmp_path / "out.npy", "--no-repack", "--save", str(state)
        )
        assert result.returncode == 0, result.stderr[-2000:]
        states.append(state.read_bytes())
    assert len(states[0]) > 10_000
    assert states[0] == states[1]


def test_slots_and_adapters_of_the_server(
    base: Path, variants: dict[str, Path], patched_bin_dir: Path, tmp_path: Path
) -> None:
    """A slot of the original is refused with an HTTP error, the model's own is taken; and scales of adapters
    that change at run time act as on the original."""
    program = patched_bin_dir / "llama-server"
    shapes = folds.shapes_of(variants["plain"], folds.TARGETS)
    loras = [str(folds.write_adapter(tmp_path / f"{seed}.gguf", shapes, seed=seed)) for seed in (1, 2)]
    options = ["--slot-save-path", str(tmp_path), "-c", "128", "--lora", ",".join(loras), *F32_CACHE]
    answers: dict[str, list[Any]] = {}
    for name in ("plain", "online"):
        with server_files.server(program, variants[name], tmp_path / "log", *options) as ask:
            answers[name] = []
            for scales in ((1.0, 1.0), (0.5, -1.0), (0.0, 0.0)):
                assert ask("lora-adapters", [{"id": i, "scale": s} for i, s in enumerate(scales)])[0] == 200
                answers[name].append(most_likely(ask))
            assert ask("slots/0?action=save", {"filename": f"{name}.slot"})[0] == 200
            if name == "online":
                assert ask("slots/0?action=restore", {"filename": "online.slot"})[0] == 200
                status, answer = ask("slots/0?action=restore", {"filename": "plain.slot"})
                assert status == 400
                assert "restore slot" in answer["error"]["message"]
    log = (tmp_path / "log").read_text()
    assert "ggml-ext: the state was saved by a model without transforms; process the prompt anew" in log
    for expected, found in zip(answers["plain"], answers["online"], strict=True):
        assert found == pytest.approx(expected, abs=1e-3)
    assert answers["plain"][0] != pytest.approx(answers["plain"][1], abs=1e-2), "the adapters hardly act"


def most_likely(ask: server_files.Ask) -> dict[int, float]:
    """Log-probabilities of the five likeliest tokens after a prompt."""
    body = {"prompt": "The quick brown fox", "n_predict": 1, "n_probs": 5, "temperature": 0}
    status, answer = ask("completion", {**body, "cache_prompt": False})
    assert status == 200, answer
    (token,) = answer["completion_probabilities"]
    return {entry["id"]: entry["logprob"] for entry in token["top_logprobs"]}
