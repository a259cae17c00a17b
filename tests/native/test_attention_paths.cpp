// The kernels of quantised attention, one by one: every path of this machine against the generic one on random tiles.
// Integers (codes, packed tiles, integer sums) have to agree exactly. A float may differ by the order of its sum or a
// fused multiply: a few units of the last place of the sum of its terms' magnitudes. A weight may differ by one step
// where the exponentials differ in their last bits at a tie.

#include "attention/cpu/attention.h"
#include "check.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

namespace {

constexpr int    TILE = GGML_EXT_ATTENTION_TILE, GROUP = GGML_EXT_ATTENTION_GROUP, BATCH = GGML_EXT_ATTENTION_BATCH;
constexpr double ULP = 1.0 / (1 << 23);

std::mt19937 rng(99);

int uniform(int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(rng);
}

float normal() {
    return std::normal_distribution<float>()(rng);
}

// Contents with an alignment of 64 and nothing behind them that AddressSanitizer would let pass.
template <class T> class Array {
  public:
    explicit Array(size_t n, T value = T()) : n(n) {
        if (posix_memalign((void **) &data, 64, n * sizeof(T))) {
            std::abort();
        }
        std::fill(data, data + n, value);
    }

    Array(const Array & other) : Array(other.n) { std::copy(other.data, other.data + n, data); }

    Array & operator=(const Array &) = delete;

    ~Array() { std::free(data); }

    T & operator[](size_t i) { return data[i]; }

    bool operator==(const Array & other) const { return std::memcmp(data, other.data, n * sizeof(T)) == 0; }

    size_t n;
    T *    data;
};

struct Tile {
    ggml_ext_attention_dims dims;
    int                     n;  // tokens
    Array<uint8_t>          k;
    Array<float>            k_scale;
    Array<int8_t>           v;
    Array<float>            v_level, v_unit;
    ggml_ext_attention_tile tile = {};

    Tile(int dk, int dv, int k_groups, int v_groups, int planes, int n) :
        dims{ dk, dv, k_groups, v_groups, planes }, n(n), k(dk * TILE), k_scale(k_groups * TILE), v(dv * TILE),
        v_level(v_groups * TILE), v_unit(v_groups) {
        for (size_t i = 0; i < k.n; i++) {
            k[i] = (uint8_t) uniform(0, 255);
        }
        for (size_t i = 0; i < v.n; i++) {
            v[i] = (int8_t) uniform(-127, 127);
        }
        for (size_t i = 0; i < k_scale.n; i++) {
            k_scale[i] = (int) (i % TILE) < n ? normal() / 64 : 0.0f;
        }
        const float levels = planes == 2 ? 65535.0f : 255.0f;
        for (size_t i = 0; i < v_level.n; i++) {
            v_level[i] = (int) (i % TILE) < n ? levels * (float) uniform(0, 1000) / 1000 : 0.0f;
        }
        for (int g = 0; g < v_groups; g++) {
            v_level[g * TILE + uniform(0, n - 1)] = levels;
            v_unit[g]                             = std::fabs(normal());
        }
        tile.k       = k.data;
        tile.k_scale = k_scale.data;
        tile.v       = v.data;
        tile.v_level = v_level.data;
        tile.v_unit  = v_unit.data;
    }
};

struct Rows {
    Array<int8_t>                   q;
    Array<int32_t>                  q_start;
    Array<float>                    q_scale, q_bias, s;
    std::vector<Array<ggml_fp16_t>> masks;
    const ggml_fp16_t *             mask[BATCH] = {};
    Array<float>                    slope;
    Array<uint8_t>                  p;
    Array<float>                    max, sum, alpha, gamma, o;
    ggml_ext_attention_rows         rows = {};

