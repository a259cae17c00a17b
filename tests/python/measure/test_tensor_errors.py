"""The errors of tensors that a file has about itself, as compare shows them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.measure import loss
from ggml_ext.measure.compare import file_facts

BLOCKS, CTX, VOCABULARY, BOS = 3, 48, 384, 1
Weights = dict[str, NDArray[np.float64]]


def add_errors(path: Path, names: list[str], values: list[float]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("ggml_ext.version", 1)
    writer.add_array("ggml_ext.error.tensors", names)
    writer.add_array("ggml_ext.error.values", values)
    writer.add_string("ggml_ext.error.kind", "output")
    writer.add_string("ggml_ext.rounding", "gptq")
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_errors_of_tensors_are_read_from_the_file(tmp_path: Path) -> None:
    names = [f"blk.{i}.ffn_up.weight" for i in range(7)]
    path = add_errors(tmp_path / "model.gguf", names, [0.5, 0.125, 0.75, 0.0, 0.25, 0.0625, 1.0])
    facts = file_facts(path)
    errors = facts.tensor_errors
    assert errors is not None
    assert list(errors["values"]) == names
    assert facts.origin == {
        "ggml_ext.version": 1, "ggml_ext.error.kind": "output", "ggml_ext.rounding": "gptq"
    }  # fmt: skip
    table = loss.tensor_table([{"tensor_errors": None}, {"tensor_errors": errors}], ["base", "model"])
    assert table is not None
    assert [(line[1], line[2]) for line in table[1]] == [
        (f"`blk.{i}.ffn_up.weight`", value)
        for i, value in ((6, "1"), (2, "0.75"), (0, "0.5"), (4, "0.25"), (1, "0.125"))
    ]
    assert loss.tensor_table([{"tensor_errors": None}], ["base"]) is None


def test_errors_of_tensors_that_json_cannot_hold(tmp_path: Path) -> None:
    path = add_errors(tmp_path / "model.gguf", ["a", "b"], [0.5, float("nan")])
    with pytest.raises(GgmlExtError, match=r"model\.gguf: key ggml_ext\.error\.values holds NaN or Inf; "):
        file_facts(path)
