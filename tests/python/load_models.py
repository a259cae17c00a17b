"""Program: loads and runs the models whose paths come in on standard input, as test_mutation.py's child.

Answers each line with one of its own: "loaded" after a decoded token, or "refused". A signal ends it, which
is what the test watches for.
"""

from __future__ import annotations

import sys
from typing import Any

from ggml_ext.runtime.llama import bindings


def runs(api: Any, path: str) -> bool:
    params = api.llama_model_default_params()
    params.n_gpu_layers = 0
    params.check_tensors = True
    model = api.llama_model_load_from_file(path.encode(), params)
    if not model:
        return False
    decoded = decodes(api, model)
    api.llama_model_free(model)
    return decoded


def decodes(api: Any, model: Any) -> bool:
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 32
    params.n_threads = params.n_threads_batch = 1
    context = api.llama_init_from_model(model, params)
    if not context:
        return False
    batch = api.llama_batch_init(1, 0, 1)
    batch.n_tokens = 1
    batch.token[0] = 1
    batch.pos[0] = 0
    batch.n_seq_id[0] = 1
    batch.seq_id[0][0] = 0
    batch.logits[0] = 1
    decoded = api.llama_decode(context, batch) == 0
    api.llama_batch_free(batch)
    api.llama_free(context)
    return bool(decoded)


if __name__ == "__main__":
    for line in sys.stdin:
        print("loaded" if runs(bindings(), line.rstrip("\n")) else "refused", flush=True)
