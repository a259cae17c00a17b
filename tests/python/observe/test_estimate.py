"""ggml-ext observe --dry-run: what its time is made of, beside the batches."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

import models
from eval_models import make_model, text_of
from ggml_ext.hf import folder as hf
from ggml_ext.observe import estimate as estimates
from ggml_ext.observe.prepare import Request


@pytest.fixture
def request_of(tmp_path: Path) -> Request:
    (tmp_path / "text").write_text(text_of(400))
    model = make_model(tmp_path / "m.gguf")
    return Request(model, tmp_path / "text", samples=8, ctx=16, threads=1)


def estimate(request: Request, folder: Path) -> estimates.Estimate:
    return estimates.estimate(request, folder, warn=lambda _line: None)


def test_all_that_is_written_takes_time(
    request_of: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One generation of sums, and the samples, which are more here."""
    free = estimate(request_of, tmp_path / "o").seconds
    monkeypatch.setattr(estimates, "_seconds_per_byte", lambda _folder, _n_bytes: 1.0)
    found = estimate(request_of, tmp_path / "o")
    written = found.disk["two generations of sums"] / 2 + found.disk["samples"]
    assert free < 100
    assert written < found.seconds < written + 100


def test_the_conversion_of_a_folder_takes_time(
    request_of: Request,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slow(_folder: Path, out: Path, **_: object) -> None:
        shutil.copyfile(request_of.source, out)
        time.sleep(2)

    monkeypatch.setattr(hf, "to_gguf", slow)
    source = models.llama_dir(tmp_path_factory.getbasetemp())
    changed = Request(source, request_of.text, samples=8, ctx=16, threads=1)
    assert estimate(changed, tmp_path / "o").seconds > 2