    Rows(const Tile & t, int n_rows, bool bias, bool masked) :
        q(BATCH * t.dims.dk_pad), q_start(BATCH * t.dims.k_groups), q_scale(BATCH), q_bias(BATCH), s(BATCH * TILE),
        slope(BATCH), p(BATCH * t.dims.v_groups * t.dims.planes * TILE), max(BATCH), sum(BATCH * 16), alpha(BATCH),
        gamma(BATCH), o(BATCH * t.dims.dv_pad) {
        for (size_t i = 0; i < q.n; i++) {
            q[i] = (int8_t) uniform(-127, 127);
            q_start[i / (t.dims.dk_pad / t.dims.k_groups)] -= 128 * q[i];
        }
        for (int r = 0; r < BATCH; r++) {
            q_scale[r] = (float) uniform(1, 1000) * 1e-6f;
            q_bias[r]  = normal();
            slope[r]   = (float) uniform(1, 8) / 8;
            max[r]     = uniform(0, 3) ? normal() : -INFINITY;
            masks.emplace_back(t.n);
            const int hidden = uniform(0, 2);  // none, some, all
            for (int i = 0; i < t.n; i++) {
                masks[r][i] = ggml_fp32_to_fp16(hidden == 2 || (hidden == 1 && uniform(0, 1)) ? -INFINITY : normal());
            }
        }
        for (int r = 0; r < BATCH; r++) {
            mask[r] = masked && r != 2 ? masks[r].data : nullptr;
        }
        for (size_t i = 0; i < sum.n; i++) {
            sum[i] = max[i / 16] == -INFINITY ? 0.0f : (float) uniform(0, 1000) / 100;
        }
        for (size_t i = 0; i < o.n; i++) {
            o[i] = normal();
        }
        for (size_t i = 0; i < s.n; i++) {
            s[i] = 4 * normal();
        }
        point(n_rows, bias);
    }

    Rows(const Rows & x) :
        q(x.q), q_start(x.q_start), q_scale(x.q_scale), q_bias(x.q_bias), s(x.s), masks(x.masks), slope(x.slope),
        p(x.p), max(x.max), sum(x.sum), alpha(x.alpha), gamma(x.gamma), o(x.o) {
        for (int r = 0; r < BATCH; r++) {
            mask[r] = x.mask[r] ? masks[r].data : nullptr;
        }
        point(x.rows.n_rows, x.rows.q_bias);
    }

