"""A Hugging Face model directory -> a GGUF file of the same precision, by llama.cpp's own converter."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from pathlib import Path
from typing import Any

from ggml_ext import paths, process
from ggml_ext.errors import GgmlExtError
from ggml_ext.progress import track

_MAX_HEADER = 100 * 1024 * 1024  # safetensors' own limit

# The converter's type that loses nothing, by the types of the matrices in the checkpoint. Anything else
# (fp8, packed integers) is decoded by the converter itself, whose own choice for those is bf16.
_EXACT = {frozenset(("BF16",)): "bf16", frozenset(("F16",)): "f16"}


def check(folder: Path) -> list[Path]:
    """Checks that the directory is complete and returns its weight files.

    Raises GgmlExtError naming what is missing: config.json, a shard of the index, the end of a file.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise GgmlExtError(
            f"{folder}: no config.json; give a Hugging Face model directory (config.json, safetensors, "
            "tokenizer) or a GGUF file"
        )
    if not isinstance(_read_json(config), dict):
        raise GgmlExtError(f"{config}: not a JSON object; download the file again")
    weights = _weight_files(folder)
    for path in weights:
        if path.suffix == ".safetensors":
            _check_safetensors(path)
    return weights


def _weight_files(folder: Path) -> list[Path]:
    for index_name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        index = folder / index_name
        if index.is_file():
            content = _read_json(index)
            if not (isinstance(content, dict) and isinstance(content.get("weight_map"), dict)):
                raise GgmlExtError(f"{index}: has no weight_map; download the file again")
            names = sorted(set(content["weight_map"].values()))
            for name in names:
                if not (folder / name).is_file():
                    raise GgmlExtError(
                        f"{folder / name}: missing, {index_name} names it; download this shard"
                    )
            return [folder / name for name in names]
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        found = sorted(folder.glob(pattern))
        if found:
            return found
    raise GgmlExtError(f"{folder}: holds no weights (model.safetensors); download them")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise GgmlExtError(f"{path}: {exc.strerror}; check its permissions") from exc
    except ValueError as exc:
        raise GgmlExtError(f"{path}: not valid JSON ({exc}); download the file again") from exc


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {"dtype", "shape", "data_offsets"} of a safetensors file.

    Layout: uint64 header length, JSON header, data. Raises GgmlExtError for a damaged one.
    """
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
            header = json.loads(file.read(length)) if length <= _MAX_HEADER else None
    except OSError as exc:
        raise GgmlExtError(f"{path}: {exc.strerror}; check its permissions") from exc
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise GgmlExtError(f"{path}: not a safetensors file, or cut off; download it again")
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _check_safetensors(path: Path) -> None:
    end = max((entry["data_offsets"][1] for entry in safetensors_header(path).values()), default=0)
    with path.open("rb") as file:
        (header_length,) = struct.unpack("<Q", file.read(8))
    if path.stat().st_size < 8 + header_length + end:
        raise GgmlExtError(f"{path}: cut off ({path.stat().st_size} bytes); download it again")


def exact_type(folder: Path, weights: list[Path]) -> str:
    """The GGUF float type that holds the checkpoint's matrices without loss: bf16, f16 or f32."""
    types = set()
    for path in weights:
        if path.suffix == ".safetensors":
            entries = safetensors_header(path).values()
            types |= {entry["dtype"] for entry in entries if _is_matrix(entry["shape"])}
    if not types:  # pickled weights: only config.json says what they are
        config = _read_json(folder / "config.json")
        named = config.get("dtype") or config.get("torch_dtype") or "float32"
        return {"bfloat16": "bf16", "float16": "f16"}.get(named, "f32")
    if types <= {"BF16", "F16", "F32"}:
        return _EXACT.get(frozenset(types), "f32")
    return "bf16"


def _is_matrix(shape: list[int]) -> bool:
    return sum(1 for n in shape if n > 1) >= 2


def to_gguf(folder: Path, out: Path) -> None:
    """Converts the directory to the GGUF file ``out``. Raises GgmlExtError in one line.

    The converter's environment keeps it off the network: everything it needs lies in the directory.
    """
    weights = check(folder)
    script = paths.converter_dir() / "convert_hf_to_gguf.py"
    size = sum(path.stat().st_size for path in weights)
    with track(size, "Hugging Face -> GGUF", "B") as advance:
        done = process.up_to(advance)

        def watch(_output: str) -> None:
            written = out.stat().st_size if out.exists() else 0
            if written > size // 100:  # the header, written early, says nothing about the rate
                done(min(size, written))

        finished = process.run(
            [sys.executable, script, folder, "--outfile", out, "--outtype", exact_type(folder, weights)],
            watch=watch,
            env={
                "PYTHONPATH": os.pathsep.join(
                    [str(script.parent / "gguf-py"), os.environ.get("PYTHONPATH", "")]
                ),
                "HF_HUB_OFFLINE": "1",
                "TRANSFORMERS_OFFLINE": "1",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
        )
    if finished.status != 0 or not out.is_file():
        raise GgmlExtError(_reason(folder, finished))


def _reason(folder: Path, finished: process.Finished) -> str:
    """The converter's last words, with the remedy where we know it."""
    output = finished.output
    if re.search(r"No space left on device|\d+ requested and \d+ written", output):
        return f"{folder}: the disk is full; free some space (the float GGUF needs as much as the model)"
    missing = re.search(r"No module named '(\w+)", output)
    if missing:
        return f"{folder}: the converter needs the package {missing[1]}; pip install 'ggml-ext[convert]'"
    unsupported = re.search(r"Model (\w+) is not supported", output)
    if unsupported:
        return f"{folder}: architecture {unsupported[1]} is unknown to this llama.cpp; use another model"
    last = process.last_words(finished)
    return f"{folder}: llama.cpp's converter failed ({last}); check that the directory is complete"
