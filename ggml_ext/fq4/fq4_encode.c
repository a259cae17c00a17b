// The search for table rows and codes, see encode.h. Compiled without contraction, so that all machines, and the numpy
// version in python/ggml_ext/gguf/fq4_search.py, find the same.

#include "encode.h"
#include "ggml-impl.h"
#include "ggml-threading.h"

#include <math.h>
#include <stdatomic.h>

// The encoder's inner loop runs over the 16 rows: the compiler makes it one vector operation where
// it may use one. The variants differ in speed only.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#    define FQ4_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#    define FQ4_CLONES
#endif

#define N_CELLS 512

// An importance counts as at least this part of its block's mean, so that a sub-block whose columns were
// never active still gets a row that fits it.
#define IMPORTANCE_FLOOR 1e-4f

// Nearest codes and their values, by cell and row of the table.
static struct {
    _Alignas(64) float value[N_CELLS][16];
    uint8_t code[N_CELLS][16];
} fq4_nearest;

static void fq4_init_nearest(void) {
    for (int cell = 0; cell < N_CELLS; cell++) {
        const int t4 = 2 * cell - 511;  // four times the middle of the cell
        for (int row = 0; row < 16; row++) {
            const int8_t * values = ggml_ext_fq4_table[row];
            int            code   = 0;
            while (code < 15 && t4 > 2 * (values[code] + values[code + 1])) {
                code++;
            }
            fq4_nearest.code[cell][row]  = (uint8_t) code;
            fq4_nearest.value[cell][row] = (float) values[code];
        }
    }
}

void ggml_ext_fq4_encode_init(void) {
    static atomic_bool ready = false;
    if (atomic_load_explicit(&ready, memory_order_acquire)) {
        return;
    }
    ggml_critical_section_start();
    if (!atomic_load_explicit(&ready, memory_order_relaxed)) {
        fq4_init_nearest();
        atomic_store_explicit(&ready, true, memory_order_release);
    }
    ggml_critical_section_end();
}

bool ggml_ext_fq4_largest(int n, const float * x, float limit, float * largest) {
    float amax  = 0.0f;
    bool  valid = true;
    for (int i = 0; i < n; i++) {
        const float a = fabsf(x[i]);
        valid         = valid && a <= limit;
        amax          = a > amax ? a : amax;
    }
    *largest = amax;
    return valid;
}

void ggml_ext_fq4_error_weights(int n, const float * importance, float * weight) {
    float sum = 0.0f;
    for (int i = 0; importance && i < n; i++) {
        sum += importance[i];
    }
    const float floor = sum * (IMPORTANCE_FLOOR / (float) n);
    for (int i = 0; i < n; i++) {
        weight[i] = !(sum > 0.0f) ? 1.0f : importance[i] > floor ? importance[i] : floor;
    }
}

// One lane per row of the table (GCC and Clang vector extensions; without the hardware, plain code).
typedef float fq4_f32x16 __attribute__((vector_size(64), aligned(4), may_alias));

FQ4_CLONES static void fq4_choose(int n_subs, const float * x, const float * weight, float d,
                                  struct ggml_ext_fq4_choice * out) {
    const float inv = 1.0f / d;
    float       t[QK_FQ4];
    for (int i = 0; i < 16 * n_subs; i++) {
        t[i]         = x[i] * inv;
        float where  = t[i] * 2.0f + 256.0f;
        where        = where > 0.0f ? where : 0.0f;
        where        = where < 511.0f ? where : 511.0f;
        out->cell[i] = (int16_t) (int32_t) where;
    }
    float sum = 0.0f;
    for (int b = 0; b < n_subs; b++) {
        fq4_f32x16 cost = { 0.0f };
        for (int i = 16 * b; i < 16 * b + 16; i++) {
            const fq4_f32x16 e = t[i] - *(const fq4_f32x16 *) fq4_nearest.value[out->cell[i]];
            cost += weight[i] * e * e;
        }
        int best = 0;
        for (int row = 1; row < 16; row++) {
            best = cost[row] < cost[best] ? row : best;
        }
        out->row[b] = (uint8_t) best;
        sum += cost[best];
    }
    out->d    = d;
    out->cost = sum * (d * d);
}

void ggml_ext_fq4_try(int n_subs, const float * x, const float * weight, float d, struct ggml_ext_fq4_choice * best) {
    struct ggml_ext_fq4_choice next;
    if (d > 0.0f) {
        fq4_choose(n_subs, x, weight, d, &next);
        if (next.cost < best->cost) {
            *best = next;
        }
    }
}

float ggml_ext_fq4_refit(int n_subs, const float * x, const float * weight, const struct ggml_ext_fq4_choice * choice) {
    float num[16] = { 0.0f };
    float den[16] = { 0.0f };
    for (int b = 0; b < n_subs; b++) {
        for (int i = 0; i < 16; i++) {
            const float v  = fq4_nearest.value[choice->cell[16 * b + i]][choice->row[b]];
            const float wv = weight[16 * b + i] * v;
            num[i] += wv * x[16 * b + i];
            den[i] += wv * v;
        }
    }
    for (int i = 1; i < 16; i++) {
        num[0] += num[i];
        den[0] += den[i];
    }
    return den[0] > 0.0f ? num[0] / den[0] : 0.0f;
}

uint8_t ggml_ext_fq4_code(const struct ggml_ext_fq4_choice * choice, int i) {
    return fq4_nearest.code[choice->cell[i]][choice->row[i / 16]];
}
