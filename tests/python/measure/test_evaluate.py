"""Perplexity and KL divergence: equal to llama-perplexity's, exact, bounded in memory, resumable."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from eval_models import llama_perplexity, make_model, text_of
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.measure import evaluate, windows
from ggml_ext.measure.evaluate import Evaluation, perplexity
from ggml_ext.measure.standard_error import NORMAL, TextErrors
from ggml_ext.runtime.llama import Model

CTX = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.gguf (f16), noisy.gguf (f16), q4_0.gguf, and text.txt of about 4000 tokens."""
    made = tmp_path_factory.mktemp("models")
    make_model(made / "base.gguf")
    make_model(made / "noisy.gguf", noise=0.1)
    make_model(made / "q4_0.gguf", kind=Type.Q4_0)
    (made / "text.txt").write_text(text_of(2600))
    return made


def figure(output: str, label: str) -> tuple[float, float]:
    """ "label: 1.23 ± 0.04" -> (1.23, 0.04)."""
    found = re.search(rf"{label}\s*[:=]\s*(-?[\d.]+) (?:±|\+/-)\s*([\d.]+)", output)
    assert found is not None, output
    return float(found[1]), float(found[2])


# 64: many windows share a batch; 100: a size that divides nothing; 2100: longer than a batch.
@pytest.mark.parametrize("ctx", [64, 100, 2100])
def test_perplexity_equals_llama_perplexity(folder: Path, ctx: int, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_of(3000 if ctx > 1000 else 800))
    theirs, their_error = figure(
        llama_perplexity(folder / "base.gguf", "-f", str(text), "-c", str(ctx)), "Final estimate: PPL"
    )
    ours = perplexity(folder / "base.gguf", text, ctx=ctx)
    assert ours.ppl == pytest.approx(theirs, rel=1e-5)
    assert ours.ppl_se_independent == pytest.approx(their_error, rel=1e-4)


def test_model_without_bos(folder: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "no-bos.gguf", bos=False)
    theirs, _ = figure(
        llama_perplexity(model, "-f", str(folder / "text.txt"), "-c", "64"), "Final estimate: PPL"
    )
    assert perplexity(model, folder / "text.txt", ctx=CTX).ppl == pytest.approx(theirs, rel=1e-5)


def test_divergence_agrees_with_llama_perplexity(folder: Path, tmp_path: Path) -> None:
    logits = str(tmp_path / "logits")
    llama_perplexity(
        folder / "base.gguf", "-f", str(folder / "text.txt"), "-c", "64", "--kl-divergence-base", logits
    )
    theirs = llama_perplexity(
        folder / "noisy.gguf", "-c", "64", "--kl-divergence-base", logits, "--kl-divergence"
    )
    with Evaluation(
        folder / "base.gguf", [folder / "noisy.gguf"], folder / "text.txt", ctx=CTX
    ) as evaluation:
        ours = evaluation.run()[1]
    assert ours.divergence is not None
    kld, kld_se = figure(theirs, "Mean    KLD")
    assert ours.divergence.kld == pytest.approx(kld, rel=2e-3, abs=1e-6)
    assert ours.divergence.kld_se_independent == pytest.approx(kld_se, rel=1e-2, abs=1e-6)
    ratio, ratio_se = figure(theirs, r"Mean ln\(PPL\(Q\)/PPL\(base\)\)")
    assert ours.divergence.ln_ppl_ratio == pytest.approx(ratio, abs=3e-5)
    assert ours.divergence.ln_ppl_ratio_se_independent == pytest.approx(ratio_se, rel=1e-2, abs=1e-6)
    # One position in 2000 may tie in their 16-bit logits.
    assert 100 * ours.divergence.top1 == pytest.approx(figure(theirs, "Same top p")[0], abs=0.06)
    top1_se = figure(theirs, "Same top p")[1]
    assert 100 * ours.divergence.top1_se_independent == pytest.approx(top1_se, abs=2e-3)
    assert 100 * ours.divergence.p_diff_rms == pytest.approx(figure(theirs, "RMS Δp")[0], abs=2e-3)
    assert 100 * ours.divergence.p_diff_mean == pytest.approx(figure(theirs, "Mean    Δp")[0], abs=2e-3)


