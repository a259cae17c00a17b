// LoRA adapters on a transformed model. An adapter adds x A^T B^T to what a matrix makes of x. Where a transform
// was folded into the weights, the graph has x' = x F in the place of x and expects the result times G, so A
// becomes A F^-T and B becomes G^T B. The online part needs nothing: adapters read in front of it.

#include "ggml-backend.h"
#include "llama-adapter.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "transform-loader.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr int none = -1;

// The sites whose channels a matrix reads and makes: all of its rows, or the last ones where q, k and v or gate
// and up are one matrix.
struct basis {
    const char * matrix;
    int          input;
    int          output;
};

const basis bases[] = {
    { "attn_q",        GGML_EXT_ATTN_IN,  none              },
    { "attn_k",        GGML_EXT_ATTN_IN,  none              },
    { "attn_v",        GGML_EXT_ATTN_IN,  GGML_EXT_ATTN_OUT },
    { "attn_qkv",      GGML_EXT_ATTN_IN,  GGML_EXT_ATTN_OUT },
    { "attn_output",   GGML_EXT_ATTN_OUT, none              },
    { "ffn_gate",      GGML_EXT_FFN_IN,   none              },
    { "ffn_up",        GGML_EXT_FFN_IN,   GGML_EXT_FFN_MID  },
    { "ffn_gate_inp",  GGML_EXT_FFN_IN,   none              },
    { "ffn_gate_exps", GGML_EXT_FFN_IN,   none              },
    { "ffn_up_exps",   GGML_EXT_FFN_IN,   GGML_EXT_FFN_MID  },
    { "ffn_down",      GGML_EXT_FFN_MID,  none              },
    { "ffn_down_exps", GGML_EXT_FFN_MID,  none              },
};

// "blk.N.MATRIX.weight" as N and MATRIX; false for another name.
bool parse(const std::string & name, uint32_t & block, std::string & matrix) {
    char text[GGML_MAX_NAME];
    int  end = 0;
    if (name.size() >= sizeof(text) || std::sscanf(name.c_str(), "blk.%u.%[^.].weight%n", &block, text, &end) != 2 ||
        size_t(end) != name.size()) {
        return false;
    }
    matrix = text;
    return true;
}

const basis * find(const std::string & matrix) {
    const auto found =
        std::find_if(std::begin(bases), std::end(bases), [&](const basis & row) { return matrix == row.matrix; });
    return found == std::end(bases) ? nullptr : found;
}

bool folds_nothing(const ggml_ext_fold & fold) {
    return fold.head.empty() && std::all_of(std::begin(fold.diagonals), std::end(fold.diagonals),
                                            [](const std::vector<float> & diagonal) { return diagonal.empty(); });
}

// By Gauss and Jordan, with the largest pivot of each column.
std::vector<double> inverse(const ggml_ext_fold & fold, uint32_t block) {
    const int64_t       n = fold.order;
    std::vector<double> left(fold.head.begin(), fold.head.end());
    std::vector<double> right(n * n, 0.0);
    for (int64_t i = 0; i < n; i++) {
        right[i * n + i] = 1.0;
    }
    for (int64_t column = 0; column < n; column++) {
        int64_t pivot = column;
        for (int64_t row = column + 1; row < n; row++) {
            pivot = std::abs(left[row * n + column]) > std::abs(left[pivot * n + column]) ? row : pivot;
        }
        const double divisor = left[pivot * n + column];
        if (std::abs(divisor) < 1e-30) {
            ggml_ext_refuse_key("ggml_ext.fold.heads",
                                "has no inverse for block " + std::to_string(block) + ", which this adapter needs");
        }
        for (std::vector<double> * matrix : { &left, &right }) {
            double * const rows = matrix->data();
            std::swap_ranges(rows + pivot * n, rows + (pivot + 1) * n, rows + column * n);
            for (int64_t j = 0; j < n; j++) {
                rows[column * n + j] /= divisor;
            }
        }
        for (int64_t row = 0; row < n; row++) {
            const double factor = left[row * n + column];
            if (row == column || factor == 0.0) {
                continue;
            }
            for (int64_t j = 0; j < n; j++) {
                left[row * n + j] -= factor * left[column * n + j];
                right[row * n + j] -= factor * right[column * n + j];
            }
        }
    }
    return right;
}

