"""--matrices in a calibration: what is no file of transforms, or another model's, is refused before the model
is read and leaves nothing behind.

What would break these: a file that is opened only when the first block needs it, hours later.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from eval_models import FFN, HEADS, WIDTH, make_model, text_of
from ggml_ext.cli.entry import app
from ggml_ext.gguf.source import open_gguf
from ggml_ext.methods.calibrate import run
from ggml_ext.methods.calibrate.given import head_order

HEAD_DIM = WIDTH // HEADS
BLOCKS = 2
Saved = dict[int, dict[str, torch.Tensor]]


def saved_blocks(blocks: int = BLOCKS, *, ffn: int = FFN) -> Saved:
    """Rotations, for the tiny model unless asked otherwise."""
    random = torch.Generator().manual_seed(0)

    def rotation(n: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(n, n, generator=random))[0]

    orders = {"self_attn.ln_trans": WIDTH, "mlp.up_gate_trans": WIDTH, "mlp.down_trans": ffn}
    found: Saved = {}
    for index in range(blocks):
        block = found[index] = {
            "self_attn.o_trans.matrix": rotation(HEADS),
            "self_attn.vcache_trans.matrix": rotation(HEAD_DIM),
            "self_attn.kcache_trans.matrix": rotation(HEAD_DIM),
        }
        for name, n in orders.items():
            block[f"{name}.matrix_left"] = rotation(8)
            block[f"{name}.matrix_right"] = rotation(n // 8)
            block[f"{name}.diag_scale"] = 0.5 + torch.rand(n, generator=random)
    return found


def _save(saved: Saved) -> Callable[[Path], None]:
    return lambda path: torch.save(saved, path)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_model(tmp_path / "m.gguf", blocks=BLOCKS)
    (tmp_path / "text").write_text(text_of(900))
    return tmp_path


def _command(place: Path, command: str) -> list[str]:
    options = ["--calibration", "text", "--ctx", "32", "--samples", "4", "-t", "1", "--type", "q4_0"]
    line = [command, "m.gguf", "-o", "o.gguf", *options, "--matrices", "flat_matrices.pth"]
    return [str(place / word) if (place / word).exists() or word == "o.gguf" else word for word in line]


@pytest.mark.parametrize("command", ["convert", "calibrate"])
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"garbage"), "no file of tensors saved by torch"),
        (lambda path: torch.save({0: {}}, path), "block 0: no self_attn.ln_trans.matrix_left"),
        (_save(saved_blocks(1)), "transforms of 1 blocks for a model of 2; give this model's"),
        (_save(saved_blocks(ffn=2 * FFN)), f"block 0: ffn_mid has {2 * FFN} channels, the model {FFN}; give"),
    ],
)
def test_refused_before_the_model_is_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, command: str, write: Callable[[Path], None], message: str
) -> None:
    write(place / "flat_matrices.pth")
    before = sorted(place.rglob("*"))
    monkeypatch.setattr(run, "_observe", lambda *_: pytest.fail("the model was observed"))
    done = CliRunner().invoke(app, _command(place, command))
    assert done.exit_code == 1, done.output
    assert f"flat_matrices.pth: {message}" in done.stderr
    assert sorted(place.rglob("*")) == before


def test_a_dry_run_looks_at_the_file(place: Path) -> None:
    (place / "flat_matrices.pth").write_bytes(b"garbage")
    done = CliRunner().invoke(app, [*_command(place, "calibrate"), "--dry-run"])
    assert (done.exit_code, "no file of tensors saved by torch" in done.stderr) == (1, True), done.output


def test_they_come_into_the_file(place: Path) -> None:
    """Online factors, and that of the K cache with its rows in GGUF's order."""
    saved = saved_blocks()
    torch.save(saved, place / "flat_matrices.pth")
    done = CliRunner().invoke(app, _command(place, "convert"))
    assert done.exit_code == 0, done.output
    tensors = {tensor.name: tensor for tensor in open_gguf(place / "o.gguf").tensors}
    assert tensors["blk.1.ffn_down.fq_l"].dims == (8, 8)
    stored = tensors["blk.1.attn_k.fq_h"]
    values = np.fromfile(stored.path, np.float32, HEAD_DIM**2, offset=stored.offset).reshape(HEAD_DIM, -1)
    expected = saved[1]["self_attn.kcache_trans.matrix"].numpy()
    np.testing.assert_allclose(values, expected[head_order(HEAD_DIM, adjacent=True)], atol=1e-6)
