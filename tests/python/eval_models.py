"""Tiny random models for the evaluation tests, written directly as GGUF."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from ggml_ext.runtime import tools

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


def _add_vocabulary(writer: gguf.GGUFWriter, size: int, *, bos: bool = True) -> None:
    tokens, scores, kinds = _vocabulary(size)
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(bos)


def make_model(
    path: Path,
    *,
    kind: Type = Type.F16,
    noise: float = 0.0,
    vocabulary: int = 384,
    nan: bool = False,
    bos: bool = True,
    blocks: int = 1,
    experts: int = 0,
) -> Path:
    """Write a Llama, with ``experts`` (two of them active) a Mixtral.

    Equal arguments give equal weights; ``noise`` is added relative to them.
    """
    random, noises = np.random.default_rng(1), np.random.default_rng(2)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(FFN)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    _add_vocabulary(writer, vocabulary, bos=bos)

    def matrix(name: str, *shape: int, scale: float = 0.1) -> None:
        values = random.standard_normal(shape, np.float32)
        values += noise * noises.standard_normal(shape, np.float32)
        values *= scale
        if nan and name == "output.weight":
            values[5, 5] = np.nan
        data = values.astype(np.float16) if kind == Type.F16 else gguf.quants.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)

    matrix("token_embd.weight", vocabulary, WIDTH, scale=1.0)
    matrix("output.weight", vocabulary, WIDTH)
    kv = KV_HEADS * WIDTH // HEADS
    for i in range(blocks):
        matrix(f"blk.{i}.attn_q.weight", WIDTH, WIDTH)
        matrix(f"blk.{i}.attn_k.weight", kv, WIDTH)
        matrix(f"blk.{i}.attn_v.weight", kv, WIDTH)
        matrix(f"blk.{i}.attn_output.weight", WIDTH, WIDTH)
        if experts:
            matrix(f"blk.{i}.ffn_gate_inp.weight", experts, WIDTH)
        each, suffix = ((experts,), "_exps") if experts else ((), "")
        matrix(f"blk.{i}.ffn_gate{suffix}.weight", *each, FFN, WIDTH)
        matrix(f"blk.{i}.ffn_up{suffix}.weight", *each, FFN, WIDTH)
        matrix(f"blk.{i}.ffn_down{suffix}.weight", *each, WIDTH, FFN)
    norms = [f"blk.{i}.{name}" for i in range(blocks) for name in ("attn_norm", "ffn_norm")]
    for name in ("output_norm", *norms):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_plamo2(path: Path, vocabulary: int = 384) -> Path:
    """Write a PLaMo-2 of a Mamba and an attention block, whose graph has no tensors named l_out."""
    random = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "plamo2")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv([0, KV_HEADS])
    writer.add_key_length(WIDTH // HEADS)
    writer.add_value_length(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(WIDTH)
    writer.add_ssm_state_size(16)
    writer.add_ssm_time_step_rank(2)
    writer.add_ssm_group_count(0)
    _add_vocabulary(writer, vocabulary)
    head, inner, states, heads, steps = WIDTH // HEADS, WIDTH, 16, 2, 64
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary, WIDTH),
        "output_norm.weight": (WIDTH,),
        "blk.0.ssm_in.weight": (2 * inner, WIDTH),
        "blk.0.ssm_conv1d.weight": (inner, 4),
        "blk.0.ssm_x.weight": (steps + 2 * states, inner),
        "blk.0.ssm_dt.weight": (heads, steps),
        "blk.0.ssm_dt.bias": (heads,),
        "blk.0.ssm_a": (heads,),
        "blk.0.ssm_d": (heads,),
        "blk.0.ssm_out.weight": (WIDTH, inner),
        "blk.0.ssm_dt_norm": (steps,),
        "blk.0.ssm_b_norm": (states,),
        "blk.0.ssm_c_norm": (states,),
        "blk.1.attn_qkv.weight": ((HEADS + 2 * KV_HEADS) * head, WIDTH),
        "blk.1.attn_q_norm.weight": (HEADS, head),
        "blk.1.attn_k_norm.weight": (KV_HEADS, head),
        "blk.1.attn_output.weight": (WIDTH, WIDTH),
    }
    for i in range(2):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (WIDTH,),
            f"blk.{i}.post_attention_norm": (WIDTH,),
            f"blk.{i}.ffn_norm.weight": (WIDTH,),
            f"blk.{i}.ffn_up.weight": (2 * FFN, WIDTH),
            f"blk.{i}.ffn_down.weight": (WIDTH, FFN),
            f"blk.{i}.post_ffw_norm": (WIDTH,),
        }
    for name, shape in shapes.items():
        writer.add_tensor(name, random.standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_perplexity(model: Path, *arguments: str) -> str:
    """Output of llama-perplexity.

    It logs from a thread of its own and sometimes exits before that thread has written the summary; such a
    run says nothing and is made again.
    """
    call = [str(tools.find("llama-perplexity")), "-m", str(model), *arguments]
    for _ in range(50):
        done = subprocess.run(call, capture_output=True, text=True, errors="replace", env=tools.environment())
        assert done.returncode == 0, done.stderr
        output = done.stdout + done.stderr
        if re.search(r"Final estimate: PPL|Same top p: ", output):
            return output
    raise AssertionError(f"no summary in fifty runs: {output}")