// A F^-T for the rows of A; F^-T = diag(d) (I (x) head^-T).
void map_input(std::vector<float> & a, int64_t n, const ggml_ext_fold & fold, int kind, uint32_t block) {
    const std::vector<float> & diagonal = fold.diagonals[kind];
    const bool                 mixes    = kind == GGML_EXT_ATTN_OUT && !fold.head.empty();
    const std::vector<double>  back     = mixes ? inverse(fold, block) : std::vector<double>();
    const int64_t              order    = mixes ? fold.order : 1;
    std::vector<double>        part(order);
    for (size_t start = 0; start < a.size(); start += order) {
        for (int64_t i = 0; i < order; i++) {
            part[i] = double(a[start + i]) * (diagonal.empty() ? 1.0f : diagonal[(start + i) % n]);
        }
        for (int64_t j = 0; j < order; j++) {
            double sum = mixes ? 0.0 : part[j];
            for (int64_t i = 0; mixes && i < order; i++) {
                sum += part[i] * back[j * order + i];
            }
            a[start + j] = float(sum);
        }
    }
}

// d over the rows of B that make a site's channels. A row of v feeds a channel of several query heads, whose d
// are equal.
std::vector<float> made(const ggml_ext_fold & fold, int kind, const llama_hparams & hparams, uint32_t block) {
    const std::vector<float> & diagonal = fold.diagonals[kind];
    if (kind != GGML_EXT_ATTN_OUT) {
        return diagonal;
    }
    const int64_t      dim   = hparams.n_embd_head_v(block);
    const int64_t      group = hparams.n_head(block) / hparams.n_head_kv(block);
    std::vector<float> rows(hparams.n_head_kv(block) * dim, 1.0f);
    for (int64_t i = 0; !diagonal.empty() && i < int64_t(rows.size()); i++) {
        rows[i] = diagonal[i / dim * group * dim + i % dim];
    }
    return rows;
}

// G^T B for the last rows of each of B's matrices [n_out, rank]; G = diag(1 / d) (I (x) head), d as made() has it.
void map_output(std::vector<float> & b, int64_t n_out, int64_t rank, const std::vector<float> & d,
                const ggml_ext_fold & fold, int kind) {
    const bool          mixes = kind == GGML_EXT_ATTN_OUT && !fold.head.empty();
    const int64_t       order = mixes ? fold.order : 1;
    const int64_t       n     = int64_t(d.size());
    std::vector<double> part(order);
    for (size_t matrix = 0; matrix < b.size(); matrix += n_out * rank) {
        float * const rows = b.data() + matrix + (n_out - n) * rank;
        for (int64_t first = 0; first < n; first += order) {
            for (int64_t k = 0; k < rank; k++) {
                for (int64_t i = 0; i < order; i++) {
                    part[i] = rows[(first + i) * rank + k] / double(d[first + i]);
                }
                for (int64_t j = 0; j < order; j++) {
                    double sum = mixes ? 0.0 : part[j];
                    for (int64_t i = 0; mixes && i < order; i++) {
                        sum += part[i] * fold.head[i * order + j];
                    }
                    rows[(first + j) * rank + k] = float(sum);
                }
            }
        }
    }
}

std::vector<float> read(const ggml_tensor * tensor) {
    std::vector<float>   values(ggml_nelements(tensor));
    std::vector<uint8_t> bytes(ggml_nbytes(tensor));
    ggml_backend_tensor_get(tensor, bytes.data(), 0, bytes.size());
    const ggml_to_float_t to_float = ggml_get_type_traits(tensor->type)->to_float;
    if (tensor->type == GGML_TYPE_F32) {
        std::memcpy(values.data(), bytes.data(), bytes.size());
    } else if (to_float) {
        to_float(bytes.data(), values.data(), int64_t(values.size()));
    } else {
        ggml_ext_refuse_tensor(tensor->name, std::string("is of type ") + ggml_type_name(tensor->type) +
                                                 ", which a transformed model cannot take; use f32 or f16");
    }
    return values;
}

