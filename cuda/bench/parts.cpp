// What is measured: the shapes of Llama-3-8B (hidden 4096, feed-forward 14336, 32 heads of 128, 8 for K and V).

#include "bench.h"
#include "ggml-ext.h"
#include "hooks/ggml-ext-hooks.h"
#include "kron/kron.h"

#include <algorithm>

namespace ggml_ext_bench {

namespace {

constexpr double max_nmse = 5e-4;  // of upstream's test-backend-ops for products and attention

contender product(const std::string & name, ggml_type type, int64_t m, int64_t k, int64_t n) {
    contender c;
    c.name  = name;
    c.bytes = double(m) * ggml_row_size(type, k) + 4.0 * n * (k + m);
    c.ops   = 2.0 * m * k * n;
    c.n     = n;
    c.build = [=](ggml_context * ctx, int64_t columns) {
        ggml_tensor * w = ggml_new_tensor_2d(ctx, type, k, m);
        ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, k, columns);
        return ggml_mul_mat(ctx, w, x);
    };
    return c;
}

void run_copy(const options & options, int scale) {
    contender     c;
    const int64_t n = (int64_t(64) << 20) / scale;  // floats
    c.name          = "copy";
    c.bytes         = 8.0 * n;
    c.ops           = 0.0;
    c.n             = n / 256;
    c.build         = [](ggml_context * ctx, int64_t rows) {
        return ggml_cpy(ctx, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 256, rows),
                                ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 256, rows));
    };
    report("copy", std::to_string(8 * n >> 20) + " MiB moved", { c }, measure(options, { c }, 0.0));
}

void run_products(const options & options, int scale) {
    const int64_t shapes[][2] = {
        { 14336, 4096  },
        { 4096,  14336 },
        { 1024,  4096  }  // k and v
    };
    for (int64_t n : { 1, 4, 8, 64, 512, 4096 }) {
        for (const auto & [m, k] : shapes) {
            std::vector<contender> contenders;
            for (ggml_type type : { GGML_TYPE_FQ4, GGML_TYPE_Q4_0, GGML_TYPE_Q4_K }) {
                const int64_t columns = n >= 64 ? std::max<int64_t>(n / scale, 1) : n;
                contenders.push_back(product(ggml_type_name(type), type, m / scale,
                                             std::max<int64_t>(k / scale / 256 * 256, 256), columns));
            }
            report("fq4_mul_mat", "m=" + std::to_string(m) + " k=" + std::to_string(k) + " n=" + std::to_string(n),
                   contenders, measure(options, contenders, max_nmse));
        }
    }
}

// A model of 128 experts of 768, each token using 8: experts that several tokens use are read once or once per token.
contender experts(ggml_type type, int64_t m, int64_t k, int64_t n, int64_t n_experts) {
    const int64_t used = std::min<int64_t>(8, n_experts);
    contender     c    = product(ggml_type_name(type), type, m * std::min(n * used, n_experts), k, n);
    c.ops              = 2.0 * m * k * n * used;
    c.build            = [=](ggml_context * ctx, int64_t tokens) {
        ggml_tensor * w   = ggml_new_tensor_3d(ctx, type, k, m, n_experts);
        ggml_tensor * x   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, k, 1, tokens);
        ggml_tensor * ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, used, tokens);
        ggml_format_name(ids, "ids of %d", int(n_experts));
        return ggml_mul_mat_id(ctx, w, x, ids);
    };
    return c;
}

void run_experts(const options & options, int scale) {
    const int64_t m = 768 / scale, k = std::max<int64_t>(2048 / scale / 256 * 256, 256), n_experts = 128 / scale;
    for (int64_t n : { 1, 4, 8, 512 }) {
        std::vector<contender> contenders;
        for (ggml_type type : { GGML_TYPE_FQ4, GGML_TYPE_Q4_0, GGML_TYPE_Q4_K }) {
            contenders.push_back(experts(type, m, k, n >= 64 ? std::max<int64_t>(n / scale, 1) : n, n_experts));
        }
        report("fq4_mul_mat_id", "m=768 k=2048 experts=128 n=" + std::to_string(n), contenders,
               measure(options, contenders, max_nmse));
    }
}

