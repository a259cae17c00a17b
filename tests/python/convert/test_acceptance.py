"""FQ4 against Q4_K on a real model: what a change of format, encoder or dot product must not lose."""

from __future__ import annotations

from pathlib import Path

from ggml_ext.convert import convert
from ggml_ext.measure.compare import compare

TEXT_BYTES = 60_000
MOST = 0.97
KEEP = ["^token_embd", r"^output\."]  # embeddings and head stay at f16 in both files


def test_fq4_is_closer_to_f16_than_q4_k(shared_dir: Path, tmp_path: Path) -> None:
    """Mean KL divergence with importances at most 0.97 of pure Q4_K's, at fewer bits (measured: 0.84)."""
    base = tmp_path / "f16.gguf"
    convert(shared_dir / "models" / "books-8m", base, type_name="f16")
    for name in ("calibration", "eval"):
        text = (shared_dir / "text" / f"{name}.txt").read_bytes()[:TEXT_BYTES]
        (tmp_path / f"{name}.txt").write_bytes(text)
    files = [tmp_path / "fq4.gguf", tmp_path / "q4_k.gguf"]
    for file in files:
        convert(base, file, type_name=file.stem, calibration=tmp_path / "calibration.txt", keep=KEEP)
    rows = compare(base, files, tmp_path / "eval.txt", rounds=0, layers=0)
    fq4, q4_k = rows[1], rows[2]
    ratio = fq4["kld"] / q4_k["kld"]
    print(f"KL divergence: FQ4 {fq4['kld']:.6f}, Q4_K {q4_k['kld']:.6f}, ratio {ratio:.3f}")
    assert fq4["bits_per_layer_weight"] <= 4.3126
    assert q4_k["bits_per_layer_weight"] == 4.5
    assert ratio <= MOST
