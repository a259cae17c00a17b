// A GGUF of random weights for llama-bench: speed depends on shapes and types, not on what the weights say.

#include "bench.h"
#include "gguf.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>

namespace ggml_ext_bench {

namespace {

struct shape {
    int64_t hidden, ff, heads, heads_kv, vocabulary, left_ff, right_ff;

    int64_t kv() const { return hidden / heads * heads_kv; }
};

struct file_closer {
    void operator()(FILE * file) const { fclose(file); }
};

ggml_type type_of(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const char * known = ggml_type_name(ggml_type(i));
        if (known && name == known) {
            return ggml_type(i);
        }
    }
    throw std::runtime_error("no type " + name);
}

// Rows of power 1 / k from a tile of 256, over and over.
void write_tensor(FILE * file, const ggml_tensor * t) {
    const int64_t                   k = t->ne[0], n_rows = ggml_nrows(t), n_tile = std::min<int64_t>(n_rows, 256);
    std::vector<float>              x(k * n_tile, 1.0f);
    std::vector<uint8_t>            tile(ggml_row_size(t->type, k) * n_tile);
    std::mt19937                    rng(k);
    std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt(float(k)));
    if (!strstr(t->name, "norm")) {
        for (float & v : x) {
            v = normal(rng);
        }
    }
    if (t->type == GGML_TYPE_F32) {
        memcpy(tile.data(), x.data(), tile.size());
    } else {
        ggml_quantize_chunk(t->type, x.data(), tile.data(), 0, n_tile, k, nullptr);
    }
    size_t left = ggml_nbytes(t);
    bool   ok   = true;
    for (; left > 0 && ok; left -= std::min(left, tile.size())) {
        ok = fwrite(tile.data(), std::min(left, tile.size()), 1, file) == 1;
    }
    const size_t padding                       = GGML_PAD(ggml_nbytes(t), GGUF_DEFAULT_ALIGNMENT) - ggml_nbytes(t);
    const char   zeros[GGUF_DEFAULT_ALIGNMENT] = {};
    if (!ok || (padding && fwrite(zeros, padding, 1, file) != 1)) {
        throw std::runtime_error(std::string("cannot write ") + t->name + "; check free space");
    }
}

void set_keys(gguf_context * gguf, const shape & shape, int layers, bool transforms) {
    gguf_set_val_str(gguf, "general.architecture", "llama");
    gguf_set_val_str(gguf, "tokenizer.ggml.model", "no_vocab");
    const std::pair<const char *, int64_t> numbers[] = {
        { "llama.block_count",             layers                     },
        { "llama.context_length",          131072                     },
        { "llama.embedding_length",        shape.hidden               },
        { "llama.feed_forward_length",     shape.ff                   },
        { "llama.attention.head_count",    shape.heads                },
        { "llama.attention.head_count_kv", shape.heads_kv             },
        { "llama.rope.dimension_count",    shape.hidden / shape.heads },
        { "llama.vocab_size",              shape.vocabulary           },
    };
    for (const auto & [key, value] : numbers) {
        gguf_set_val_u32(gguf, key, uint32_t(value));
    }
    gguf_set_val_f32(gguf, "llama.rope.freq_base", 500000.0f);
    gguf_set_val_f32(gguf, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    if (transforms) {
        gguf_set_val_u32(gguf, "ggml_ext.version", 1);
        gguf_set_val_str(gguf, "ggml_ext.transform.name", "flatquant");
    }
}

}  // namespace

void write_model(const std::string & path, const std::string & type_name, int layers, bool transforms, int scale) {
    const ggml_type  type  = type_of(type_name);
    // The vocabulary keeps the head's share of the weights with 8 layers of 32.
    const shape      shape = scale == 1 ? ggml_ext_bench::shape{ 4096, 14336, 32, 8, 32000, 112, 128 } :
                             scale < 64 ? ggml_ext_bench::shape{ 1024, 1536, 8, 2, 1024, 32, 48 } :
                                          ggml_ext_bench::shape{ 256, 512, 4, 2, 256, 16, 32 };
    gguf_context_ptr gguf(gguf_init_empty());
    ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead() * size_t(20 * layers + 8), nullptr, true }));
    set_keys(gguf.get(), shape, layers, transforms);
    const auto add = [&](const std::string & name, ggml_type t, int64_t k, int64_t rows) {
        ggml_tensor * tensor = rows ? ggml_new_tensor_2d(ctx.get(), t, k, rows) : ggml_new_tensor_1d(ctx.get(), t, k);
        ggml_set_name(tensor, name.c_str());
        gguf_add_tensor(gguf.get(), tensor);
    };
    add("token_embd.weight", type, shape.hidden, shape.vocabulary);
    add("output.weight", type, shape.hidden, shape.vocabulary);
    add("output_norm.weight", GGML_TYPE_F32, shape.hidden, 0);
    for (int i = 0; i < layers; i++) {
        const std::string block  = "blk." + std::to_string(i) + ".";
        const int64_t     square = int64_t(std::sqrt(double(shape.hidden)));
        const auto        matrix = [&](const char * name, int64_t k, int64_t rows, int64_t left, int64_t right) {
            add(block + name + ".weight", type, k, rows);
            if (transforms && left) {
                add(block + name + ".fq_l", GGML_TYPE_F32, left, left);
                add(block + name + ".fq_r", GGML_TYPE_F32, right, right);
            }
        };
        add(block + "attn_norm.weight", GGML_TYPE_F32, shape.hidden, 0);
        add(block + "ffn_norm.weight", GGML_TYPE_F32, shape.hidden, 0);
        matrix("attn_q", shape.hidden, shape.hidden, square, square);
        matrix("attn_k", shape.hidden, shape.kv(), 0, 0);
        matrix("attn_v", shape.hidden, shape.kv(), 0, 0);
        matrix("attn_output", shape.hidden, shape.hidden, square, square);
        matrix("ffn_gate", shape.hidden, shape.ff, square, square);
        matrix("ffn_up", shape.hidden, shape.ff, 0, 0);
        matrix("ffn_down", shape.ff, shape.hidden, shape.left_ff, shape.right_ff);
    }
    if (!gguf_write_to_file(gguf.get(), path.c_str(), true)) {
        throw std::runtime_error("cannot write " + path);
    }
    std::unique_ptr<FILE, file_closer> file(fopen(path.c_str(), "ab"));
    if (!file) {
        throw std::runtime_error("cannot write " + path);
    }
    for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
        write_tensor(file.get(), t);
    }
}

}  // namespace ggml_ext_bench
