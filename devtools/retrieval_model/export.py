"""The retrieval model's GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from devtools.retrieval_model.model import CONTEXT, Retriever
from devtools.retrieval_model.vocabulary import Vocabulary
from ggml_ext.core.atomic import atomic_path


def write_gguf(path: Path, model: Retriever, words: Vocabulary) -> None:
    """The model as F16 GGUF of the architecture llama. Its tokenizer is BPE without merges that takes whole
    words as they are (pre-tokenizer llama-bpe). Raises GgmlExtError where ``path`` cannot be written."""
    shape = model.shape
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        writer.add_name("retrieval")
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        writer.add_context_length(CONTEXT)
        writer.add_embedding_length(shape.hidden)
        writer.add_block_count(shape.layers)
        writer.add_feed_forward_length(shape.ffn)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_key_length(shape.head)
        writer.add_value_length(shape.head)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(shape.head)
        writer.add_rope_freq_base(shape.rope_base)
        writer.add_vocab_size(len(words.tokens))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list(words.tokens)
        normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
        writer.add_token_types([normal] * (len(words.tokens) - 2) + [control] * 2)
        writer.add_token_merges(["a b"])  # llama.cpp wants one; it makes no token that there is
        writer.add_bos_token_id(words.bos)
        writer.add_eos_token_id(words.eos)
        writer.add_add_bos_token(True)
        for name, parameter in model.named_parameters():
            values: NDArray[np.float32] = parameter.detach().float().numpy()
            writer.add_tensor(name, values.astype(np.float16) if values.ndim == 2 else values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
