"""Transforms inside llama.cpp: exact where they should be, refused where the file is wrong.

What would break these: a factor read transposed, a matrix of a site left without the transform, a LoRA that
sees transformed activations, a stale tensor shared between graphs, a check that passes a wrong file.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import transform_files as files
from fold_files import write_adapter
from transform_files import run

CONCURRENT = Path(__file__).parents[1] / "concurrent_logits.py"


def logits(lib_dir: Path, model: Path, *options: str, **env: str) -> NDArray[np.float64]:
    out = model.with_suffix(".npy")
    result = run(lib_dir, model, out, *options, **env)
    assert result.returncode == 0, result.stderr[-2000:]
    values: NDArray[np.float32] = np.load(out)
    assert np.isfinite(values).all()
    return values.astype(np.float64)


def divergence(base: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Mean KL divergence of the predictions from base's, in nats."""
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (base, other))
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


@pytest.fixture(scope="module", params=[files.llama_f32, files.mixtral_f32], ids=["llama", "mixtral"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = request.param(tmp_path_factory.getbasetemp())
    return path


@pytest.mark.parametrize("case", ["f32", "f16", "hadamard"])
def test_transformed_model_computes_the_same(
    case: str, source: Path, patched_lib_dir: Path, tmp_path: Path
) -> None:
    model = files.transform(
        files.read(source),
        dtype=np.float16 if case == "f16" else np.float32,
        use_hadamard=case == "hadamard",
    ).write(tmp_path / "t.gguf")
    base, other = logits(patched_lib_dir, source), logits(patched_lib_dir, model)
    assert np.abs(base - other).max() <= 1e-3 * np.abs(base).max()
    assert divergence(base, other) <= 1e-6
    assert (base != other).any(), "equal bits: the transform did not run"


def test_identity_factors_give_the_same_bits(source: Path, patched_lib_dir: Path, tmp_path: Path) -> None:
    model = files.transform(files.read(source), identity=True).write(tmp_path / "t.gguf")
    assert logits(patched_lib_dir, source).tobytes() == logits(patched_lib_dir, model).tobytes()


def test_stock_llama_refuses_transforms(source: Path, stock_build: Path, tmp_path: Path) -> None:
    model = files.transform(files.read(source)).write(tmp_path / "t.gguf")
    result = run(stock_build, model, tmp_path / "out.npy")
    assert result.returncode == 1
    assert "wrong number of tensors" in result.stderr


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.llama_f32(tmp_path_factory.getbasetemp())


def rms_norm(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """RMS normalisation, epsilon 1e-5 and gain 1 as in the tiny models."""
    normalised: NDArray[np.float64] = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return normalised


def round_a4(x: NDArray[np.float64], group: int) -> NDArray[np.float64]:
    """Four bits, symmetric, one scale per group of channels (0: per token)."""
    grouped = x.reshape(*x.shape[:-1], -1, group or x.shape[-1])
    scale = np.abs(grouped).max(-1, keepdims=True) / 7
    rounded: NDArray[np.float64] = (np.rint(grouped / scale) * scale).reshape(x.shape)
    return rounded


class FeedForward:
    """The tiny Llama with its attention silenced (attn_output is zero), so that numpy can follow it: per
    block x += down(silu(gate(h)) * up(h)), h = rms_norm(x), with transforms as docs/gguf.md has them."""

    def __init__(self, source: Path) -> None:
        self.model = files.read(source)
        for block in range(self.model.blocks):
            self.model.tensors[f"blk.{block}.attn_output.weight"][:] = 0

    def weight(self, name: str) -> NDArray[np.float64]:
        return self.model.tensors[f"{name}.weight"].astype(np.float64)

    def site(self, x: NDArray[np.float64], block: int, anchor: str) -> NDArray[np.float64]:
        """What the anchor's matrices read: L^T X R, then the clip."""
        name = f"blk.{block}.{anchor}"
        if f"{name}.fq_l" in self.model.tensors:
            left, right = (self.model.tensors[f"{name}.fq_{side}"].astype(np.float64) for side in "lr")
            x = (left.T @ x.reshape(-1, left.shape[0], right.shape[0]) @ right).reshape(x.shape)
        clips = self.model.ours.get("ggml_ext.transform.clip")
        if clips is not None:
            bound = clips[4 * block + (2 if anchor == "ffn_gate" else 3)] * np.abs(x).max(-1, keepdims=True)
            x = np.clip(x, -bound, bound)
        return x

    def logits(self, group: int | None = None) -> NDArray[np.float64]:
        """``group``: of the rounding to 4 bits in front of the last down projection, None for none."""
        embeddings = self.weight("token_embd")
        x = embeddings[np.arange(48) * 7 % len(embeddings)]
        for block in range(self.model.blocks):
            h = self.site(rms_norm(x), block, "ffn_gate")
            gate, up = (h @ self.weight(f"blk.{block}.ffn_{part}").T for part in ("gate", "up"))
            middle = self.site(gate / (1 + np.exp(-gate)) * up, block, "ffn_down")
            if group is not None and block == self.model.blocks - 1:
                middle = round_a4(middle, group)
            x = x + middle @ self.weight(f"blk.{block}.ffn_down").T
        result: NDArray[np.float64] = rms_norm(x) @ self.weight("output").T
        return result


def relative(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(((a - b) ** 2).sum() / (b**2).sum())


def test_clip_is_what_numpy_computes(llama: Path, patched_lib_dir: Path, tmp_path: Path) -> None:
    network = FeedForward(llama)
    plain = network.logits()
    files.transform(network.model)
    network.model.ours["ggml_ext.transform.clip"] = [1.0, 1.0, 0.5, 0.25, 1.0, 1.0, 0.75, 0.125]
    expected = network.logits()
    actual = logits(patched_lib_dir, network.model.write(tmp_path / "t.gguf"))
    assert relative(actual, expected) < 1e-8
    assert relative(plain, expected) > 1e-3, "the clip hardly acts: the test shows nothing"


def test_clip_needs_no_transform(llama: Path, patched_lib_dir: Path, tmp_path: Path) -> None:
    network = FeedForward(llama)
    network.model.ours = {"ggml_ext.version": 1, "ggml_ext.transform.clip": [1.0] * 8}
    unclipped = logits(patched_lib_dir, network.model.write(tmp_path / "one.gguf"))
    network.model.ours["ggml_ext.transform.clip"] = [1.0, 1.0, 0.25, 0.25] * 2
    clipped = logits(patched_lib_dir, network.model.write(tmp_path / "clip.gguf"))
    assert relative(clipped, network.logits()) < 1e-8
    assert relative(unclipped, clipped) > 1e-3


@pytest.mark.parametrize(("name", "group"), [("a4", 0), ("a4/32", 32), ("a4/256", 256)])
def test_four_bit_activations_are_what_numpy_computes(
    name: str, group: int, llama: Path, patched_lib_dir: Path, tmp_path: Path
) -> None:
    """The last down projection is in Q8_0, so that nothing behind the rounding is discontinuous; the 8 bits
    to which llama.cpp rounds the 4-bit values once more are the difference that remains."""
    network = FeedForward(llama)
    files.transform(network.model)
    network.model.ours["ggml_ext.transform.clip"] = [0.75] * 8
    last, q8_0 = "blk.1.ffn_down.weight", gguf.GGMLQuantizationType.Q8_0
    weight = network.model.tensors[last]
    network.model.tensors[last] = gguf.quants.dequantize(gguf.quants.quantize(weight, q8_0), q8_0)
    path = network.model.write(tmp_path / "t.gguf", {last: q8_0})
    expected = network.logits(group)
    actual = logits(patched_lib_dir, path, GGML_EXT_ACT=name)
    own = logits(patched_lib_dir, path)
    assert relative(actual, expected) < 0.02 * relative(own, expected)
    network.model.ours |= {"ggml_ext.activation.bits": 4, "ggml_ext.activation.group": group}
    path = network.model.write(tmp_path / "key.gguf", {last: q8_0})
    assert logits(patched_lib_dir, path).tobytes() == actual.tobytes()
    assert logits(patched_lib_dir, path, GGML_EXT_ACT="a8").tobytes() == own.tobytes()


def test_switch_works_for_stock_files_and_spares_float_weights(
    llama: Path, patched_lib_dir: Path, tmp_path: Path
) -> None:
    base = logits(patched_lib_dir, llama)
    assert logits(patched_lib_dir, llama, GGML_EXT_ACT="a4").tobytes() == base.tobytes()
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    model = files.read(llama).write(tmp_path / "head.gguf", {"output.weight": q8_0})
    with_head = logits(patched_lib_dir, model)
    assert logits(patched_lib_dir, model, GGML_EXT_ACT="a4").tobytes() == with_head.tobytes()
    model = files.read(llama).write(tmp_path / "q.gguf", {"blk.1.attn_q.weight": q8_0})
    own = logits(patched_lib_dir, model)
    assert logits(patched_lib_dir, model, GGML_EXT_ACT="a8").tobytes() == own.tobytes()
    rounded = run(patched_lib_dir, model, tmp_path / "a4.npy", GGML_EXT_ACT="a4")
    assert 1e-6 < relative(np.load(tmp_path / "a4.npy").astype(np.float64), own) < 0.1
    assert rounded.stderr.count("activations a4;") == 1


def test_adapters_see_the_raw_input(llama: Path, patched_lib_dir: Path, tmp_path: Path) -> None:
    """The adapter was made for the plain model; on the transformed one it must do the same."""
    model = files.read(llama)
    names = (
        "blk.0.attn_q.weight",
        "blk.0.attn_output.weight",
        "blk.1.ffn_up.weight",
        "blk.1.ffn_down.weight",
    )
    adapter = write_adapter(tmp_path / "lora.gguf", {name: model.tensors[name].shape for name in names})
    files.transform(model)
    model.ours["ggml_ext.fold.sizes"] = [0] * 8  # nothing was folded
    path = model.write(tmp_path / "t.gguf")
    base = logits(patched_lib_dir, llama, "--lora", str(adapter))
    other = logits(patched_lib_dir, path, "--lora", str(adapter))
    assert np.abs(base - other).max() <= 1e-3 * np.abs(base).max()
    assert relative(base, logits(patched_lib_dir, llama)) > 1e-4, (
        "the adapter hardly acts: the test shows nothing"
    )


Q8_0_CACHE = ("--flash", "--cache", "8", "8")


def test_learned_kv_transforms(llama: Path, patched_lib_dir: Path, tmp_path: Path) -> None:
    path = files.transform_heads(files.read(llama), 64).write(tmp_path / "t.gguf")
    base = logits(patched_lib_dir, llama, "--flash")
    assert logits(patched_lib_dir, path, "--flash").tobytes() == base.tobytes(), "an f16 cache needs none"
    result = run(patched_lib_dir, path, tmp_path / "q.npy", *Q8_0_CACHE)
    quantised = np.load(tmp_path / "q.npy").astype(np.float64)
    assert 0 < relative(quantised, base) < 1e-3
    assert (quantised != logits(patched_lib_dir, llama, *Q8_0_CACHE)).any()
    for name in "KV":
        assert result.stderr.count(f"learned transform of {name} in the place of attention rotation") == 1
    assert "attn_rot_k = 0" in result.stderr
    k_only = logits(patched_lib_dir, path, "--cache", "8", "1")
    assert 0 < relative(k_only, logits(patched_lib_dir, llama)) < 1e-3, "K alone, without flash attention"


def test_context_shift_is_refused_under_a_learned_k_transform(
    llama: Path, patched_lib_dir: Path, tmp_path: Path
) -> None:
    path = files.transform_heads(files.read(llama), 64).write(tmp_path / "t.gguf")
    out, quiet = tmp_path / "out.npy", {"GGML_NO_BACKTRACE": "1"}
    assert run(patched_lib_dir, path, out, "--flash", "--shift").returncode == 0
    assert run(patched_lib_dir, llama, out, *Q8_0_CACHE, "--shift").returncode == 0
    result = run(patched_lib_dir, path, out, *Q8_0_CACHE, "--shift", **quiet)
    assert result.returncode != 0
    assert "does not support K-shift" in result.stderr


def test_models_and_contexts_side_by_side(llama: Path, patched_lib_dir: Path, tmp_path: Path) -> None:
    """Two models with different transforms, each in threads of its own: the bits of one after the other."""
    paths = [
        files.transform(files.read(llama), seed=seed).write(tmp_path / f"{seed}.gguf") for seed in (1, 2)
    ]
    command = [sys.executable, str(CONCURRENT), str(patched_lib_dir), *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == "equal\n"


def test_rpc_server_runs_transforms(
    llama: Path, patched_lib_dir: Path, rpc_server: str, tmp_path: Path
) -> None:
    path = files.transform(files.read(llama)).write(tmp_path / "t.gguf")
    local = logits(patched_lib_dir, path, "--flash")
    assert logits(patched_lib_dir, path, "--flash", "--rpc", rpc_server).tobytes() == local.tobytes()


def test_llama_quantize_keeps_factors(
    llama: Path, patched_bin_dir: Path, patched_lib_dir: Path, tmp_path: Path
) -> None:
    path = files.transform(files.read(llama), use_hadamard=True).write(tmp_path / "t.gguf")
    command = [str(patched_bin_dir / "llama-quantize"), str(path), str(tmp_path / "q.gguf"), "Q8_0"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert relative(logits(patched_lib_dir, tmp_path / "q.gguf"), logits(patched_lib_dir, llama)) < 1e-2