// Puts the values into the tensor, or into one of type F32 in its place: they are to be rounded no further.
void write(ggml_tensor *& tensor, const std::vector<float> & values, llama_adapter_lora & adapter) {
    if (tensor->type != GGML_TYPE_F32) {
        const ggml_init_params params = { ggml_tensor_overhead(), nullptr, /*no_alloc =*/true };
        ggml_context_ptr       context(ggml_init(params));
        ggml_tensor *          wider = ggml_new_tensor(context.get(), GGML_TYPE_F32, GGML_MAX_DIMS, tensor->ne);
        ggml_set_name(wider, tensor->name);
        ggml_backend_buffer_ptr buffer(
            ggml_backend_alloc_ctx_tensors_from_buft(context.get(), ggml_backend_buffer_get_type(tensor->buffer)));
        if (!buffer) {
            ggml_ext_refuse_tensor(tensor->name, "finds no memory as f32");
        }
        adapter.ctxs.push_back(std::move(context));
        adapter.bufs.push_back(std::move(buffer));
        tensor = wider;
    }
    ggml_backend_tensor_set(tensor, values.data(), 0, ggml_nbytes(tensor));
}

[[noreturn]] void refuse(const std::string & name, const std::string & why) {
    throw std::runtime_error("ggml-ext: LoRA tensor '" + name + "' " + why);
}

// Brings the adapter of one matrix into the basis of the graph.
void fit(const std::string & name, llama_adapter_lora_weight & weight, const basis & row, const ggml_ext_fold & fold,
         uint32_t block, const llama_hparams & hparams, llama_adapter_lora & adapter) {
    const auto folded = [&fold](int kind) {
        return kind != none && (!fold.diagonals[kind].empty() || (kind == GGML_EXT_ATTN_OUT && !fold.head.empty()));
    };
    if (folded(row.input)) {
        const int64_t n    = weight.a->ne[0];
        const size_t  size = fold.diagonals[row.input].size();
        if (size != 0 && int64_t(size) != n) {
            refuse(name, "reads " + std::to_string(n) + " channels, of which the model folded " + std::to_string(size));
        }
        std::vector<float> a = read(weight.a);
        map_input(a, n, fold, row.input, block);
        write(weight.a, a, adapter);
    }
    if (folded(row.output)) {
        const std::vector<float> d     = made(fold, row.output, hparams, block);
        const int64_t            n_out = weight.b->ne[1];
        if (n_out < int64_t(d.size())) {
            refuse(name, "makes " + std::to_string(n_out) + " channels, of which the model folded " +
                             std::to_string(d.size()));
        }
        std::vector<float> b = read(weight.b);
        map_output(b, n_out, weight.b->ne[0], d, fold, row.output);
        write(weight.b, b, adapter);
    }
}

}  // namespace

void ggml_ext_llama_adapter(const llama_model & model, llama_adapter_lora & adapter) {
    const ggml_ext_model * ext = model.ggml_ext.get();
    if (!ext || ext->transform == "none") {
        return;
    }
    for (auto & [name, weight] : adapter.ab_map) {
        uint32_t    block = 0;
        std::string matrix;
        if (!parse(name, block, matrix)) {
            continue;  // embeddings and head: nothing is folded there
        }
        if (ext->folds.empty()) {
            refuse(name, "was made for the original model, and the file does not record what its transform '" +
                             ext->transform + "' folded into the weights; convert the model again");
        }
        const ggml_ext_fold & fold = ext->folds.at(block);
        if (folds_nothing(fold)) {
            continue;
        }
        const basis * row = find(matrix);
        if (!row) {
            refuse(name, "is of a matrix that the model's record of folds does not cover; "
                         "use a model converted without a transform");
        }
        fit(name, weight, *row, fold, block, model.hparams, adapter);
    }
}
