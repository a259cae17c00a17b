// LoRA adapters on a transformed model. An adapter adds x A^T B^T to what a matrix makes of x. Where a transform
// was folded into the weights, the graph has x' = x F in the place of x and expects the result times G, so A
// becomes A F^-T and B becomes G^T B. The online part needs nothing: adapters read in front of it.

#include "ggml-backend.h"
#include "llama-adapter.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "loader.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

// By Gauss and Jordan, with the largest pivot of each column.
std::vector<double> inverse(const ggml_ext_place & place) {
    const int64_t       n = place.order;
    std::vector<double> left(place.head.begin(), place.head.end());
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
                                "has no inverse for '" + place.readers[0] + "', which this adapter needs");
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
void map_input(std::vector<float> & a, const ggml_ext_place & place) {
    const std::vector<float> & diagonal = place.diagonal;
    const bool                 mixes    = !place.head.empty();
    const std::vector<double>  back     = mixes ? inverse(place) : std::vector<double>();
    const int64_t              order    = mixes ? place.order : 1;
    std::vector<double>        part(order);
    for (size_t start = 0; start < a.size(); start += order) {
        for (int64_t i = 0; i < order; i++) {
            part[i] = double(a[start + i]) * (diagonal.empty() ? 1.0f : diagonal[(start + i) % place.n]);
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

// d over the rows of B that make a site's channels.
std::vector<float> made(const ggml_ext_place & place) {
    std::vector<float> rows(place.rows, 1.0f);
    for (size_t i = 0; i < place.diagonal.size(); i++) {
        rows[place.row_of(int64_t(i))] = place.diagonal[i];
    }
    return rows;
}

// G^T B for those rows of each of B's matrices [n_out, rank]; G = diag(1 / d) (I (x) head).
void map_output(std::vector<float> & b, int64_t n_out, int64_t rank, const ggml_ext_place & place) {
    const bool               mixes = !place.head.empty();
    const int64_t            order = mixes ? place.order : 1;
    const std::vector<float> d     = made(place);
    std::vector<double>      part(order);
    for (size_t matrix = 0; matrix < b.size(); matrix += n_out * rank) {
        float * const rows = b.data() + matrix + place.first * rank;
        for (int64_t first = 0; first < place.rows; first += order) {
            for (int64_t k = 0; k < rank; k++) {
                for (int64_t i = 0; i < order; i++) {
                    part[i] = rows[(first + i) * rank + k] / double(d[first + i]);
                }
                for (int64_t j = 0; j < order; j++) {
                    double sum = mixes ? 0.0 : part[j];
                    for (int64_t i = 0; mixes && i < order; i++) {
                        sum += part[i] * place.head[i * order + j];
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

void fit_input(const std::string & name, ggml_tensor *& a, const ggml_ext_place & place, llama_adapter_lora & adapter) {
    if (a->ne[0] != place.n) {
        refuse(name,
               "reads " + std::to_string(a->ne[0]) + " channels, of which the model folded " + std::to_string(place.n));
    }
    std::vector<float> values = read(a);
    map_input(values, place);
    write(a, values, adapter);
}

void fit_output(const std::string & name, ggml_tensor *& b, const ggml_ext_place & place,
                llama_adapter_lora & adapter) {
    // More rows than one matrix has: its matrices make the channels one after the other.
    const int64_t n_out = b->ne[1] * (place.rows > b->ne[1] ? b->ne[2] : 1);
    if (place.first < 0 || place.first + place.rows > n_out) {
        refuse(name,
               "makes " + std::to_string(n_out) + " channels, of which the model folded " + std::to_string(place.rows));
    }
    std::vector<float> values = read(b);
    map_output(values, n_out, b->ne[0], place);
    write(b, values, adapter);
}

bool reads(const ggml_ext_place & place, const std::string & name) {
    return std::find(place.readers.begin(), place.readers.end(), name) != place.readers.end();
}

// Whether the record of an older file may leave out what was folded into this matrix: it is in a block where something
// was, and in none of the places.
bool uncovered(const ggml_ext_model & ext, const std::string & name) {
    bool folded = false;
    for (const ggml_ext_place & place : ext.places) {
        if (reads(place, name) || place.maker == name) {
            return false;
        }
        const std::string block = "blk." + std::to_string(place.block) + ".";
        folded                  = folded || (place.folds() && name.compare(0, block.size(), block) == 0);
    }
    return folded;
}

}  // namespace

// An adapter may lie where one lay that was freed, so its address does not name it.
static std::mutex                                     adapters_lock;
static std::map<const llama_adapter_lora *, uint64_t> adapter_numbers;
static uint64_t                                       n_adapters = 0;

uint64_t ggml_ext_llama_adapter_number(const llama_adapter_lora & adapter) {
    const std::lock_guard<std::mutex> lock(adapters_lock);
    return adapter_numbers.at(&adapter);
}

void ggml_ext_llama_adapter(const llama_model & model, llama_adapter_lora & adapter) {
    {
        const std::lock_guard<std::mutex> lock(adapters_lock);
        adapter_numbers[&adapter] = ++n_adapters;
    }
    const ggml_ext_model * ext = model.ggml_ext.get();
    if (!ext || ext->transform == "none") {
        return;
    }
    for (auto & [name, weight] : adapter.ab_map) {
        if (name.compare(0, 4, "blk.") != 0) {
            continue;  // embeddings and head: nothing is folded there
        }
        if (!ext->recorded) {
            refuse(name, "was made for the original model, and the file does not record what its transform '" +
                             ext->transform + "' folded into the weights; convert the model again");
        }
        if (!ext->complete && uncovered(*ext, name)) {
            refuse(name, "is of a matrix that the model's record of folds does not cover; "
                         "use a model converted without a transform");
        }
        for (const ggml_ext_place & place : ext->places) {
            if (place.folds() && reads(place, name)) {
                fit_input(name, weight.a, place, adapter);
            }
            if (place.folds() && place.maker == name) {
                fit_output(name, weight.b, place, adapter);
            }
        }
    }
}
