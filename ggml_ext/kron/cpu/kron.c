// GGML_EXT_OP_KRON on the CPU: left product first, Z = left^T X, then Y = Z right. Both orders cost
// n (n1 + n2) multiply-adds; in this one a block of rows of Y depends on no other row of Z, so threads
// share one token by rows and synchronise only where the clip needs the whole token's maximum.

#include "kron.h"

#include "core/cpu/ext_op.h"
#include "core/cpu/generic.h"
#include "core/x86.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "kron/kron.h"
#include "simd-mappings.h"

#include <math.h>
#include <string.h>

// Plain loops, the reference of the fast paths.

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

static void kron_clamp_ref(int64_t n, float limit, float * x) {
    for (int64_t i = 0; i < n; i++) {
        const float low = x[i] < -limit ? -limit : x[i];
        x[i]            = low > limit ? limit : low;
    }
}

const struct ggml_ext_kron_path ggml_ext_kron_generic = {
    "generic", ggml_ext_always, kron_product_ref, kron_hadamard_ref, ggml_ext_abs_max_generic, kron_clamp_ref,
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

// Floats of scratch per thread: its rows of Z, then its columns of an F16 left as F32.
static int64_t kron_z_size(const struct kron_op * op) {
    return op->left && op->right ? op->n1 * op->n2 : 0;
}

static int64_t kron_scratch(const struct kron_op * op) {
    const int64_t columns = op->left && op->left->type == GGML_TYPE_F16 ? op->n1 * op->n1 : 0;
    return GGML_PAD(kron_z_size(op) + columns, 16);
}

static size_t kron_work_size(const struct ggml_tensor * dst, int n_tasks) {
    const struct kron_op op     = kron_describe(dst);
    const int64_t        maxima = op.clip < 1.0f ? op.tokens : 0;
    return sizeof(float) * n_tasks * (kron_scratch(&op) + maxima);
}

// One thread's part: some rows of X of the tokens first, first + step, ...
struct kron_share {
    int64_t       first, step, row0, rows;
    bool          whole;  // all rows
    const float * left;   // columns row0.. of left, which make those rows of Z: (i, a) at i * left_stride + a - row0
    int64_t       left_stride;
    float *       z;
};

static const float * kron_convert_columns(const struct kron_op * op, int64_t row0, int64_t rows, float * columns) {
    const ggml_fp16_t * left = op->left->data;
    for (int64_t i = 0; i < op->n1; i++) {
        ggml_cpu_fp16_to_fp32(left + i * op->n1 + row0, columns + i * rows, rows);
    }
    return columns;
}

// Whole tokens per thread where that balances well, else every thread takes some rows of each token.
static struct kron_share kron_share(const struct kron_op * op, const struct ggml_compute_params * params) {
    const int64_t     ith = params->ith, nth = params->nth;
    struct kron_share share = { ith, nth, 0, op->n1, true, NULL, op->n1, NULL };
    if (op->tokens % nth != 0 && op->tokens < 8 * nth) {
        const int64_t end = op->n1 * (ith + 1) / nth;

        share.first = 0;
        share.step  = 1;
        share.row0  = op->n1 * ith / nth;
        share.rows  = end - share.row0;
        share.whole = false;
    }
    share.z = (float *) params->wdata + ith * kron_scratch(op);
    if (op->left && op->left->type == GGML_TYPE_F16) {
        share.left_stride = share.rows;
        share.left        = kron_convert_columns(op, share.row0, share.rows, share.z + kron_z_size(op));
    } else if (op->left) {
        share.left = (const float *) op->left->data + share.row0;
    }
    return share;
}

static float * kron_result(const struct kron_op * op, const struct kron_share * share, struct ggml_tensor * dst,
                           int64_t token) {
    return (float *) dst->data + (token * op->n1 + share->row0) * op->n2;
}

// The share's rows of one token, not clipped.
static void kron_transform(const struct kron_op * op, const struct kron_share * share,
                           const struct ggml_ext_kron_path * path, const float * x, float * y) {
    const float * z = x + share->row0 * op->n2;
    if (op->left) {
        float * c = op->right ? share->z : y;
        path->product(&(struct ggml_ext_kron_product) { share->rows, op->n2, op->n1, share->left, 1, share->left_stride,
                                                        x, false, op->n2, c, op->n2 });
        z = c;
    }
    if (op->right) {
        path->product(&(struct ggml_ext_kron_product) { share->rows, op->n2, op->n2, z, op->n2, 1, op->right->data,
                                                        op->right->type == GGML_TYPE_F16, op->n2, y, op->n2 });
    } else if (z != y) {
        memcpy(y, z, share->rows * op->n2 * sizeof(float));
    }
    if (op->hadamard > 1) {
        path->hadamard(share->rows * op->n2, op->hadamard, y);
    }
}

static void kron_clip(const struct kron_op * op, const struct kron_share * share,
                      const struct ggml_ext_kron_path * path, const struct ggml_compute_params * params,
                      struct ggml_tensor * dst) {
    // maxima[thread][token]: each thread writes those of its own rows.
    float *       maxima = (float *) params->wdata + params->nth * kron_scratch(op);
    const int64_t n      = share->rows * op->n2;
    for (int64_t token = share->first; token < op->tokens; token += share->step) {
        maxima[params->ith * op->tokens + token] = path->abs_max(n, kron_result(op, share, dst, token));
    }
    if (!share->whole) {
        ggml_barrier(params->threadpool);
    }
    for (int64_t token = share->first; token < op->tokens; token += share->step) {
        float max = maxima[params->ith * op->tokens + token];
        for (int thread = 0; !share->whole && thread < params->nth; thread++) {
            max = MAX(max, maxima[thread * op->tokens + token]);
        }
        path->clamp(n, op->clip * max, kron_result(op, share, dst, token));
    }
}

static void kron_compute(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct kron_op              op    = kron_describe(dst);
    const struct kron_share           share = kron_share(&op, params);
    const struct ggml_ext_kron_path * path  = kron_path(params->use_ref);
    for (int64_t token = share.first; token < op.tokens; token += share.step) {
        kron_transform(&op, &share, path, kron_token(&op, token), kron_result(&op, &share, dst, token));
    }
    if (op.clip < 1.0f) {
        kron_clip(&op, &share, path, params, dst);
    }
}

const struct ggml_ext_cpu_op ggml_ext_cpu_kron = { kron_compute, NULL, kron_work_size };
