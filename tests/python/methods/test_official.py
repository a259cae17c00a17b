"""Import of the official FlatQuant code's matrices, from synthetic files of its layout."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ggml_ext.core.errors import GgmlExtError
from ggml_ext.methods.transforms.official import SITE_KINDS, load_official, load_official_kv

HEADS, HEAD_DIM, HIDDEN, FFN = 4, 8, 32, 48
Saved = dict[int, dict[str, Tensor]]


def matrix(n: int, generator: torch.Generator) -> Tensor:
    """Well-conditioned, with F16 values, and far from symmetric: a transposed import shows."""
    rotation = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    return (rotation * torch.linspace(0.5, 1.5, n)).half().float()


def saved_blocks(blocks: int = 2) -> Saved:
    generator = torch.Generator().manual_seed(0)
    orders = {"self_attn.ln_trans": (4, 8), "mlp.up_gate_trans": (4, 8), "mlp.down_trans": (6, 8)}
    found: Saved = {}
    for index in range(blocks):
        block = found[index] = {}
        for name, (left, right) in orders.items():
            block[f"{name}.matrix_left"] = matrix(left, generator)
            block[f"{name}.matrix_right"] = matrix(right, generator)
            block[f"{name}.matrix_left_inv"] = torch.zeros(left, left)  # not read
            block[f"{name}.diag_scale"] = 0.5 + torch.rand(left * right, generator=generator)
        block["self_attn.o_trans.matrix"] = matrix(HEADS, generator)
        block["self_attn.vcache_trans.matrix"] = matrix(HEAD_DIM, generator)
        block["self_attn.kcache_trans.matrix"] = matrix(HEAD_DIM, generator)
        block["self_attn.q_proj.act_quantizer.clip_factor_a_max"] = torch.tensor([4.0])
        block["self_attn.q_proj.act_quantizer.clip_factor_a_min"] = torch.tensor([1.0])
        block["mlp.up_proj.clip_factor_w_max"] = torch.ones(FFN, 1)
    return found


def write(saved: object, folder: Path) -> Path:
    path = folder / "flat_matrices.pth"
    torch.save(saved, path)
    return path


def test_matrices_mean_the_same_here(tmp_path: Path) -> None:
    """x' = (x diag_scale) kron(left, right) there; a transposed factor or an inverted diagonal would still be
    exact in the file, but flatten nothing."""
    saved = saved_blocks()
    blocks = load_official(write(saved, tmp_path))
    assert [list(block) for block in blocks] == [list(SITE_KINDS)] * 2
    names = {"attn_in": "self_attn.ln_trans", "ffn_in": "mlp.up_gate_trans", "ffn_mid": "mlp.down_trans"}
    for index, block in enumerate(blocks):
        for kind, name in names.items():
            transform = block[kind]  # type: ignore[index]
            left, right, scale = (
                saved[index][f"{name}.{part}"].double()
                for part in ("matrix_left", "matrix_right", "diag_scale")
            )
            x = torch.randn(3, transform.n).double()
            assert torch.allclose(transform.apply(x), (x * scale) @ torch.kron(left, right), atol=1e-9)
        heads = saved[index]["self_attn.o_trans.matrix"].double()
        head = saved[index]["self_attn.vcache_trans.matrix"].double()
        x = torch.randn(3, HIDDEN).double()
        assert torch.allclose(block["attn_out"].apply(x), x @ torch.kron(heads, head), atol=1e-9)


def test_clips_and_the_k_cache_come_along(tmp_path: Path) -> None:
    saved = saved_blocks()
    del saved[1]["self_attn.kcache_trans.matrix"]
    path = write(saved, tmp_path)
    block = load_official(tmp_path)[0]
    assert block["attn_in"].clip == pytest.approx(float(torch.tensor(1.0).sigmoid()))
    assert block["ffn_in"].clip == 1
    first, second = load_official_kv(path)
    assert first is not None
    assert torch.equal(first.float(), saved[0]["self_attn.kcache_trans.matrix"])
    assert second is None


def change(name: str, value: Callable[[Tensor], Tensor] | None) -> Callable[[Saved], object]:
    def apply(saved: Saved) -> object:
        tensor = saved[1].pop(name)
        if value is not None:
            saved[1][name] = value(tensor)
        return saved

    return apply


LEFT = "mlp.down_trans.matrix_left"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(LEFT, None), "block 1: no mlp.down_trans.matrix_left"),
        (change(LEFT, lambda m: m[:, :2]), "no square matrix"),
        (change(LEFT, lambda m: m * float("nan")), "NaN"),
        (change(LEFT, lambda m: torch.diag(torch.logspace(0, 3, len(m)))), "condition number 1000"),
        (change("mlp.down_trans.diag_scale", lambda d: d[:-1]), "diag_scale"),
        (change("mlp.down_trans.diag_scale", lambda d: d * 0), "diag_scale"),
        (lambda saved: {**saved, 5: {}}, "dictionary of blocks"),
        (lambda saved: {0: [1]}, "dictionary of tensors"),
        (lambda saved: {0: {"self_attn.ln_trans.linear_left.weight": torch.ones(1)}}, "save_flat_matrices"),
        (lambda saved: [1], "dictionary of blocks"),
    ],
)
def test_what_cannot_be_used_is_named(
    damage: Callable[[Saved], object], message: str, tmp_path: Path
) -> None:
    path = write(damage(saved_blocks()), tmp_path)
    with pytest.raises(GgmlExtError, match=message):
        load_official(path)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code ran",)


def test_a_file_is_data_not_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pickles can run code; such a file is refused unread, like one that is damaged or missing."""
    with pytest.raises(GgmlExtError, match="no file of tensors"):
        load_official(write({0: Evil()}, tmp_path))
    assert "code ran" not in capsys.readouterr().out
    (tmp_path / "flat_matrices.pth").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(GgmlExtError, match="no file of tensors"):
        load_official(tmp_path)
    with pytest.raises(GgmlExtError, match="No such file"):
        load_official(tmp_path / "other.pth")


