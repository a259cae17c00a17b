"""A model's file with other keys and tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


def rewritten(path: Path, out: Path, arch: str, keys: dict[str, Any], tensors: Arrays) -> Path:
    """The Llama ``path`` as another architecture, with more keys, and with tensors in the place of its own or
    beside them; an empty one is left out."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, arch)
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name.replace("llama.", f"{arch}.", 1), entry.contents(), entry.types[0])
    for name, value in keys.items():
        add = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](f"{arch}.{name}", value)
    for name, values in {**{tensor.name: tensor.data for tensor in reader.tensors}, **tensors}.items():
        if values.size:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