    void point(int n_rows, bool bias) {
        rows = { n_rows,   q.data,     q_start.data, q_scale.data, bias ? q_bias.data : nullptr,
                 s.data,   mask,       slope.data,   p.data,       max.data,
                 sum.data, alpha.data, gamma.data,   o.data };
    }
};

bool close(float a, float b, double tolerance) {
    return a == b || std::fabs((double) a - b) <= tolerance;
}

const ggml_ext_attention_path & generic() {
    return *ggml_ext_attention_paths[ggml_ext_attention_n_paths - 1];
}

void test_quantize(const ggml_ext_attention_path & path) {
    for (int n : { 1, 31, 32, 33, 64, 72, 80, 96, 127, 128, 256, 500 }) {
        const int    n_pad = (n + GROUP - 1) / GROUP * GROUP;
        Array<float> x(n);
        for (int i = 0; i < n; i++) {
            // Multiples of an eighth and a largest value of 127: many exact ties.
            x[i] = n == 72 ? 0.0f : n % 2 ? normal() : i == 0 ? 127.0f : (float) uniform(-1000, 1000) / 8;
        }
        Array<int8_t> a(n_pad, 5), b(n_pad, 6);
        const float   sa = generic().quantize(n, n_pad, x.data, a.data), sb = path.quantize(n, n_pad, x.data, b.data);
        CHECK(sa == sb && a == b, "%s: quantize of %d values", path.name, n);
    }
}

// Values too small for a scale count as zeros; a value that is not finite leaves no code and a scale of NaN.
void test_quantize_limits(const ggml_ext_attention_path & path) {
    for (int n : { 1, 37, 64, 500 }) {
        const int n_pad = (n + GROUP - 1) / GROUP * GROUP;
        for (float value : { 3e-37f, 1e-38f, 1e-45f, -1e-45f, (float) NAN, -(float) NAN, INFINITY, -INFINITY }) {
            for (int at : { 0, n / 2, n - 1 }) {
                Array<float>  x(n, std::isfinite(value) ? 1e-45f : 1.0f);
                Array<int8_t> codes(n_pad, 5), zero(n_pad, 0);
                x[at]             = value;
                const float scale = path.quantize(n, n_pad, x.data, codes.data);
                CHECK((std::isfinite(value) ? scale == 0.0f : std::isnan(scale)) && codes == zero,
                      "%s: quantize of %d values, one of them %g: scale %g", path.name, n, value, scale);
            }
        }
    }
}

void test_scales(const ggml_ext_attention_path & path) {
    for (int n_blocks : { 1, 3, 8 }) {
        const size_t                block = 18;
        std::vector<Array<uint8_t>> rows;
        const char *                at[TILE];
        for (int t = 0; t < TILE; t++) {
            rows.emplace_back(n_blocks * block);
            for (int g = 0; g < n_blocks; g++) {
                const ggml_fp16_t half = ggml_fp32_to_fp16(normal() * (float) std::pow(10.0, uniform(-6, 3)));
                std::memcpy(rows[t].data + g * block, &half, sizeof(half));
            }
        }
        for (int t = 0; t < TILE; t++) {
            at[t] = (const char *) rows[t].data;
        }
        Array<float> a(n_blocks * TILE, 1), b(n_blocks * TILE, 2);
        generic().scales(n_blocks, block, at, a.data);
        path.scales(n_blocks, block, at, b.data);
        CHECK(a == b, "%s: scales of %d blocks", path.name, n_blocks);

        for (int signs = 0; signs < 3; signs++) {  // as they are, none negative, all zero
            for (size_t i = 0; i < a.n; i++) {
                a[i] = b[i] = signs == 2 ? 0.0f : signs == 1 ? std::fabs(a[i]) : a[i];
            }
            Array<float>  ua(n_blocks, 1), ub(n_blocks, 2), sa(a), sb(b);
            Array<int8_t> na(n_blocks * TILE, 1), nb(n_blocks * TILE, 2);
            const bool    ga = generic().levels(n_blocks, 65535.0f, sa.data, ua.data, na.data);
            const bool    gb = path.levels(n_blocks, 65535.0f, sb.data, ub.data, nb.data);
            CHECK(ga == gb && ga == (signs == 0), "%s: negative scales: %d, %d", path.name, ga, gb);
            CHECK(sa == sb && ua == ub && na == nb, "%s: levels of %d groups", path.name, n_blocks);
        }
    }
}

void test_pack(const ggml_ext_attention_path & path) {
    for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL, GGML_TYPE_I8 }) {
        for (int n_blocks : { 1, 2, 3, 4, 8, 18 }) {
            const size_t row_size = type == GGML_TYPE_I8 ? n_blocks * GROUP : ggml_row_size(type, n_blocks * GROUP);
            // Rows in any order at odd distances; no code is -128, as in every cache that ggml wrote.
            std::vector<Array<uint8_t>> rows;
            const char *                at[TILE];
            Array<int8_t>               negate(TILE * n_blocks);
            for (int t = 0; t < TILE; t++) {
                rows.emplace_back(row_size);
                for (size_t i = 0; i < row_size; i++) {
                    const int byte = uniform(0, 255);
                    rows[t][i]     = (uint8_t) (byte == 128 ? 127 : byte);
                }
            }
            for (int t = 0; t < TILE; t++) {
                at[t] = (const char *) rows[t].data;
            }
            for (size_t i = 0; i < negate.n; i++) {
                negate[i] = (int8_t) -uniform(0, 1);
            }
            const size_t   size = (size_t) TILE * n_blocks * GROUP;
            Array<uint8_t> ka(size, 1), kb(size, 2);
            generic().pack_k(type, at, n_blocks, ka.data);
            path.pack_k(type, at, n_blocks, kb.data);
            CHECK(ka == kb, "%s: pack_k of %d blocks of %s", path.name, n_blocks, ggml_type_name(type));
            for (const int8_t * sign : { (const int8_t *) nullptr, (const int8_t *) negate.data }) {
                Array<int8_t> va(size, 1), vb(size, 2);
                generic().pack_v(type, at, n_blocks, sign, va.data);
                path.pack_v(type, at, n_blocks, sign, vb.data);
                CHECK(va == vb, "%s: pack_v of %d blocks of %s, signs %d", path.name, n_blocks, ggml_type_name(type),
                      sign != nullptr);
            }
        }
    }
}

void test_scores(const ggml_ext_attention_path & path, const Tile & t, const Rows & start) {
    Rows      a(start), b(start);
    const int width = t.dims.dk_pad / t.dims.k_groups;
    generic().scores(&t.dims, &t.tile, &a.rows);
    path.scores(&t.dims, &t.tile, &b.rows);
    for (int r = 0; r < start.rows.n_rows; r++) {
        for (int i = 0; i < TILE; i++) {
            double terms = 0;
            for (int g = 0; g < t.dims.k_groups; g++) {
                terms += std::fabs(t.tile.k_scale[g * TILE + i]) * 127.0 * 128 * width;
            }
            terms = terms * a.q_scale[r] + std::fabs(start.rows.q_bias ? start.rows.q_bias[r] : 0.0f);
            CHECK(close(a.s[r * TILE + i], b.s[r * TILE + i], 2 * ULP * terms), "%s: dk %d row %d token %d: %g, not %g",
                  path.name, t.dims.dk_pad, r, i, b.s[r * TILE + i], a.s[r * TILE + i]);
        }
    }
}

