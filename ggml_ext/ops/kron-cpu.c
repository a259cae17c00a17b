// GGML_EXT_OP_KRON on the CPU: left product first, Z = left^T X, then Y = Z right. Both orders cost
// n (n1 + n2) multiply-adds; in this one a block of rows of Y depends on no other row of Z, so threads
// share one token by rows and meet only where the clip needs the whole token's maximum.

#include "kron-cpu.h"

#include "ext-op-cpu.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "kron.h"
#include "simd-mappings.h"
#include "x86.h"

#include <math.h>
#include <string.h>

// Plain loops, the reference of the fast paths.

static bool kron_always(void) {
    return true;
}

static float kron_element(const struct ggml_ext_kron_product * p, int64_t k, int64_t q) {
    const int64_t i = k * p->b_row + q;
    return p->b_f16 ? GGML_CPU_FP16_TO_FP32(((const ggml_fp16_t *) p->b)[i]) : ((const float *) p->b)[i];
}

static void kron_product_ref(const struct ggml_ext_kron_product * p) {
    for (int64_t row = 0; row < p->rows; row++) {
        float * c = p->c + row * p->c_row;
        for (int64_t q = 0; q < p->cols; q++) {
            c[q] = 0.0f;
        }
        for (int64_t k = 0; k < p->depth; k++) {
            const float a = p->a[row * p->a_row + k * p->a_depth];
            for (int64_t q = 0; q < p->cols; q++) {
                c[q] += a * kron_element(p, k, q);
            }
        }
    }
}

static void kron_hadamard_ref(int64_t n, int64_t order, float * x) {
    for (int64_t half = 1; half < order; half *= 2) {
        for (int64_t i = 0; i < n; i += 2 * half) {
            for (int64_t j = i; j < i + half; j++) {
                const float u = x[j];
                const float v = x[j + half];
                x[j]          = u + v;
                x[j + half]   = u - v;
            }
        }
    }
    const float scale = 1.0f / sqrtf((float) order);
    for (int64_t i = 0; i < n; i++) {
        x[i] *= scale;
    }
}

static float kron_abs_max_ref(int64_t n, const float * x) {
    float max = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        const float v = fabsf(x[i]);
        max           = v > max ? v : max;
    }
    return max;
}

static void kron_clamp_ref(int64_t n, float limit, float * x) {
    for (int64_t i = 0; i < n; i++) {
        const float low = x[i] < -limit ? -limit : x[i];
        x[i]            = low > limit ? limit : low;
    }
}

const struct ggml_ext_kron_path ggml_ext_kron_generic = {
    "generic", kron_always, kron_product_ref, kron_hadamard_ref, kron_abs_max_ref, kron_clamp_ref,
};

const struct ggml_ext_kron_path * const ggml_ext_kron_paths[] = {
#ifdef GGML_EXT_X86
    &ggml_ext_kron_avx512,
    &ggml_ext_kron_avx2,
#endif
    &ggml_ext_kron_generic,
};
const int ggml_ext_kron_n_paths = (int) (sizeof(ggml_ext_kron_paths) / sizeof(ggml_ext_kron_paths[0]));

static const struct ggml_ext_kron_path * kron_path(bool use_ref) {
    const struct ggml_ext_kron_path * const * path = ggml_ext_kron_paths;
    while (!use_ref && !(*path)->available()) {
        path++;
    }
    return use_ref ? &ggml_ext_kron_generic : *path;
}

// The op as the threads see it: tokens rows of X[n1][n2].
struct kron_op {
    const struct ggml_tensor * x;
    const struct ggml_tensor * left;
    const struct ggml_tensor * right;
    int64_t                    n1, n2, tokens;
    int32_t                    hadamard;
    float                      clip;
};

static struct kron_op kron_describe(const struct ggml_tensor * dst) {
    struct ggml_ext_kron_params params;
    memcpy(&params, dst->op_params + 1, sizeof(params));
    struct kron_op op = { dst->src[0], dst->src[1], dst->src[2], 0, 0, ggml_nrows(dst), params.hadamard, params.clip };
    const int64_t  n  = dst->ne[0];
    if (op.left) {
        op.n1 = op.left->ne[0];
        op.n2 = n / op.n1;
    } else {
        op.n2 = op.right ? op.right->ne[0] : op.hadamard > 1 ? op.hadamard : 1;
        op.n1 = n / op.n2;
        // Nothing joins the rows of X: those of all tokens are one matrix.
        if (op.clip == 1.0f && ggml_is_contiguous(op.x)) {
            op.n1 *= op.tokens;
            op.tokens = 1;
        }
    }
    return op;
}

