"""A Hugging Face model directory -> a GGUF file of the same precision, by llama.cpp's own converter.

The directory comes from a stranger: the converter runs in a child that loads no code from it
(converter_main.py), and everything of it that is read here is checked first (files.py).
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from ggml_ext.core import paths, process
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.progress import track
from ggml_ext.hf import converter_main
from ggml_ext.hf.files import Entry, check_weights, read_config, shown, weight_files

# The GGUF type that holds matrices of these types without loss.
_EXACT = {frozenset(("BF16",)): "bf16", frozenset(("F16",)): "f16"}
_FLOATS = frozenset(("BF16", "F16", "F32"))
# Types of quantised weights; the converter decodes those, to bf16 unless asked otherwise.
_QUANTISED = re.compile("F[468]_|F4$")
# Buffers that the converter leaves out (prepare_tensors in conversion/base.py).
_LEFT_OUT = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")

# Packages of the extra "convert", by the names they are imported under.
_EXTRA = ("google", "numpy", "safetensors", "sentencepiece", "torch", "transformers")
# Keeps the child's libraries off the network, and from trusting pickles because a variable says so.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
_ENVIRONMENT |= {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0", "TRUST_REMOTE_CODE": "0"}


def require(path: Path) -> None:
    """Raises GgmlExtError unless there is such a file or folder."""
    if not path.exists():
        raise GgmlExtError(
            f"{path}: no such file or directory; check the path, or the model's name on the Hugging Face Hub"
        )


def check(folder: Path) -> list[Path]:
    """Checks that the directory is complete and returns its weight files.

    Raises GgmlExtError naming what is missing or damaged: config.json, the index, a shard, its header, its
    end.
    """
    require(folder)
    read_config(folder)
    weights = weight_files(folder)
    check_weights(weights)
    return weights


def remarks(folder: Path) -> list[str]:
    """What the GGUF file of the directory will not hold, a line each."""
    parts = sorted(key for key in read_config(folder) if re.search("(vision|audio)_(config|tower)", key))
    if not parts:
        return []
    return [
        f"{folder}: the file will hold the text model only, nothing of {', '.join(map(shown, parts))}; "
        "llama.cpp's convert_hf_to_gguf.py --mmproj makes a file of the rest"
    ]


def exact_type(folder: Path, weights: list[Path]) -> str:
    """The GGUF float type that holds the checkpoint's matrices without loss: bf16, f16 or f32.

    Only floats count: a mask or an index is no weight, and what the converter leaves out does not count
    either. Matrices of different float types need f32. Quantised checkpoints (by config.json, or of 8 bits
    and fewer) are decoded by the converter, whose own choice for those is bf16. Raises GgmlExtError for
    pickled weights that are none.
    """
    config = read_config(folder) if (folder / "config.json").is_file() else {}
    if config.get("quantization_config"):
        return "bf16"
    headers = check_weights(weights)
    entries = {name: entry for header in headers.values() for name, entry in header.items()}
    for path in weights:
        if path not in headers:
            entries |= _pickled(path)
    matrices = {name: entry.dtype for name, entry in entries.items() if entry.is_matrix}
    if any(_QUANTISED.match(dtype) for dtype in matrices.values()):
        return "bf16"
    return _exact(matrices)


def _exact(matrices: Mapping[str, str]) -> str:
    """The same for name -> type of matrices that are not quantised."""
    weights = {name: dtype for name, dtype in matrices.items() if not name.endswith(_LEFT_OUT)}
    # No GGUF weight is wider than f32. Doubles count as that only where a weight is one: among buffers they
    # are written as f32 whatever type the weights have.
    doubles = any(dtype == "F64" and name.endswith(".weight") for name, dtype in weights.items())
    types = {dtype for dtype in weights.values() if dtype in _FLOATS} | ({"F32"} if doubles else set())
    return _EXACT.get(frozenset(types), "f32")


def _pickled(path: Path) -> dict[str, Entry]:
    """Name -> type and shape of the tensors in a file that torch.save wrote; offsets are 0.

    Reads no data and unpickles tensors only (weights_only). Raises GgmlExtError, naming the function that a
    file with more in it wants to call.
    """
    try:
        import torch
    except ImportError as exc:
        raise GgmlExtError(f"{path}: needs the package torch; pip install 'ggml-ext[convert]'") from exc
    try:
        content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception as exc:  # of every kind, since the file decides what fails
        if "mmap can only be used" in str(exc):
            remedy = "load it with torch.load(weights_only=True) and save it again"
            raise GgmlExtError(f"{path}: is in torch's old format; {remedy}") from exc
        wanted = pickled_call(exc)
        if wanted:
            problem = f"no file of tensors only, wants to call {wanted}; do not trust it"
        else:
            problem = "no file of tensors saved by torch, or cut off; download it again"
        raise GgmlExtError(f"{path}: {problem}") from exc
    if not (isinstance(content, Mapping) and content):
        raise GgmlExtError(f"{path}: no dictionary of tensors; download it again")
    entries = {}
    for name, tensor in content.items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor)):
            raise GgmlExtError(f"{path}: {shown(str(name))} is no tensor; download it again")
        dtype = _TORCH_DTYPES.get(str(tensor.dtype).removeprefix("torch."), "U8")
        entries[name] = Entry(dtype, tuple(tensor.shape), 0, 0)
    return entries


_TORCH_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_TORCH_DTYPES |= {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}


def pickled_call(exc: Exception) -> str | None:
    """The function that a file wants to call which torch.load(weights_only=True) refused; None if it failed
    for another reason."""
    if "weights only load failed" not in str(exc).lower():
        return None
    found = re.search(r"GLOBAL ([\w.]+)|Trying to (?:instantiate|call reduce for)[^\w]*([\w.]+)", str(exc))
    return shown(next(filter(None, found.groups()))) if found else None


def to_gguf(folder: Path, out: Path, *, trust_remote_code: bool = False) -> None:
    """Converts the directory to the GGUF file ``out``. Raises GgmlExtError in one line.

    The converter runs off the network: everything it needs lies in the directory. trust_remote_code: let
    transformers run the Python files in it, which some tokenizers need; without, such a directory is refused
    by the name of the file.
    """
    weights = check(folder)
    command = _command(folder, out, exact_type(folder, weights), trust_remote_code=trust_remote_code)
    size = sum(path.stat().st_size for path in weights)
    with track(size, "Hugging Face -> GGUF", "B") as advance:
        done = process.up_to(advance)

        def watch(_output: str) -> None:
            written = out.stat().st_size if out.exists() else 0
            if written > size // 100:  # the header, written early, says nothing about the rate
                done(min(size, written))

        # Not in the current folder: an empty entry of LD_LIBRARY_PATH would make it a place of libraries.
        finished = process.run(command, watch=watch, env=_ENVIRONMENT, cwd=paths.converter_dir())
    if finished.status != 0 or not out.is_file():
        raise GgmlExtError(_reason(folder, finished))


def _command(folder: Path, out: Path, type_name: str, *, trust_remote_code: bool) -> list[str | Path]:
    """Python in isolated mode: no current folder, no folder of the script, no PYTHON... variables."""
    converter = paths.converter_dir().absolute()
    settings = {
        "first": [str(converter), str(converter / "gguf-py")],
        "last": _further_packages(sys.path, folder),
        "trust_remote_code": trust_remote_code,
    }
    program: list[str | Path] = [sys.executable, "-I", "-B", "-X", "utf8", Path(converter_main.__file__)]
    # The name of the folder names the model: "." has none, and behind a link ".." is not what it looks like.
    model = folder.absolute() if ".." in folder.parts else Path(os.path.normpath(folder.absolute()))
    return [*program, json.dumps(settings), model, "--outfile", out.absolute(), "--outtype", type_name]


def _further_packages(path: Iterable[str], model: Path) -> list[str]:
    """Folders of packages that isolated mode leaves out: the user's own, and PYTHONPATH's.

    They come behind the standard library and the installation's packages and so replace none of them. The
    current folder is none of them, and no folder of the model's is.
    """
    stranger, current = model.resolve(), Path.cwd().resolve()
    found = []
    for entry in path:
        place = Path(entry).resolve()
        if entry and place not in (stranger, current) and stranger not in place.parents:
            found.append(str(place))
    return list(dict.fromkeys(found))


def _reason(folder: Path, finished: process.Finished) -> str:
    """The converter's last words, with the remedy where we know it."""
    output = finished.output
    if re.search(r"No space left on device|\d+ requested and \d+ written", output):
        return f"{folder}: the disk is full; free some space (the float GGUF needs as much as the model)"
    wanted = re.findall(rf"RemoteCode: {re.escape(converter_main.REFUSED)} (.*)", output)
    if wanted:
        return (
            f"{folder}: {shown(wanted[-1].strip())} wants to run, which is code that came with the model; "
            "read it, and add --trust-remote-code if you trust it"
        )
    missing = re.search(r"^ModuleNotFoundError: No module named '(\w+)", output, re.MULTILINE)
    if missing and missing[1] in ("conversion", "gguf", "convert_hf_to_gguf"):
        return f"{folder}: llama.cpp's converter lacks its own {missing[1]}; reinstall ggml-ext"
    if missing:
        # The output holds what the model says too, so no command installs a package of its choice.
        remedy = "pip install 'ggml-ext[convert]'" if missing[1] in _EXTRA else "install it if you know it"
        return f"{folder}: the converter needs the package {missing[1]}; {remedy}"
    unsupported = re.search(r"Model (\w+) is not supported", output)
    if unsupported:
        return f"{folder}: architecture {unsupported[1]} is unknown to this llama.cpp; use another model"
    last = shown(process.last_words(finished), most=400)
    return f"{folder}: llama.cpp's converter failed ({last}); check that the directory is complete"


def n_float_bytes(folder: Path, weights: list[Path]) -> int:
    """Size of the GGUF file of the directory, its header apart: matrices of one type, the rest float32."""
    of_matrix = 4 if exact_type(folder, weights) == "f32" else 2
    headers = check_weights(weights)
    sizes = [
        entry.n_weights * (of_matrix if entry.is_matrix else 4)
        for header in headers.values()
        for name, entry in header.items()
        if not name.endswith(_LEFT_OUT)
    ]
    return sum(sizes) + sum(path.stat().st_size for path in weights if path not in headers)
