"""Tiny random Llama models for the evaluation tests, written directly as GGUF."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

WIDTH, FFN, HEADS, KV_HEADS = 64, 128, 2, 1
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "is",
    "was",
    "he",
    "for",
    "it",
    "with",
    "as",
    "his",
    "on",
    "be",
]
UNKNOWN, CONTROL, BYTE, NORMAL = 2, 3, 6, 1


def text_of(words: int, seed: int = 3) -> str:
    """Random text of ``words`` words, about two tokens each."""
    random = np.random.default_rng(seed)
    return " ".join(random.choice([*WORDS, "zebra", "quartz"], words)) + "\n"


def _vocabulary(size: int) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and kinds: control tokens, bytes, whole words, then numbered fillers up to ``size``."""
    pieces = [f"▁{word}" for word in WORDS]
    pieces = sorted({piece[:end] for piece in pieces for end in range(1, len(piece) + 1)})
    pieces += sorted({letter for word in WORDS for letter in word})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces)]
    tokens += [f"filler{i}" for i in range(size - len(tokens))]
    kinds += [NORMAL] * (size - len(kinds))
    return tokens, [float(len(token)) for token in tokens], kinds


def make_model(
    path: Path,
    *,
    kind: Type = Type.F16,
    noise: float = 0.0,
    vocabulary: int = 384,
    nan: bool = False,
    bos: bool = True,
) -> Path:
    """Write a Llama of one layer. Equal arguments give equal weights; ``noise`` is added relative to them."""
    random, noises = np.random.default_rng(1), np.random.default_rng(2)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(vocabulary)
    tokens, scores, kinds = _vocabulary(vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(bos)

    def matrix(name: str, rows: int, columns: int, scale: float) -> None:
        values = random.standard_normal((rows, columns), np.float32)
        values += noise * noises.standard_normal((rows, columns), np.float32)
        values *= scale
        if nan and name == "output.weight":
            values[5, 5] = np.nan
        data = values.astype(np.float16) if kind == Type.F16 else gguf.quants.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)

    matrix("token_embd.weight", vocabulary, WIDTH, 1.0)
    matrix("output.weight", vocabulary, WIDTH, 0.1)
    kv = KV_HEADS * WIDTH // HEADS
    matrix("blk.0.attn_q.weight", WIDTH, WIDTH, 0.1)
    matrix("blk.0.attn_k.weight", kv, WIDTH, 0.1)
    matrix("blk.0.attn_v.weight", kv, WIDTH, 0.1)
    matrix("blk.0.attn_output.weight", WIDTH, WIDTH, 0.1)
    matrix("blk.0.ffn_gate.weight", FFN, WIDTH, 0.1)
    matrix("blk.0.ffn_up.weight", FFN, WIDTH, 0.1)
    matrix("blk.0.ffn_down.weight", WIDTH, FFN, 0.1)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
