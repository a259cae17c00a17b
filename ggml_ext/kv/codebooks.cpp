#include "codebooks.h"

#include "kv_code/cold.h"
#include "llama-mmap.h"
#include "llama-model-loader.h"
#include "llama-model.h"
#include "weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>

namespace {

constexpr int value_block = 32;  // channels of V that a q8_0 row has one scale for

[[noreturn]] void codebook_refuse(const std::string & name, const std::string & why) {
    throw std::runtime_error("ggml-ext: tensor '" + name + "' " + why);
}

std::string codebook_name(uint32_t il, char which, int channels) {
    return "blk." + std::to_string(il) + ".attn_" + which + ".kv_cq" + (channels == 4 ? "2" : "1");
}

// Words [n_head_kv][d / channels][256][channels].
std::vector<float> codebook_words(llama_model_loader & ml, const std::string & name, int64_t channels, int64_t d,
                                  int64_t n_head) {
    const auto * weight = ml.get_weight(name.c_str());
    if (!weight) {
        codebook_refuse(name, "is missing beside the other half of its codebook");
    }
    const ggml_tensor * tensor = weight->tensor;
    if (tensor->type != GGML_TYPE_F16) {
        codebook_refuse(name, std::string("is of type ") + ggml_type_name(tensor->type) + ", not f16");
    }
    if (d % value_block != 0 || tensor->ne[0] != channels || tensor->ne[1] != GGML_EXT_KV_WORDS ||
        tensor->ne[2] != d / channels || tensor->ne[3] != n_head) {
        codebook_refuse(name, "has shape " + llama_format_tensor_shape(tensor) + ", which is not " +
                                  std::to_string(channels) + " x 256 x " + std::to_string(d / channels) + " x " +
                                  std::to_string(n_head));
    }
    if (ml.files.empty()) {
        codebook_refuse(name, "is a codebook: such a model is loaded from files only");
    }
    std::vector<ggml_fp16_t> halves(ggml_nelements(tensor));
    llama_file &             file = *ml.files.at(weight->idx);
    file.seek(weight->offs, SEEK_SET);
    file.read_raw(halves.data(), ggml_nbytes(tensor));
    std::vector<float> values(halves.size());
    ggml_fp16_to_fp32_row(halves.data(), values.data(), int64_t(values.size()));
    for (const float value : values) {
        if (!std::isfinite(value)) {
            codebook_refuse(name, "holds a value that is not finite");
        }
    }
    // As upstream's create_tensor counts a tensor that it leaves out of its own buffers.
    ml.n_created++;
    ml.size_data -= ggml_nbytes(tensor);
    return values;
}

// A head's words in 8 bits; scales are equal for `shared` channels.
void codebook_round(const float * words, int64_t d, int64_t channels, int64_t shared, float * scales,
                    int8_t * rounded) {
    const size_t per_place = GGML_EXT_KV_WORDS * size_t(channels);
    for (int64_t place = 0; place < d / channels; place += shared / channels) {
        const float * first = words + size_t(place) * per_place;
        const size_t  n     = per_place * size_t(shared / channels);
        float         most  = 0;
        for (size_t i = 0; i < n; ++i) {
            most = std::max(most, std::fabs(first[i]));
        }
        // V's are halves in q8_0 rows.
        const float scale = ggml_fp16_to_fp32(ggml_fp32_to_fp16(std::max(most / 127, 6e-5f)));
        std::fill_n(scales + place, shared / channels, scale);
        for (size_t i = 0; i < n; ++i) {
            rounded[size_t(place) * per_place + i] = int8_t(std::clamp(std::lround(first[i] / scale), -127l, 127l));
        }
    }
}

std::vector<char> codebook_books(llama_model_loader & ml, const llama_hparams & hparams, uint32_t il, int channels) {
    const int64_t dk = hparams.n_embd_head_k(il), dv = hparams.n_embd_head_v(il), n_head = hparams.n_head_kv(il);
    const ggml_ext_kv_books layout = ggml_ext_kv_books_of(dk, dv, channels);

    const std::vector<float> k = codebook_words(ml, codebook_name(il, 'k', channels), channels, dk, n_head);
    const std::vector<float> v = codebook_words(ml, codebook_name(il, 'v', channels), channels, dv, n_head);
    std::vector<char>        books(layout.size * size_t(n_head));
    for (int64_t head = 0; head < n_head; ++head) {
        char * to     = books.data() + layout.size * size_t(head);
        auto * scales = reinterpret_cast<float *>(to);
        codebook_round(k.data() + head * GGML_EXT_KV_WORDS * dk, dk, channels, channels, scales,
                       reinterpret_cast<int8_t *>(to + layout.k));
        codebook_round(v.data() + head * GGML_EXT_KV_WORDS * dv, dv, channels, value_block,
                       scales + layout.v_scale / sizeof(float), reinterpret_cast<int8_t *>(to + layout.v));
    }
    return books;
}

}  // namespace

ggml_ext_kv_codebooks ggml_ext_kv_load_codebooks(llama_model_loader & ml, const llama_model & model) {
    ggml_ext_kv_codebooks codebooks;
    std::set<std::string> names;
    for (const auto & [name, weight] : ml.weights_map) {
        if (name.find(".kv_cq") != std::string::npos) {
            names.insert(name);
        }
    }
    if (names.empty()) {
        return codebooks;
    }
    const llama_hparams &          hparams = model.hparams;
    std::vector<std::vector<char>> data;
    codebooks.context.reset(ggml_init({ names.size() * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true }));
    for (const int channels : { 4, 8 }) {
        for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
            const std::string k = codebook_name(il, 'k', channels), v = codebook_name(il, 'v', channels);
            if (names.erase(k) + names.erase(v) == 0) {
                continue;
            }
            if (hparams.is_mla() || !hparams.has_kv(il)) {
                codebook_refuse(k, "is of a layer that makes no keys of its own");
            }
            data.push_back(codebook_books(ml, hparams, il, channels));
            std::vector<ggml_tensor *> & layers = codebooks.layers[channels];
            layers.resize(hparams.n_layer_all);
            layers[il] = ggml_new_tensor_2d(codebooks.context.get(), GGML_TYPE_I8,
                                            int64_t(data.back().size()) / hparams.n_head_kv(il), hparams.n_head_kv(il));
            ggml_set_name(layers[il], k.c_str());
        }
    }
    if (!names.empty()) {
        codebook_refuse(*names.begin(), "is a codebook of no layer of this model");
    }
    codebooks.buffer = ggml_ext_kv_weights(codebooks.context.get(), data, !ml.no_alloc, "codebooks");
    return codebooks;
}