void run_kron(const options & options, int scale) {
    const int64_t orders[][2] = {
        { 64,  64  },
        { 112, 128 }
    };
    for (int64_t n : { 1, 512, 4096 }) {
        for (const auto & [n1, n2] : orders) {
            const int64_t left = n1, right = n2, k = n1 * n2, m = 4096 / scale;
            const int64_t columns = n > 1 ? std::max<int64_t>(n / scale, 1) : 1;
            contender     plain   = product("product", GGML_TYPE_FQ4, m, k, columns);
            contender     both    = plain;
            both.name             = "transform and product";
            both.build            = [=](ggml_context * ctx, int64_t rows) {
                ggml_tensor * w = ggml_new_tensor_2d(ctx, GGML_TYPE_FQ4, k, m);
                ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, k, rows);
                ggml_tensor * l = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, left, left);
                ggml_tensor * r = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, right, right);
                ggml_tensor * y = ggml_ext_kron(ctx, x, l, r, 0, 1.0f);
                ggml_ext_kron_set_unobserved(y);  // as in a model
                return ggml_mul_mat(ctx, w, y);
            };
            const std::vector<contender> contenders = { plain, both };
            report("kron", std::to_string(n1) + "x" + std::to_string(n2) + " n=" + std::to_string(n), contenders,
                   measure(options, contenders, max_nmse));
        }
    }
}

// mode: as ggml_ext_attention_set takes it; "off" is upstream's kernel.
contender attention(const char * mode, ggml_type type, int64_t n_q, int64_t n_kv) {
    const int64_t d = 128, heads = 32, heads_kv = 8;
    contender     c;
    c.name   = std::string(ggml_type_name(type)) + " cache, " + mode;
    c.bytes  = 2.0 * n_kv * heads_kv * ggml_row_size(type, d) + 8.0 * n_q * heads * d;
    // A query sees all positions but those after its own.
    c.ops    = 4.0 * heads * d * n_q * (double(n_kv) - 0.5 * double(n_q - 1));
    c.n      = n_q;
    c.select = [mode] { ggml_ext_attention_set(mode); };
    c.build  = [=](ggml_context * ctx, int64_t columns) {
        ggml_tensor * q    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, d, heads, columns);
        ggml_tensor * k    = ggml_new_tensor_3d(ctx, type, d, heads_kv, n_kv);
        ggml_tensor * v    = ggml_new_tensor_3d(ctx, type, d, heads_kv, n_kv);
        ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, columns);
        ggml_set_name(mask, "mask");
        ggml_tensor * result =
            ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), ggml_permute(ctx, k, 0, 2, 1, 3),
                                 ggml_permute(ctx, v, 0, 2, 1, 3), mask, 32.0f, 0.0f, 0.0f);
        ggml_prec_set_acc(result, GGML_PREC_F32);
        return result;
    };
    return c;
}

void run_attention(const char * name, const options & options, int scale, int64_t n_q, int64_t n_kv,
                   const std::vector<std::pair<const char *, ggml_type>> & variants) {
    const int64_t          kv = std::max<int64_t>(n_kv / scale / 256 * 256, 256);
    std::vector<contender> contenders;
    for (const auto & [mode, type] : variants) {
        contenders.push_back(attention(mode, type, std::min(std::max<int64_t>(n_q / scale, 1), kv), kv));
    }
    report(name, "n_q=" + std::to_string(n_q) + " n_kv=" + std::to_string(n_kv), contenders,
           measure(options, contenders, max_nmse));
    ggml_ext_attention_set("default");
}

void run_prefill(const options & options, int scale) {
    for (int64_t n_kv : { 4096, 32768 }) {
        run_attention("attention_prefill", options, scale, 2048, n_kv,
                      {
                          { "off",      GGML_TYPE_F16  },
                          { "half/f16", GGML_TYPE_F16  },
                          { "full/f16", GGML_TYPE_F16  },
                          { "off",      GGML_TYPE_Q8_0 },
                          { "half",     GGML_TYPE_Q8_0 },
                          { "full",     GGML_TYPE_Q8_0 }
        });
    }
}

void run_decode(const options & options, int scale) {
    const std::pair<int64_t, int64_t> shapes[] = {
        { 1, 4096  },
        { 1, 32768 },
        { 4, 32768 },
        { 8, 32768 }
    };
    for (const auto & [n_q, n_kv] : shapes) {
        run_attention("attention_decode", options, scale, n_q, n_kv,
                      {
                          { "off",  GGML_TYPE_F16  },
                          { "off",  GGML_TYPE_Q8_0 },
                          { "half", GGML_TYPE_Q8_0 },
                          { "off",  GGML_TYPE_Q4_0 },
                          { "half", GGML_TYPE_Q4_0 }
        });
    }
}

}  // namespace

const part copy              = { "copy", run_copy };
const part fq4_mul_mat       = { "fq4_mul_mat", run_products };
const part fq4_mul_mat_id    = { "fq4_mul_mat_id", run_experts };
const part kron              = { "kron", run_kron };
const part attention_prefill = { "attention_prefill", run_prefill };
const part attention_decode  = { "attention_decode", run_decode };

}  // namespace ggml_ext_bench