void test_weights(const ggml_ext_attention_path & path, const Tile & t, const Rows & start) {
    Rows a(start), b(start);
    generic().weights(&t.dims, &t.tile, t.n, &a.rows);
    path.weights(&t.dims, &t.tile, t.n, &b.rows);
    // Exponents are below 40 here, so their rounding moves an exponential by less than 40 units of the last place.
    const double same  = 40 * ULP;
    int          steps = 0;
    for (int r = 0; r < start.rows.n_rows; r++) {
        CHECK(close(a.max[r], b.max[r], same * std::fabs(a.max[r])), "%s: max %g, not %g", path.name, b.max[r],
              a.max[r]);
        CHECK(close(a.alpha[r], b.alpha[r], same * a.alpha[r]), "%s: alpha %g, not %g", path.name, b.alpha[r],
              a.alpha[r]);
        CHECK(close(a.gamma[r], b.gamma[r], same * a.gamma[r]), "%s: gamma %g, not %g", path.name, b.gamma[r],
              a.gamma[r]);
        for (int i = 16 * r; i < 16 * r + 16; i++) {
            CHECK(close(a.sum[i], b.sum[i], same * a.sum[i]), "%s: sum %g, not %g", path.name, b.sum[i], a.sum[i]);
        }
        for (int g = 0; g < t.dims.v_groups; g++) {
            const size_t at = (size_t) (r * t.dims.v_groups + g) * t.dims.planes * TILE;
            for (size_t i = at; i < at + TILE; i++) {
                const int pa = t.dims.planes == 2 ? a.p[i] * 256 + a.p[i + TILE] : a.p[i];
                const int pb = t.dims.planes == 2 ? b.p[i] * 256 + b.p[i + TILE] : b.p[i];
                CHECK(std::abs(pa - pb) <= 1, "%s: weight %d, not %d", path.name, pb, pa);
                steps += pa != pb;
            }
        }
    }
    CHECK(steps <= 2 + start.rows.n_rows * t.dims.v_groups * TILE / 20, "%s: %d weights differ", path.name, steps);
}

void test_accumulate(const ggml_ext_attention_path & path, const Tile & t, const Rows & start) {
    Rows a(start);
    generic().weights(&t.dims, &t.tile, t.n, &a.rows);
    Rows b(a), before(a);
    generic().accumulate(&t.dims, &t.tile, &a.rows);
    path.accumulate(&t.dims, &t.tile, &b.rows);
    for (int i = 0; i < start.rows.n_rows * t.dims.dv_pad; i++) {
        const int    r     = i / t.dims.dv_pad;
        const double terms = std::fabs(before.o[i]) + std::fabs(a.o[i]);
        CHECK(close(a.o[i], b.o[i], 4 * ULP * terms), "%s: dv %d planes %d row %d: %g, not %g", path.name,
              t.dims.dv_pad, t.dims.planes, r, b.o[i], a.o[i]);
    }
}

void test_softcap(const ggml_ext_attention_path & path) {
    for (int n = TILE; n <= BATCH * TILE; n += TILE) {
        Array<float> a(n), b(n);
        for (int i = 0; i < n; i++) {
            a[i] = b[i] = normal() * (float) std::pow(10.0, uniform(-3, 2));
        }
        generic().softcap(n, 30.0f, a.data);
        path.softcap(n, 30.0f, b.data);
        for (int i = 0; i < n; i++) {
            CHECK(close(a[i], b[i], 30 * 8 * ULP), "%s: softcap %g, not %g", path.name, b[i], a[i]);
        }
    }
}

}  // namespace

int main() {
    ggml_cpu_init();
    CHECK(std::strcmp(generic().name, "generic") == 0 && generic().available(), "the last path is generic");
    test_quantize_limits(generic());
    for (int i = 0; i < ggml_ext_attention_n_paths - 1; i++) {
        const ggml_ext_attention_path & path = *ggml_ext_attention_paths[i];
        if (!path.available()) {
            std::printf("path %s: not on this machine\n", path.name);
            continue;
        }
        test_quantize(path);
        test_quantize_limits(path);
        test_scales(path);
        test_pack(path);
        test_softcap(path);
        for (int round = 0; round < 200; round++) {
            const int  dk = GROUP * uniform(1, 8), dv = GROUP * uniform(1, 8);
            const Tile t(dk, dv, round % 2 ? dk / GROUP : 1, round % 3 ? dv / GROUP : 1, 1 + round % 2,
                         round % 5 ? uniform(1, TILE) : TILE);
            const Rows rows(t, uniform(1, BATCH), round % 4 == 0, round % 7 != 0);
            test_scores(path, t, rows);
            test_weights(path, t, rows);
            test_accumulate(path, t, rows);
        }
    }
    return check_done();
}
