"""Program: the logits of a model under the llama.cpp of a folder, as raw float32.

    python logits.py LIB_DIR MODEL OUT.npy [--flash] [--rpc ADDRESS] [--cache K V] [--lora GGUF] [--shift]
        [--no-repack] [--save STATE] [--lock]

Decodes a prompt of 40 tokens in one batch, then 8 tokens one by one; OUT holds [48, n_vocab]. Each run is a
process of its own, since a process holds one llama.cpp. --cache: ggml types of K and V.
--shift: moves the cache by one position before the last token, the way a context shift does. --no-repack: the
weights stay in the mapped file. --save: the context's state after the last token. --lock: as --mlock;
prints the process's locked memory in KiB.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from pathlib import Path

import cffi
import numpy as np
from numpy.typing import NDArray

PROMPT, SINGLE = 40, 8


def use_rpc_server(lib_dir: str, endpoint: str) -> None:
    """Registers the server's devices: models loaded later put all layers there."""
    ffi = cffi.FFI()
    ffi.cdef(
        "void * ggml_backend_rpc_add_server(const char * endpoint); void ggml_backend_register(void * reg);"
        "size_t ggml_backend_dev_count(void);"
    )
    before = ffi.dlopen(f"{lib_dir}/libggml.so")
    rpc = ffi.dlopen(f"{lib_dir}/libggml-rpc.so")
    count = before.ggml_backend_dev_count()
    before.ggml_backend_register(rpc.ggml_backend_rpc_add_server(endpoint.encode()))
    if before.ggml_backend_dev_count() == count:
        sys.exit(f"logits.py: {endpoint}: no device there")


def compute(model_path: str, options: argparse.Namespace) -> NDArray[np.float32]:
    import llama_cpp.llama_cpp as api

    api.llama_backend_init()
    model_params = api.llama_model_default_params()
    model_params.n_gpu_layers = 99
    model_params.use_extra_bufts = not options.no_repack
    if options.lock:
        model_params.load_mode = api.llama_load_mode_from_str(b"mlock")
    model = api.llama_model_load_from_file(model_path.encode(), model_params)
    if not model:
        sys.exit(1)
    if options.lock:
        status = Path("/proc/self/status").read_text()
        print(next(line for line in status.splitlines() if line.startswith("VmLck")).split()[1])
    params = api.llama_context_default_params()
    params.n_ctx = 64
    params.n_threads = params.n_threads_batch = 2
    params.flash_attn_type = 1 if options.flash else 0
    if options.cache is not None:
        params.type_k, params.type_v = options.cache
    context = api.llama_init_from_model(model, params)
    if not context:
        sys.exit(1)
    if options.lora:
        adapter = api.llama_adapter_lora_init(model, options.lora.encode())
        scale = (ctypes.c_float * 1)(1.0)
        adapters = (api.llama_adapter_lora_p_ctypes * 1)(adapter)
        if not adapter or api.llama_set_adapters_lora(context, adapters, 1, scale) != 0:
            sys.exit("logits.py: the adapter does not load")
    n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    batch = api.llama_batch_init(PROMPT, 0, 1)
    rows = []
    shift = 0
    for start, count in [(0, PROMPT), *((PROMPT + i, 1) for i in range(SINGLE))]:
        if options.shift and start == PROMPT + SINGLE - 1:
            shift = 1
            memory = api.llama_get_memory(context)
            api.llama_memory_seq_rm(memory, 0, 0, shift)
            api.llama_memory_seq_add(memory, 0, shift, -1, -shift)
        batch.n_tokens = count
        for i in range(count):
            batch.token[i] = (start + i) * 7 % n_vocab
            batch.pos[i] = start + i - shift
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = True
        if api.llama_decode(context, batch) != 0:
            sys.exit("logits.py: llama_decode failed")
        rows.append(np.ctypeslib.as_array(api.llama_get_logits(context), (count, n_vocab)).copy())
    if options.save:
        api.llama_state_save_file(context, options.save.encode(), None, 0)
    return np.concatenate(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("lib_dir")
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--flash", action="store_true")
    parser.add_argument("--rpc")
    parser.add_argument("--cache", type=int, nargs=2)
    parser.add_argument("--lora")
    parser.add_argument("--shift", action="store_true")
    parser.add_argument("--save")
    parser.add_argument("--no-repack", action="store_true")
    parser.add_argument("--lock", action="store_true")
    options = parser.parse_args()
    os.environ["LLAMA_CPP_LIB_PATH"] = os.environ["MTMD_CPP_LIB"] = options.lib_dir
    if options.rpc:
        use_rpc_server(options.lib_dir, options.rpc)
    np.save(options.out, compute(options.model, options))


if __name__ == "__main__":
    main()
