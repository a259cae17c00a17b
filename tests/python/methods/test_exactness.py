"""Every transform on every family: without rounding, the transformed file is the same function.

Tiny random models, all dtypes f32, clipping off. What would break these: a matrix that misses a transform or
gets it on the wrong side, a fold into the wrong rows or norm, a factor stored transposed, a router that sees
transformed activations, biases left as they were.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import models
import tiny_families as families
from ggml_ext.convert import convert
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.registry import TRANSFORMS
from ggml_ext.gguf.header import read_header, value
from ggml_ext.methods.calibrate import blocks
from ggml_ext.methods.calibrate import run as calibrate
from ggml_ext.recipes import Options

CTX, SAMPLES, STEPS = 32, 8, 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def text(base: Path) -> Path:
    path = base / "exactness.txt"
    path.write_text(models.TEXT * 4)
    return path


@pytest.fixture(scope="module")
def ggufs(base: Path) -> dict[str, Path]:
    names = list(families.CONFIGS)
    return dict(zip(names, families.family_ggufs(base, names), strict=True))


def use_gguf(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converting each model again would take seconds."""
    monkeypatch.setattr(calibrate.hf, "to_gguf", lambda _folder, out, **_options: shutil.copyfile(made, out))


def saved_matrices(path: Path, layers: int, n: int, ffn: int, heads: int, head_dim: int) -> Path:
    """A file of the layout that the official FlatQuant code saves, with random well-conditioned matrices."""
    random = torch.Generator().manual_seed(2)

    def matrix(order: int) -> torch.Tensor:
        return torch.eye(order) + 0.3 / order**0.5 * torch.randn(order, order, generator=random)

    def site(name: str, n1: int, n2: int) -> dict[str, torch.Tensor]:
        scale = torch.rand(n1 * n2, generator=random) + 0.5
        matrices = {f"{name}.matrix_left": matrix(n1), f"{name}.matrix_right": matrix(n2)}
        return {**matrices, f"{name}.diag_scale": scale}

    block = {
        **site("self_attn.ln_trans", 16, n // 16),
        **site("mlp.up_gate_trans", 16, n // 16),
        **site("mlp.down_trans", 16, ffn // 16),
        "self_attn.o_trans.matrix": matrix(heads),
        "self_attn.vcache_trans.matrix": matrix(head_dim),
        "self_attn.kcache_trans.matrix": matrix(head_dim),
        "self_attn.q_proj.act_quantizer.clip_factor_a_max": torch.tensor(0.5),
    }
    torch.save(dict.fromkeys(range(layers), block), path)
    return path


def test_imported_transforms_keep_the_function(
    base: Path, text: Path, ggufs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices of the official code, their orientation included; their clips, for 4 bits, are left out."""
    use_gguf(ggufs["llama"], monkeypatch)
    sizes = {"n": families.HIDDEN, "ffn": families.FFN, "heads": families.HEADS, "head_dim": 64}
    out = tmp_path / "m.gguf"

    def go(layers: int, **more: int) -> None:
        convert(
            families.family_dir(base, "llama"),
            out,
            options=Options("f32", None, "rtn", None, SAMPLES),
            matrices=saved_matrices(tmp_path / "flat_matrices.pth", layers, **{**sizes, **more}),
            calibration=text,
            ctx=CTX,
            warn=lambda _line: None,
        )

    with pytest.raises(GgmlExtError, match="transforms of 3 blocks for a model of 2"):
        go(3)
    with pytest.raises(GgmlExtError, match="block 0: ffn_mid has 256 channels, the model 512"):
        go(2, ffn=256)
    assert not (tmp_path / "m.gguf.calibration").exists()
    go(2)
    assert "ggml_ext.transform.clip" not in read_header(out).keys
    tokens = families.prompt()
    before, after = (families.llama_logits(path, tokens) for path in (ggufs["llama"], out))
    families.assert_same_logits(before, after)
    assert (before != after).any()
    # llama.cpp keeps the pairs of a rotation side by side, Hugging Face half a head apart.
    saved = torch.load(tmp_path / "flat_matrices.pth")[0]["self_attn.kcache_trans.matrix"].numpy()
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(out).tensors}
    keys, queries = (tensors[f"blk.0.attn_{name}.fq_h"] for name in ("k", "q"))
    np.testing.assert_array_equal(keys, saved.reshape(2, 32, 64).swapaxes(0, 1).reshape(64, 64))
    np.testing.assert_allclose(keys @ queries.T, np.eye(64), atol=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("family", families.CONFIGS)
def test_the_function_stays(
    family: str,
    transform: str,
    base: Path,
    text: Path,
    ggufs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_gguf(ggufs[family], monkeypatch)
    monkeypatch.setattr(blocks, "TransformRequest", partial(blocks.TransformRequest, steps=STEPS))
    torch.manual_seed(0)
    out = tmp_path / "m.gguf"
    # gptq runs block by block even without a transform, and has nothing to round where all is kept.
    options = Options("fq4", transform, "gptq", None, SAMPLES)
    convert(
        families.family_dir(base, family),
        out,
        options=options,
        keep=["weight"],
        calibration=text,
        ctx=CTX,
        warn=lambda _line: None,
    )
    keys = read_header(out).keys
    assert value(keys["ggml_ext.transform.name"]) == transform
    assert "ggml_ext.transform.clip" not in keys
    tokens = families.prompt()
    before, after = (families.llama_logits(path, tokens) for path in (ggufs[family], out))
    if transform == "none":
        np.testing.assert_array_equal(before, after)
    else:
        families.assert_same_logits(before, after)
        assert (before != after).any(), "equal bits: nothing was transformed"
