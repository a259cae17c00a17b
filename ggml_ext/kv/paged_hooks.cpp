// The hooks of paged storage, beside those that policy window shares.

#include "budget.h"
#include "hooks.h"
#include "llama-batch.h"
#include "llama-impl.h"
#include "llama-kv-cells.h"
#include "paged_graph.h"
#include "transform/hooks.h"

bool ggml_ext_kv_is_paged(const ggml_ext_kv * ext) {
    return ext && ext->paged;
}

bool ggml_ext_kv_codes_rows(const ggml_ext_kv * ext) {
    return ggml_ext_kv_is_paged(ext) && ext->paged->cold();
}

void ggml_ext_kv_sizes(const ggml_ext_kv & ext, std::map<ggml_backend_buffer_type_t, size_t> & sizes) {
    if (ext.paged) {
        sizes[ggml_backend_cpu_buffer_type()] += ext.paged->size();
    }
}

bool ggml_ext_kv_fits(const ggml_ext_kv * ext, const std::vector<llama_ubatch> & ubatches) {
    return !ggml_ext_kv_is_paged(ext) || ext->paged->fits(ubatches);
}

void ggml_ext_kv_clear(ggml_ext_kv & ext) {
    if (ext.paged) {
        ext.paged->clear();
    }
}

void ggml_ext_kv_share(ggml_ext_kv & ext, llama_seq_id from, llama_seq_id to, llama_pos p0, llama_pos p1) {
    if (ext.paged) {
        ext.paged->share(from, to, p0, p1);
    }
}

void ggml_ext_kv_keep(ggml_ext_kv & ext, llama_seq_id s) {
    if (ext.paged) {
        ext.paged->keep(s);
    }
}

static ggml_tensor * kv_store(const ggml_ext_kv * ext, ggml_context * ctx, ggml_tensor * x, ggml_tensor * cells,
                              const ggml_tensor * name, bool v) {
    ggml_ext_graph * graph = ggml_ext_graph::current();
    return ggml_ext_kv_is_paged(ext) ? graph->kv->store(ctx, *ext->paged, x, cells, name, v) : nullptr;
}

ggml_tensor * ggml_ext_kv_store_k(const ggml_ext_kv * ext, ggml_context * ctx, ggml_tensor * x, ggml_tensor * cells,
                                  const ggml_tensor * name) {
    return kv_store(ext, ctx, x, cells, name, false);
}

ggml_tensor * ggml_ext_kv_store_v(const ggml_ext_kv * ext, ggml_context * ctx, ggml_tensor * x, ggml_tensor * cells,
                                  const ggml_tensor * name) {
    return kv_store(ext, ctx, x, cells, name, true);
}

ggml_tensor * ggml_ext_kv_attention(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
                                    ggml_tensor * bias, ggml_tensor * mask, ggml_tensor * sinks, ggml_tensor * v_mla,
                                    float scale, const llama_hparams & hparams, int il) {
    ggml_ext_graph * graph = ggml_ext_graph::current();
    ggml_tensor *    out   = graph ? graph->kv->attend(ctx, q, k, bias, mask, sinks, v_mla, scale, hparams) : nullptr;
    return out ? ggml_ext_llama_attention(ctx, out, v, il) : nullptr;
}

bool ggml_ext_kv_write(const ggml_ext_kv * ext, llama_io_write_i & io, uint32_t stream,
                       const std::vector<std::pair<uint32_t, uint32_t>> & ranges) {
    if (!ggml_ext_kv_is_paged(ext)) {
        return false;
    }
    ext->paged->write(io, stream, ranges);
    return true;
}

bool ggml_ext_kv_read(ggml_ext_kv & ext, llama_io_read_i & io, llama_kv_cells & cells, uint32_t stream,
                      const std::vector<uint32_t> & restored) {
    bool done = false;
    try {
        done = ext.paged->read(io, cells, stream, restored);
    } catch (const std::exception & error) {
        LLAMA_LOG_ERROR("%s: ggml-ext: %s\n", __func__, error.what());
    }
    for (uint32_t cell : restored) {
        if (!done && cells.pos_get(cell) < 0) {
            cells.rm(cell);  // upstream then removes the sequence from position 0 on
        }
    }
    return done;
}