class Malicious:
    """Unpickled, it writes a file."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> object:
        return (Path.touch, (self.ran,))


def test_a_file_that_holds_more_than_tensors_calls_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the environment tells torch to load anything."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    ran = tmp_path / "ran.txt"
    path = write({0: saved_blocks(1)[0], 1: Malicious(ran)}, tmp_path)
    with pytest.raises(GgmlExtError, match=r"flat_matrices\.pth: no file of tensors only, wants to call"):
        load_official(path)
    path.write_bytes(pickle.dumps(Malicious(ran)))
    with pytest.raises(GgmlExtError, match=r"flat_matrices\.pth: "):
        load_official(path)
    assert not ran.exists()


@pytest.mark.parametrize(
    "odd",
    [
        torch.ones(1).expand(2**20, 2**20),
        torch.eye(4).to_sparse(),
        torch.eye(4, dtype=torch.complex64),
        torch.eye(4, dtype=torch.int64),
        torch.eye(4, device="meta"),
    ],
)
def test_tensors_that_are_no_plain_floats_are_refused(tmp_path: Path, odd: Tensor) -> None:
    """The first takes 4 bytes in the file and 8 TB as a matrix."""
    saved = saved_blocks(1)
    saved[0]["mlp.up_gate_trans.matrix_left"] = odd
    with pytest.raises(GgmlExtError, match=r"no tensor of floats with values of its own|no file of tensors"):
        load_official(write(saved, tmp_path))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02.", b"\x80\x04K\x01.", b"text"])
def test_files_of_another_kind(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "flat_matrices.pth").write_bytes(content)
    with pytest.raises(GgmlExtError, match=r"no file of tensors|not a dictionary"):
        load_official(tmp_path)