static const float * kron_token(const struct kron_op * op, int64_t token) {
    const struct ggml_tensor * x  = op->x;
    const int64_t              i1 = token % x->ne[1];
    const int64_t              i2 = token / x->ne[1] % x->ne[2];
    const int64_t              i3 = token / (x->ne[1] * x->ne[2]);
    return (const float *) ((const char *) x->data + i1 * x->nb[1] + i2 * x->nb[2] + i3 * x->nb[3]);
}

// Whole tokens per thread where that balances well, else every thread takes some rows of each token.
static bool kron_by_token(const struct kron_op * op, int n_threads) {
    return op->tokens % n_threads == 0 || op->tokens >= 8 * (int64_t) n_threads;
}

// Floats of scratch per thread: its columns of an F16 left as F32, and its rows of Z.
static int64_t kron_scratch(const struct kron_op * op) {
    const int64_t columns = op->left && op->left->type == GGML_TYPE_F16 ? op->n1 * op->n1 : 0;
    const int64_t z       = op->left && op->right ? op->n1 * op->n2 : 0;
    return GGML_PAD(columns + z, 16);
}

static size_t work_size(const struct ggml_tensor * dst, int n_tasks) {
    const struct kron_op op     = kron_describe(dst);
    const int64_t        maxima = op.clip < 1.0f ? op.tokens : 0;
    return sizeof(float) * n_tasks * (kron_scratch(&op) + maxima);
}

// Columns [row0, row1) of left, which make those rows of Z: element (i, a - row0) at i * *stride + a - row0.
static const float * kron_left_columns(const struct kron_op * op, int64_t row0, int64_t row1, float * scratch,
                                       int64_t * stride) {
    if (op->left->type == GGML_TYPE_F32) {
        *stride = op->n1;
        return (const float *) op->left->data + row0;
    }
    *stride = row1 - row0;
    for (int64_t i = 0; i < op->n1; i++) {
        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) op->left->data + i * op->n1 + row0, scratch + i * *stride, *stride);
    }
    return scratch;
}

static void compute(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct kron_op              op       = kron_describe(dst);
    const struct ggml_ext_kron_path * path     = kron_path(params->use_ref);
    const bool                        by_token = kron_by_token(&op, params->nth);
    const int64_t                     row0     = by_token ? 0 : op.n1 * params->ith / params->nth;
    const int64_t                     row1     = by_token ? op.n1 : op.n1 * (params->ith + 1) / params->nth;
    const int64_t                     rows     = row1 - row0;
    const int64_t                     share    = rows * op.n2;  // values of a token's result
    const int64_t                     first    = by_token ? params->ith : 0;
    const int64_t                     step     = by_token ? params->nth : 1;

    float *       scratch     = (float *) params->wdata + params->ith * kron_scratch(&op);
    int64_t       left_stride = 0;
    const float * left        = op.left ? kron_left_columns(&op, row0, row1, scratch, &left_stride) : NULL;
    float *       z_rows      = scratch + (left == scratch ? rows * op.n1 : 0);

    for (int64_t token = first; token < op.tokens; token += step) {
        const float * x = kron_token(&op, token);
        float *       y = (float *) dst->data + token * op.n1 * op.n2 + row0 * op.n2;
        const float * z = x + row0 * op.n2;
        if (op.left) {
            float * c = op.right ? z_rows : y;
            path->product(&(struct ggml_ext_kron_product) { rows, op.n2, op.n1, left, 1, left_stride, x, false, op.n2,
                                                            c, op.n2 });
            z = c;
        }
        if (op.right) {
            path->product(&(struct ggml_ext_kron_product) { rows, op.n2, op.n2, z, op.n2, 1, op.right->data,
                                                            op.right->type == GGML_TYPE_F16, op.n2, y, op.n2 });
        } else if (z != y) {
            memcpy(y, z, share * sizeof(float));
        }
        if (op.hadamard > 1) {
            path->hadamard(share, op.hadamard, y);
        }
    }
    if (op.clip == 1.0f) {
        return;
    }

    // maxima[thread][token]: of the thread's own rows, the other threads' follow after the barrier.
    float * maxima = (float *) params->wdata + params->nth * kron_scratch(&op);
    for (int64_t token = first; token < op.tokens; token += step) {
        const float * y                         = (const float *) dst->data + (token * op.n1 + row0) * op.n2;
        maxima[params->ith * op.tokens + token] = path->abs_max(share, y);
    }
    if (!by_token) {
        ggml_barrier(params->threadpool);
    }
    for (int64_t token = first; token < op.tokens; token += step) {
        float max = maxima[params->ith * op.tokens + token];
        for (int thread = 0; !by_token && thread < params->nth; thread++) {
            max = MAX(max, maxima[thread * op.tokens + token]);
        }
        path->clamp(share, op.clip * max, (float *) dst->data + (token * op.n1 + row0) * op.n2);
    }
}

const struct ggml_ext_cpu_op ggml_ext_cpu_kron = { compute, NULL, work_size };