def dump_logits(path: Path, cut: NDArray[np.int32]) -> NDArray[np.float64]:
    """Logits [window, position, vocabulary] of every position, one window per decode."""
    with Model(path) as model:
        model.start(n_ctx=CTX, n_seq=1, n_batch=CTX)
        found = []
        for tokens in cut:
            model.clear()
            tokens = tokens.copy()
            tokens[0] = 1
            positions = np.arange(CTX, dtype=np.int32)
            logits = model.decode(tokens, positions, np.zeros(CTX, np.int32), np.ones(CTX, bool))
            found.append(logits.astype(np.float64))
    return np.stack(found)


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_divergence_equals_plain_computation(folder: Path) -> None:
    paths = [folder / "base.gguf", folder / "noisy.gguf"]
    with Evaluation(paths[0], paths[1:], folder / "text.txt", ctx=CTX) as evaluation:
        result = evaluation.run()[1]
        tokens = evaluation.windows
    scored = slice(CTX // 2, CTX - 1)
    base, model = (log_softmax(dump_logits(path, tokens)[:, scored]) for path in paths)
    targets = tokens[:, CTX // 2 + 1 :, None]
    nll = -np.take_along_axis(model, targets, axis=-1)
    kld = (np.exp(base) * (base - model)).sum(axis=-1)
    count = kld.size
    assert result.perplexity.count == count
    assert result.perplexity.ppl == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    assert result.perplexity.ppl_se_independent == pytest.approx(
        np.exp(nll.mean()) * nll.std() / np.sqrt(count - 1), rel=1e-4
    )
    assert result.divergence is not None
    assert result.divergence.kld == pytest.approx(kld.mean(), rel=1e-4)
    assert result.divergence.kld_se_independent == pytest.approx(kld.std() / np.sqrt(count - 1), rel=1e-3)
    # llama.cpp's own rounding differs a little with the size of a batch.
    assert result.divergence.kld_max == pytest.approx(kld.max(), rel=1e-2)
    assert result.divergence.kld_percentiles["95"] == pytest.approx(np.percentile(kld, 95), rel=2e-3)
    top1 = (base.argmax(-1) == model.argmax(-1)).mean()
    assert result.divergence.top1 == pytest.approx(top1, abs=1.5 / count)
    independent = np.sqrt(top1 * (1 - top1) / (count - 1))
    assert result.divergence.top1_se_independent == pytest.approx(independent, rel=1e-2)
    errors = TextErrors(len(tokens), CTX // 2 - 1, CTX)
    assert result.divergence.kld_se == pytest.approx(errors.error(kld.ravel()), rel=2e-3)
    nll_error = errors.error(nll.ravel())
    assert nll_error is not None
    assert result.perplexity.ppl_se == pytest.approx(np.exp(nll.mean()) * nll_error, rel=1e-3)
    assert result.perplexity.ppl_ci95 == pytest.approx(
        [np.exp(nll.mean() - NORMAL * nll_error), np.exp(nll.mean() + NORMAL * nll_error)], rel=1e-3
    )


def test_model_against_itself(folder: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin.gguf"
    twin.write_bytes((folder / "base.gguf").read_bytes())
    with Evaluation(folder / "base.gguf", [twin], folder / "text.txt", ctx=CTX) as evaluation:
        base, same = evaluation.run()
    assert same.divergence is not None
    assert base.divergence is None
    assert abs(same.divergence.kld) < 1e-12
    assert same.divergence.top1 == 1.0
    assert same.perplexity == base.perplexity


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """Logits of 3 more windows would take 465 MB as float32."""
    models = [
        make_model(tmp_path / f"{name}.gguf", vocabulary=152_000, noise=noise)
        for name, noise in (("a", 0.0), ("b", 0.1))
    ]
    peaks = []
    for words in (400, 1200):
        text = tmp_path / f"{words}.txt"
        text.write_text(text_of(words))
        child = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "ggml_ext.cli.entry",
                "compare",
                *map(str, models),
                "-f",
                str(text),
                "--rounds",
                "0",
            ],
            stdout=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(child.pid, 0)
        assert status == 0
        peaks.append(usage.ru_maxrss / 1000)
    assert peaks[1] - peaks[0] < 100
    assert peaks[1] < 1500


@pytest.mark.parametrize("vocabulary", [384, 32_000, 152_000, 262_144])
@pytest.mark.parametrize("ctx", [16, 100, 512, 2048, 4096, 131_072])
def test_plan_bounds_the_logits_of_a_decode(vocabulary: int, ctx: int) -> None:
    plan = windows.make_plan(ctx, vocabulary)
    rows = plan.n_seq * min(plan.rows, plan.step)
    assert rows * vocabulary * 4 <= windows.OUTPUT_BYTES
    assert plan.n_seq >= 1
    assert plan.n_seq * plan.step <= windows.BATCH_TOKENS
    assert plan.n_seq == 1 or plan.step == ctx


def test_small_scratch_gives_the_same_figures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (folder / "base.gguf", [folder / "noisy.gguf", folder / "q4_0.gguf"], folder / "text.txt")
    monkeypatch.setattr(windows, "BATCH_TOKENS", CTX)
    with Evaluation(*arguments, ctx=CTX) as evaluation:
        whole = evaluation.run()
        evaluation.finish()
    monkeypatch.setattr(windows, "SCRATCH_BYTES", 5 * 31 * 384 * 4)
    decoded = count_decodes(monkeypatch)
    with Evaluation(*arguments, ctx=CTX) as evaluation:
        pieces = evaluation.run()
    assert pieces == whole
    assert decoded == dict.fromkeys(("base.gguf", "noisy.gguf", "q4_0.gguf"), evaluation.n_windows)


def count_decodes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Decodes per model from now on."""
    counts: dict[str, int] = {}
    decode = Model.decode

    def counted(self: Model, *arguments: NDArray[np.int32]) -> NDArray[np.float32]:
        counts[self.path.name] = counts.get(self.path.name, 0) + 1
        return decode(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "decode", counted)
    return counts


class Stopper:
    """A progress bar that presses Ctrl-C after some windows."""

    def __init__(self, windows: int) -> None:
        self.left = windows

    def __call__(self, *_: object) -> Stopper:
        return self

    def __enter__(self) -> Stopper:
        return self

    def __exit__(self, *_: object) -> None: ...

    def advance(self, _: float) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop_after", [3, 70, 100, 150])
def test_an_interrupted_run_resumes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path, stop_after: int
) -> None:
    monkeypatch.setattr(windows, "BATCH_TOKENS", CTX)  # a decode per window: resuming changes no batch
    arguments = (folder / "base.gguf", [folder / "noisy.gguf", folder / "q4_0.gguf"], folder / "text.txt")
    with Evaluation(*arguments, ctx=CTX) as evaluation:
        expected = evaluation.run()
        evaluation.finish()
    assert not list((own_cache / "evaluate").iterdir())
    with monkeypatch.context() as patch:
        stopper = Stopper(stop_after)
        patch.setattr(evaluate, "track", lambda *_: _AsContext(stopper))
        with pytest.raises(KeyboardInterrupt), Evaluation(*arguments, ctx=CTX) as evaluation:
            evaluation.run()
    journals = list((own_cache / "evaluate").glob("*/*.scores"))
    with journals[0].open("ab") as file:
        file.write(b"torn")  # a window that was being written when the power failed
    decoded = count_decodes(monkeypatch)
    with Evaluation(*arguments, ctx=CTX) as evaluation:
        resumed = evaluation.run()
        evaluation.finish()
    assert sum(decoded.values()) <= 3 * evaluation.n_windows - stop_after + evaluation.n_windows
    scored = [n for name, n in decoded.items() if name != "base.gguf"]
    assert sum(scored) == 3 * evaluation.n_windows - max(stop_after, evaluation.n_windows)
    assert resumed == expected


class _AsContext:
    """Gives a Stopper's advance where the package expects progress.track."""

    def __init__(self, stopper: Stopper) -> None:
        self.stopper = stopper

    def __enter__(self) -> object:
        return self.stopper.advance

    def __exit__(self, *_: object) -> None: ...


def test_read_only_cache_only_prevents_resuming(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the cache folder should be")
    monkeypatch.setenv("GGML_EXT_CACHE", str(blocked))
    assert perplexity(folder / "base.gguf", folder / "text.txt", ctx=CTX).windows > 0
    assert "cannot be resumed" in capsys.readouterr().err


def test_two_runs_at_once_do_not_share_a_journal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (folder / "base.gguf", [], folder / "text.txt")
    with Evaluation(*arguments, ctx=CTX), Evaluation(*arguments, ctx=CTX) as second:
        assert second.run()[0].perplexity.count > 0
    assert "another run" in capsys.readouterr().err


def test_text_shorter_than_a_window(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("the of and")
    with pytest.raises(GgmlExtError, match=r"short\.txt: has \d+ tokens, one window needs 64; lengthen"):
        perplexity(folder / "base.gguf", text, ctx=CTX)


def test_damaged_and_missing_files(folder: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes((folder / "base.gguf").read_bytes()[:-5000])
    text, base = folder / "text.txt", folder / "base.gguf"
    with pytest.raises(GgmlExtError, match=r"truncated\.gguf: .*not within the file bounds"):
        perplexity(truncated, text)
    with pytest.raises(GgmlExtError, match=r"truncated\.gguf: .*not within the file bounds"):
        Evaluation(base, [truncated], text)
    with pytest.raises(GgmlExtError, match=r"text\.txt: .*invalid magic"):
        perplexity(text, text)
    with pytest.raises(GgmlExtError, match=r"nothing: No such file"):
        perplexity(tmp_path / "nothing", text)
    with pytest.raises(GgmlExtError, match=r"nothing: No such file"):
        Evaluation(base, [tmp_path / "nothing"], text)
    with pytest.raises(GgmlExtError, match="Is a directory"):
        perplexity(base, tmp_path)


def test_models_of_different_vocabularies(folder: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other.gguf", vocabulary=400)
    with pytest.raises(GgmlExtError, match=r"other\.gguf: its vocabulary is not that"):
        Evaluation(folder / "base.gguf", [other], folder / "text.txt", ctx=CTX)


def test_nan_in_the_weights_is_found(folder: Path, tmp_path: Path) -> None:
    broken = make_model(tmp_path / "nan.gguf", nan=True)
    with (
        Evaluation(folder / "base.gguf", [broken], folder / "text.txt", ctx=CTX) as evaluation,
        pytest.raises(GgmlExtError, match=r"nan\.gguf: gives NaN"),
    ):
        evaluation.run()


def test_no_room_for_scratch(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(windows, "SCRATCH_BYTES", 1000)
    with (
        Evaluation(folder / "base.gguf", [folder / "noisy.gguf"], folder / "text.txt", ctx=CTX) as evaluation,
        pytest.raises(GgmlExtError, match=r"no room for .* set TMPDIR"),
    ):
        evaluation.run()


def test_books_model_equals_llama_perplexity(shared_dir: Path, tmp_path: Path) -> None:
    """A real model, where it is at hand."""
    pytest.importorskip("torch")
    from ggml_ext.hf import folder as hf

    model, text = tmp_path / "books.gguf", tmp_path / "eval.txt"
    hf.to_gguf(shared_dir / "models" / "books-8m", model)
    text.write_bytes((shared_dir / "text" / "eval.txt").read_bytes()[:40_000])
    theirs, their_error = figure(llama_perplexity(model, "-f", str(text), "-c", "512"), "Final estimate: PPL")
    ours = perplexity(model, text)
    assert ours.ppl == pytest.approx(theirs, rel=1e-5)
    assert ours.ppl_se_independent == pytest.approx(their_error, rel=1e-4)
