"""Times upstream's chain and the fused sampler in one process, on logits that a llama.cpp context holds.

Upstream's way to a token is llama_sampler_sample: it fills an array of candidates from the context's logits,
12 bytes each, and applies the chain. The fused sampler goes the same way as a chain of its own, and reads the
context's logits without the array. A context is needed for that, so a model of the right vocabulary and one
tiny layer is written, decodes, and its logits are overwritten.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cffi
import gguf
import numpy as np

from devtools.bench_sampling.plan import CHAINS, Case, make_logits
from ggml_ext.core import paths
from ggml_ext.runtime import native, sampling
from ggml_ext.runtime.llama import Model, bindings

UPSTREAM, CHAIN, DIRECT = "upstream", "chain", "direct"
CONTENDERS = (UPSTREAM, CHAIN, DIRECT)
"""llama.cpp's chain; the fused sampler in a chain; the fused sampler on the logits."""

_WIDTH = 32
_SEED = 1
_LEAST_SECONDS = 0.02  # of one measurement


def write_model(path: Path, n_vocab: int) -> None:
    """A Llama of one layer without a vocabulary, all weights zero but the norms."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(1)
    writer.add_rope_dimension_count(_WIDTH)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(n_vocab)
    writer.add_tokenizer_model("no_vocab")
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((_WIDTH, _WIDTH), np.float16))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(_WIDTH, np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((n_vocab, _WIDTH), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(frozen=True)
class Contender:
    """A way to a token: a C function, and its arguments for every row."""

    function: Any
    calls: list[tuple[Any, ...]]

    def tokens(self) -> list[int]:
        """Draws a token for every row."""
        return [self.function(*arguments) for arguments in self.calls]

    def seconds(self, count: int) -> float:
        """Time of drawing ``count`` tokens for every row."""
        function, calls = self.function, self.calls
        start = time.perf_counter()
        for _ in range(count):
            for arguments in calls:
                function(*arguments)
        return time.perf_counter() - start


class Rows:
    """A context whose logits are given. Every row has samplers of its own, as every slot of a server has."""

    def __init__(self, path: Path, batch: int) -> None:
        """path: a model of write_model; batch: rows."""
        self._api = bindings()
        self._model = Model(path, threads=1)
        self._batch = batch
        self._ffi = cffi.FFI()
        self._ffi.include(native.llama_library()[0])
        self._ffi.cdef("int32_t llama_sampler_sample(struct llama_sampler *, void * context, int32_t index);")
        self._llama = self._ffi.dlopen(str(paths.library("llama")))
        numbers = np.arange(batch, dtype=np.int32)
        self._model.start(n_ctx=32, n_seq=batch, n_batch=batch)
        self._logits = self._model.decode(
            np.zeros(batch, np.int32), np.zeros(batch, np.int32), numbers, np.ones(batch, np.bool_)
        )

    def fill(self, kind: str) -> None:
        """Puts logits of this kind (plan.LOGITS) into the context."""
        self._logits[:] = make_logits(kind, self._model.n_vocab, self._batch)

    @contextmanager
    def contenders(self, chain: str) -> Iterator[dict[str, Contender]]:
        """Name -> contender with the parameters of this chain (plan.CHAINS)."""
        upstream = [self._chain(self._stock(CHAINS[chain])) for _ in range(self._batch)]
        fused = []
        for _ in range(self._batch):
            fused.append(self._chain([]))
            with sampling.fused(**CHAINS[chain], seed=_SEED) as sampler:
                sampler.add_to(fused[-1])
        context = self._ffi.cast("void *", self._model.context)
        try:
            yield {
                UPSTREAM: self._through_array(upstream, context),
                CHAIN: self._through_array(fused, context),
                DIRECT: self._from_logits(fused),
            }
        finally:
            for made in (*upstream, *fused):
                self._api.llama_sampler_free(made)

    def close(self) -> None:
        """Frees the context and the model."""
        self._model.close()

    def _stock(self, settings: dict[str, Any]) -> list[Any]:
        """Upstream's samplers in upstream's order, as llama-cpp-python and the tools make them."""
        api = self._api
        return [
            api.llama_sampler_init_top_k(settings["top_k"]),
            api.llama_sampler_init_typical(settings["typical_p"], 1),
            api.llama_sampler_init_top_p(settings["top_p"], 1),
            api.llama_sampler_init_min_p(settings["min_p"], 1),
            api.llama_sampler_init_temp(settings["temperature"]),
            api.llama_sampler_init_dist(_SEED),
        ]

    def _chain(self, samplers: list[Any]) -> Any:
        params = self._api.llama_sampler_chain_default_params()
        params.no_perf = True
        chain = self._api.llama_sampler_chain_init(params)
        for sampler in samplers:
            self._api.llama_sampler_chain_add(chain, sampler)
        return chain

    def _through_array(self, chains: list[Any], context: Any) -> Contender:
        calls: list[tuple[Any, ...]] = [
            (sampling.address(chain), context, row) for row, chain in enumerate(chains)
        ]
        return Contender(self._llama.llama_sampler_sample, calls)

    def _from_logits(self, chains: list[Any]) -> Contender:
        calls: list[tuple[Any, ...]] = [
            (
                sampling.address(self._api.llama_sampler_chain_get(chain, 0)),
                native.floats(self._logits[row]),
                self._model.n_vocab,
            )
            for row, chain in enumerate(chains)
        ]
        return Contender(native.llama_library()[1].ggml_ext_sampler_sample_logits, calls)


def measure(rows: Rows, case: Case, rounds: int) -> dict[str, list[float]]:
    """Contender -> microseconds per token of each round; the contenders take turns within a round."""
    with rows.contenders(case.chain) as contenders:
        counts = {}
        for name in CONTENDERS:
            assert min(contenders[name].tokens()) >= 0  # the first call also allocates
            counts[name] = max(1, round(_LEAST_SECONDS / contenders[name].seconds(1)))
        found: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for number in range(rounds):
            turn = number % len(CONTENDERS)
            for name in (*CONTENDERS[turn:], *CONTENDERS[:turn]):
                seconds = contenders[name].seconds(counts[name])
                found[name].append(1e6 * seconds / (counts[name] * case.batch))
    return found
