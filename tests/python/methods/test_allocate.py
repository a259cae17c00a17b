"""The errors that types are chosen by, and the bytes that are left for them.

What would break these: errors of another rounding than the conversion's, or by the moments of another site; a
bound on the rest of the file that is too low.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import models
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.gguf.source import Tensor, open_gguf
from ggml_ext.methods.calibrate import plan as plans
from ggml_ext.methods.calibrate.allocate import TYPES, _Rounder, allocated, candidates, some_rows
from ggml_ext.methods.calibrate.plan import Plan, Request
from ggml_ext.methods.rounding import relative_error, round_matrix
from ggml_ext.methods.rounding.hessian import Hessian
from ggml_ext.observe import prepare
from ggml_ext.observe.reader import Observation
from ggml_ext.observe.run import observe
from ggml_ext.recipes import Method
from ggml_ext.runtime import native


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama_gguf(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def seen(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Observation:
    folder = tmp_path_factory.mktemp("seen")
    (folder / "text").write_text(models.TEXT * 8)
    request = prepare.Request(source, folder / "text", samples=4, ctx=48, threads=1)
    observe(request, folder / "observation", warn=lambda _line: None)
    return Observation(folder / "observation")


@pytest.fixture(scope="module")
def plan(source: Path, seen: Observation) -> Plan:
    request = Request(source, None, Method("fq4", rounding="gptq", bpw=6.0), ctx=48, threads=1)
    return plans.make(request, "0" * 64, open_gguf(source), seen.table, seen.description)


def tensor_of(source: Path, name: str) -> Tensor:
    return next(tensor for tensor in open_gguf(source).tensors if tensor.name == name)


def test_errors_are_those_of_the_conversions_rounding(source: Path, seen: Observation, plan: Plan) -> None:
    tensor = tensor_of(source, "blk.1.ffn_down.weight")
    rounder = _Rounder(plan, seen, 1)
    found = rounder.errors(tensor)
    assert set(found) == {"q4_0", *candidates(tensor, "gptq", stock=False)}
    site = seen.site_of(tensor.name)
    assert site is not None
    moments = torch.from_numpy(seen.moment(site)).double()
    rows = some_rows(tensor, 32)
    assert len(rows) == 32
    its = rounder._hessian(tensor.name)
    assert its is not None
    for kind, method in (("fq4", "gptq"), ("q5_0", "gptq"), ("q8_0", "imatrix")):
        hessian = Hessian(moments, its.shrinkage)
        assert found[kind] == pytest.approx(round_matrix(rows, kind, method, hessian, threads=1).error)
    probed = rounder.probe(tensor, rows)
    assert found["q4_0"] == pytest.approx(relative_error(rows, probed, moments))
    plain = native.dequantize("q4_0", native.quantize("q4_0", rows), tensor.row_length)
    assert found["q4_0"] < 0.9 * relative_error(rows, plain, moments)


def test_what_reads_no_site_is_rounded_to_nearest(source: Path, seen: Observation, plan: Plan) -> None:
    tensor = tensor_of(source, "token_embd.weight")
    rows = some_rows(tensor, 32)
    found = _Rounder(plan, seen, 1).errors(tensor)
    plain = native.dequantize("q5_0", native.quantize("q5_0", rows), tensor.row_length)
    assert found["q5_0"] == pytest.approx(relative_error(rows, plain, None))


@pytest.mark.parametrize("most", [1, 7, 32, 10**6])
def test_rows_from_all_over(source: Path, most: int) -> None:
    tensor = tensor_of(source, "blk.0.ffn_up.weight")
    whole, rows = some_rows(tensor, 10**9), some_rows(tensor, most)
    assert whole.shape == (tensor.n_rows, tensor.row_length)
    assert 0.5 * min(most, tensor.n_rows) < len(rows) <= most
    every = -(-tensor.n_rows // most)
    np.testing.assert_array_equal(rows, whole[::every])


def test_types_that_were_not_chosen_are_missed(plan: Plan, tmp_path: Path) -> None:
    for text in (None, "{}", "[]", '{"a": "b"}', "x"):
        if text is not None:
            (tmp_path / TYPES).write_text(text)
        with pytest.raises(GgmlExtError, match=r"types\.json: no choice of types .*; go on"):
            allocated(plan, tmp_path)
    assert allocated(replace(plan, free=[]), tmp_path).types == plan.types


def test_candidates_fit_the_rows(source: Path) -> None:
    tensor = tensor_of(source, "blk.0.attn_q.weight")
    assert {"fq4", "fq4_64", "q6_k", "q8_0"} <= set(candidates(tensor, "gptq", stock=False))
    assert not {"fq4", "fq4_64"} & set(candidates(tensor, "gptq", stock=True))
    narrow = replace(tensor, dims=(576, 4))
    assert {"fq4_64", "q5_0"} <= set(candidates(narrow, "gptq", stock=False))
    assert not {"fq4", "q4_k", "q6_k"} & set(candidates(narrow, "gptq", stock=False))
    assert "q3_k" in candidates(tensor, "imatrix", stock=True)
    assert "q3_k" not in candidates(tensor, "gptq", stock=True)
