"""A random Llama of one block, width 256, with a BPE vocabulary of all bytes: whole, or cut in parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

HIDDEN, VOCAB, CTX_TRAIN = 256, 300, 512

Tensors = dict[str, NDArray[np.float32]]


def tensors() -> Tensors:
    """Weights by name; the same for every call."""
    random = np.random.default_rng(0)
    shapes = {"token_embd": (VOCAB, HIDDEN), "output": (VOCAB, HIDDEN)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{name}"] = (HIDDEN, HIDDEN)
    made = {f"{n}.weight": (random.standard_normal(s) / 16).astype(np.float32) for n, s in shapes.items()}
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        made[f"{name}.weight"] = np.ones(HIDDEN, np.float32)
    return made


def byte_tokens() -> list[str]:
    """GPT-2's names of the 256 bytes, in their order."""
    named = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in named]
    names = {byte: chr(byte) for byte in named} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [names[byte] for byte in range(256)]


def _writer(path: Path, pre: str) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(CTX_TRAIN)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(64)
    writer.add_vocab_size(VOCAB)
    tokens = byte_tokens()
    tokens += [f"<x{i}>" for i in range(VOCAB - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * (VOCAB - 256))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)
    return writer


def _finish(writer: gguf.GGUFWriter, items: Sequence[tuple[str, NDArray[np.float32]]]) -> None:
    for name, array in items:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(path: Path, pre: str = "gpt-2", weights: Tensors | None = None) -> Path:
    """The model in one file. pre: the pre-tokenizer's name."""
    _finish(_writer(path, pre), list((weights or tensors()).items()))
    return path


def write_split(folder: Path, *, first_empty: bool = False, stem: str = "m") -> list[Path]:
    """The model in three files, as llama-gguf-split cuts it: the keys are in the first, tensors maybe not."""
    folder.mkdir(parents=True, exist_ok=True)
    items = list(tensors().items())
    cuts = (0, 0, 5, len(items)) if first_empty else (0, 5, 9, len(items))
    paths = [folder / f"{stem}-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    for i, path in enumerate(paths):
        writer = _writer(path, "gpt-2") if i == 0 else gguf.GGUFWriter(path, "llama")
        if i > 0:
            writer.kv_data[0].clear()  # llama-gguf-split gives later parts no architecture
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", len(items))
        _finish(writer, items[cuts[i] : cuts[i + 1]])
    return paths


def write_imatrix(path: Path, zero: Sequence[tuple[str, slice]] = (), tiny: float = 0.0) -> Path:
    """Importances of the block's matrices: about 1, but ``tiny`` in the columns that ``zero`` names."""
    random = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["some.txt"])
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, array in tensors().items():
        if name.startswith("blk.") and array.ndim == 2:
            sums = random.uniform(0.5, 2, (1, array.shape[1])).astype(np.float32)
            for tensor, columns in zero:
                if tensor == name:
                    sums[:, columns] = tiny
            writer.add_tensor(f"{name}.in_sum2", sums)
            writer.add_tensor(f"{name}.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
