// Codebooks and codes of random bytes, and what they stand for in double.

#pragma once

#include "core/ext_op.h"
#include "ggml.h"
#include "kv_code/cold.h"
#include "kv_store/block.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

namespace kv {

constexpr int SLOTS = GGML_EXT_KV_SLOTS;

struct CodesOf {
    int   channels = 0, n_rot = 0;
    bool  neox   = false;
    float length = 1;
};

struct Codes {
    Codes() = default;

    Codes(const CodesOf & of, int dk, int dv, int n_head_kv, ggml_context * ctx, std::mt19937 & random, int n_blocks) :
        of(of), dk(dk), dv(dv), layout(ggml_ext_kv_books_of(dk, dv, of.channels)),
        block(ggml_ext_kv_cold_block_of(dk, dv, of.channels, true)) {
        const auto fill = [&](ggml_tensor * t) {
            for (size_t i = 0; i < ggml_nbytes(t); ++i) {
                ((uint8_t *) t->data)[i] = uint8_t(random() % 256);
            }
            return t;
        };
        tensors.p     = { of.channels, of.n_rot, of.neox, of.length };
        tensors.books = fill(ggml_new_tensor_2d(ctx, GGML_TYPE_I8, int64_t(layout.size), n_head_kv));
        tensors.pool  = fill(ggml_new_tensor_2d(ctx, GGML_TYPE_I8, int64_t(block.size), n_blocks));
        for (int head = 0; head < n_head_kv; ++head) {
            auto * scales = (float *) ((char *) tensors.books->data + head * tensors.books->nb[1]);
            for (int i = 0; i < (dk + dv) / of.channels; ++i) {
                const int place = i - dk / of.channels;  // V's are equal within 32 channels, and halves
                scales[i] = place >= 0 && place * of.channels % 32 ? scales[i - 1] : float(1 + random() % 8) / 512;
            }
        }
        if (of.n_rot > 0) {
            make_angles(ctx);
        }
    }

    CodesOf                of;
    int                    dk = 0, dv = 0;
    ggml_ext_kv_books      layout  = {};
    ggml_ext_kv_cold_block block   = {};
    ggml_ext_kv_codes      tensors = {};

    double frequency(int pair) const { return std::pow(10000.0, -2.0 * pair / of.n_rot); }

    void make_angles(ggml_context * ctx) {
        tensors.angles = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, of.n_rot, 2 * GGML_EXT_KV_TURN);
        for (int row = 0; row < 2 * GGML_EXT_KV_TURN; ++row) {
            const double p  = row < GGML_EXT_KV_TURN ? row : double(row - GGML_EXT_KV_TURN) * GGML_EXT_KV_TURN;
            auto *       to = (float *) tensors.angles->data + row * of.n_rot;
            for (int i = 0; i < of.n_rot / 2; ++i) {
                to[i]                = float(std::cos(p * frequency(i)));
                to[of.n_rot / 2 + i] = float(std::sin(p * frequency(i)));
            }
        }
    }

    // Turned by a position as RoPE does, or back.
    std::vector<double> turned(std::vector<double> x, int position) const {
        for (int i = 0; i < of.n_rot / 2; ++i) {
            const double angle = position * frequency(i);
            double &     a     = x[of.neox ? i : 2 * i];
            double &     b     = x[of.neox ? i + of.n_rot / 2 : 2 * i + 1];
            const double y     = a * std::cos(angle) - b * std::sin(angle);
            b                  = a * std::sin(angle) + b * std::cos(angle);
            a                  = y;
        }
        return x;
    }

    // Word `code` of a place of K's or V's codebooks of a head.
    std::vector<double> word(int head, bool v, int place, int code) const {
        const char *        books = (const char *) tensors.books->data + head * tensors.books->nb[1];
        const float         scale = ((const float *) (books + (v ? layout.v_scale : 0)))[place];
        const auto *        words = (const int8_t *) (books + (v ? layout.v : layout.k));
        std::vector<double> x;
        for (int i = 0; i < of.channels; ++i) {
            x.push_back(double(scale) * words[(place * GGML_EXT_KV_WORDS + code) * of.channels + i]);
        }
        return x;
    }

    char * block_of(int slot) const { return (char *) tensors.pool->data + slot / SLOTS * tensors.pool->nb[1]; }

    int32_t * position(int slot) const { return (int32_t *) block_of(slot) + slot % SLOTS; }

    float * score(int slot) const { return (float *) (block_of(slot) + block.score) + slot % SLOTS; }

    uint8_t * codes(bool v, int slot) const {
        return (uint8_t *) block_of(slot) + (v ? block.v : block.k) + slot % SLOTS * (v ? block.v_row : block.k_row);
    }

    // A slot's key, turned by its position, or value.
    std::vector<float> decoded(int head, bool v, int slot) const {
        std::vector<double> x;
        for (int place = 0; place < (v ? dv : dk) / of.channels; ++place) {
            const std::vector<double> w = word(head, v, place, codes(v, slot)[place]);
            x.insert(x.end(), w.begin(), w.end());
        }
        if (!v) {
            x = turned(x, *position(slot));
            std::for_each(x.begin(), x.begin() + of.n_rot, [&](double & value) { value *= of.length; });
        }
        return { x.begin(), x.end() };
    }
};

}  // namespace kv
