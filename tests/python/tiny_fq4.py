"""A Llama of one layer without vocabulary, all of its matrices FQ4: 100 KB that llama.cpp loads and runs."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from ggml_ext.gguf import fq4
from ggml_ext.gguf.ext import FQ4, Calibration, ExtMetadata, TensorErrors, add_ext_keys

WIDTH, HEADS, VOCAB = 256, 4, 32

# Every key of the format.
METADATA = ExtMetadata(
    rounding="imatrix",
    transform="hadamard",
    calibration=Calibration("0123456789abcdef" * 4, 64, 512, 42),
    hadamard=(16, 4, 256, 0),
    clip=(1.0, 0.5, 0.75, 1.0),
    activation_bits=4,
    activation_group=32,
    errors=TensorErrors("output", ("blk.0.attn_q.weight", "blk.0.attn_k.weight"), (0.25, 0.5)),
)


def write(path: Path, metadata: ExtMetadata | None = METADATA) -> Path:
    """Writes the model and returns its path."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("none")
    if metadata is not None:
        add_ext_keys(writer, metadata)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    attention = [f"blk.0.attn_{part}" for part in ("q", "k", "v", "output")]
    feed_forward = [f"blk.0.ffn_{part}" for part in ("gate", "up", "down")]
    for name in ("token_embd", "output", *attention, *feed_forward):
        n_rows = VOCAB if name in ("token_embd", "output") else WIDTH
        rows = random.standard_normal((n_rows, WIDTH), np.float32) / np.float32(16)
        writer.add_tensor(f"{name}.weight", fq4.quantize(rows), raw_dtype=FQ4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
