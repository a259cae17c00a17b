// The CUDA kernels of GGML_EXT_OP_KRON in the emulator, as the launcher would run them, against sums in double.
//
// The tensor-core kernel: FlatQuant's shapes, orders that are no multiples of 16, one factor, Hadamard, clip, rows that
// are not adjacent, more tokens than blocks (what one token leaves behind must not reach the next), values far outside
// f16's range, NaN and Inf. Poison in the results and in shared memory (the emulator's NaNs) shows what is not written.
// The int8 form is compared bit by bit with the definition, from the F32 results of the same launch.
// The general kernels: the same sums, on any order.

#include "check.h"
#include "kron/general.cuh"
#include "kron/kron.cuh"

#include <random>

namespace {

std::mt19937 random_bits(11);

#ifdef __SANITIZE_ADDRESS__
constexpr bool slow = true;
#else
constexpr bool slow = false;
#endif

const ggml_ext_kron_kind none = GGML_EXT_KRON_NONE, f32 = GGML_EXT_KRON_F32, f16 = GGML_EXT_KRON_F16,
                         hadamard = GGML_EXT_KRON_HADAMARD;

struct factor {
    std::vector<float>   values;  // as the kernel sees them
    std::vector<half>    halves;
    ggml_ext_kron_factor f = {};

    factor(ggml_ext_kron_kind kind, int order, float magnitude) {
        f.kind = kind;
        if (kind == none) {
            return;
        }
        f.order = order;
        std::normal_distribution<float> normal(0.0f, magnitude / std::sqrt(float(order)));
        values.resize(order * order);
        for (int i = 0; i < order * order; i++) {
            values[i] = kind == hadamard ?
                            (__builtin_popcount(i / order & i % order) % 2 ? -1.0f : 1.0f) / std::sqrt(float(order)) :
                            normal(random_bits);
            if (kind == f16) {
                halves.push_back(__float2half(values[i]));
                values[i] = __half2float(halves.back());
            }
        }
        f.data = kind == f16 ? (const void *) halves.data() : kind == f32 ? values.data() : nullptr;
    }
};

struct options {
    float clip      = 1.0f;
    float magnitude = 1.0f;   // of x
    float factors   = 1.0f;   // of the factors
    int   pad       = 0;      // floats between rows
    bool  quantized = false;  // also the int8 form
    bool  special   = false;  // NaN and Inf in two of the tokens
    int   terms     = 3;
    int   n_sms     = 2;
};

struct problem {
    factor              left, right;
    ggml_ext_kron_shape shape;
    std::vector<float>  x;
    std::vector<double> want;  // [token][n]
    options             o;

    problem(int n1, int n2, uint32_t ne1, uint32_t ne2, uint32_t ne3, ggml_ext_kron_kind l, ggml_ext_kron_kind r,
            options o) : left(l, n1, o.factors), right(r, n2, o.factors), o(o) {
        const int64_t nb = (n1 * n2 + o.pad) * 4;
        // Dimensions 1 and 2 lie swapped in memory.
        shape            = { n1, n2, int64_t(ne1) * ne2 * ne3, ne1, ne2, nb * ne2, nb, nb * ne1 * ne2, o.clip };
        std::normal_distribution<float> normal(0.0f, o.magnitude);
        x.resize(nb / 4 * shape.n_tokens);
        for (float & v : x) {
            v = normal(random_bits);
        }
        if (o.special) {
            token(0)[5]               = std::nanf("");
            token(2)[n1 * n2 / 2 + 1] = INFINITY;
        }
        for (int64_t t = 0; t < shape.n_tokens; t++) {
            reference(token(t));
        }
    }

    float * token(int64_t t) {
        const int64_t i1 = t % shape.ne1, i2 = t / shape.ne1 % shape.ne2, i3 = t / shape.ne1 / shape.ne2;
        return x.data() + (i1 * shape.nb1 + i2 * shape.nb2 + i3 * shape.nb3) / 4;
    }

    void reference(const float * v) {
        const int           n1 = shape.n1, n2 = shape.n2;
        std::vector<double> z(v, v + n1 * n2), y(n1 * n2);
        if (!left.values.empty()) {
            std::fill(z.begin(), z.end(), 0.0);
            for (int i = 0; i < n1; i++) {
                for (int a = 0; a < n1; a++) {
                    for (int j = 0; j < n2; j++) {
                        z[a * n2 + j] += double(left.values[i * n1 + a]) * v[i * n2 + j];
                    }
                }
            }
        }
        y = z;
        if (!right.values.empty()) {
            std::fill(y.begin(), y.end(), 0.0);
            for (int a = 0; a < n1; a++) {
                for (int j = 0; j < n2; j++) {
                    for (int b = 0; b < n2; b++) {
                        y[a * n2 + b] += z[a * n2 + j] * right.values[j * n2 + b];
                    }
                }
            }
        }
        double max = 0.0;
        for (double d : y) {
            max = d == d ? std::fmax(max, std::fabs(d)) : max;
        }
        for (double d : y) {
            const double limit = o.clip * max;
            want.push_back(o.clip == 1.0f || d != d ? d : d < -limit ? -limit : d > limit ? limit : d);
        }
    }
};

// Error of all tokens that have none of NaN and Inf, relative to what is wanted, squared; the others must have NaN or Inf
// in the same places.
double error(const problem & p, const std::vector<float> & y) {
    double    error = 0.0, norm = 0.0;
    const int n = p.shape.n1 * p.shape.n2;
    for (int64_t i = 0; i < p.shape.n_tokens * n; i++) {
        if (!std::isfinite(p.want[i])) {
            CHECK(!std::isfinite(y[i]), "token %ld, value %ld: %g, not %g", (long) (i / n), (long) (i % n), y[i],
                  p.want[i]);
            continue;
        }
        CHECK(std::isfinite(y[i]), "token %ld, value %ld: %g, not %g", (long) (i / n), (long) (i % n), y[i], p.want[i]);
        error += (y[i] - p.want[i]) * (y[i] - p.want[i]);
        norm += p.want[i] * p.want[i];
    }
    return norm > 0.0 ? error / norm : error;
}

void check_codes(const problem & p, const std::vector<float> & y, const int8_t * codes, const float * scales) {
    const int n = p.shape.n1 * p.shape.n2;
    for (int64_t t = 0; t < p.shape.n_tokens; t++) {
        for (int g = 0; g < n / 256; g++) {
            const float * v     = y.data() + t * n + 256 * g;
            const float   scale = scales[g * p.shape.n_tokens + t];
            float         max   = 0.0f;
            bool          bad   = false;
            for (int i = 0; i < 256; i++) {
                max = std::fmax(max, std::fabs(v[i]));
                bad = bad || !std::isfinite(v[i]);
            }
            if (bad) {
                CHECK(std::isnan(scale), "token %ld, group %d: scale %g", (long) t, g, scale);
                continue;
            }
            CHECK(std::fabs(scale - max / 127.0f) <= 1.5e-7f * scale, "token %ld, group %d: scale %g", (long) t, g,
                  scale);
            for (int i = 0; i < 256; i++) {
                const int want = max > 0.0f ? int(std::nearbyint(double(v[i]) * double(127.0f / max))) : 0;
                const int got  = codes[t * n + 256 * g + i];
                CHECK(got == want, "token %ld, value %d: code %d, not %d", (long) t, 256 * g + i, got, want);
            }
        }
    }
}

template <int TERMS> void launch(const ggml_ext_kron_args & args, const ggml_ext_kron_plan & plan) {
    const auto kernel = plan.n_tiles == 2 ? ggml_ext_kron_kernel<TERMS, 2, 1> :
                        plan.units == 1   ? ggml_ext_kron_kernel<TERMS, 8, 1> :
                                            ggml_ext_kron_kernel<TERMS, 8, 2>;
    ggml_ext_cuda_launch_overlapped(kernel, dim3(plan.n_blocks), dim3(32 * plan.n_warps), plan.shared_bytes, nullptr,
                                    args);
}

// As kron.cu launches it, on a device of n_sms.
void check_tensor_cores(const char * name, problem p) {
    const int n = p.shape.n1 * p.shape.n2;
    auto plan   = ggml_ext_kron_plan_of(p.shape, p.left.f.kind, p.right.f.kind, p.o.terms, p.o.pad % 4 == 0, 227 * 1024,
                                        p.o.n_sms);
    CHECK(plan.tensor_cores, "%s: on tensor cores", name);
    if (!plan.tensor_cores) {
        return;
    }
    CHECK(ggml_ext_kron_units(p.shape.n1, p.shape.n2, p.left.f.kind != none, p.right.f.kind != none, plan.n_tiles) <=
              plan.n_warps * plan.units,
          "%s: a warp for every unit", name);
    plan.n_blocks = std::min(plan.n_blocks, unsigned(p.shape.n_tokens + 1) / 2);  // a block takes several tokens
    std::vector<float>  y(p.shape.n_tokens * n + 64, std::nanf(""));
    std::vector<int8_t> codes(p.o.quantized ? p.shape.n_tokens * n + 64 : 0, 99);
    std::vector<float>  scales(p.o.quantized ? p.shape.n_tokens * n / 256 : 0, 99.0f);
    ggml_ext_kron_args  args = { p.shape,  p.left.f, p.right.f, true, reinterpret_cast<const char *>(p.x.data()),
                                 y.data(), nullptr,  nullptr };
    if (p.o.quantized) {
        args.codes  = codes.data();
        args.scales = scales.data();
    }
    p.o.terms == 1 ? launch<1>(args, plan) : launch<3>(args, plan);
    const double nmse  = error(p, y);
    const double limit = p.o.terms == 1 ? 4e-7 : 2e-12;
    CHECK(nmse < limit, "%s: squared error %g", name, nmse);
    std::printf("%-28s tiles %d, units %d, %2d warps, %3zu KiB, %u blocks: squared error %.2g\n", name, plan.n_tiles,
                plan.units, plan.n_warps, plan.shared_bytes / 1024, plan.n_blocks, nmse);
    for (int64_t i = p.shape.n_tokens * n; i < int64_t(y.size()); i++) {
        CHECK(std::isnan(y[i]), "%s: past the end", name);
    }
    if (p.o.quantized) {
        check_codes(p, y, codes.data(), scales.data());
        CHECK(codes[p.shape.n_tokens * n] == 99, "%s: a code past the end", name);
        // Without the F32 result the int8 form is the same.
        std::vector<int8_t> alone(codes.size(), 77);
        args.y     = nullptr;
        args.codes = alone.data();
        p.o.terms == 1 ? launch<1>(args, plan) : launch<3>(args, plan);
        alone.resize(p.shape.n_tokens * n);
        CHECK(std::equal(alone.begin(), alone.end(), codes.begin()), "%s: the int8 form alone", name);
    }
}

options with(options o, void (*change)(options &)) {
    change(o);
    return o;
}

void check_tensor_core_kernels() {
    const options plain;
    options       fused;
    fused.quantized = true;
    fused.terms     = 1;
    options clipped = fused;
    clipped.clip    = 0.5f;
    options special = fused;
    special.special = true;

    check_tensor_cores("64 x 64, 3 terms", problem(64, 64, 1, 2, 1, f32, f32, plain));
    check_tensor_cores("64 x 64, f16 factors", problem(64, 64, 2, 1, 2, f16, f16, plain));
    check_tensor_cores("64 x 64, few tokens", problem(64, 64, 2, 1, 1, f32, f32, clipped));
    check_tensor_cores("64 x 64, many tokens", problem(64, 64, 5, 3, 1, f32, f16, clipped));
    check_tensor_cores("20 x 36, padding", problem(20, 36, 5, 1, 1, f32, f32, with(plain, [](options & o) {
                                                       o.pad  = 4;
                                                       o.clip = 0.7f;
                                                   })));
    check_tensor_cores("28 x 64, padding, fused", problem(28, 64, 3, 2, 1, f32, f32, special));
    check_tensor_cores("56 x 64, special, 3 terms",
                       problem(56, 64, 7, 1, 1, f32, f32, with(plain, [](options & o) { o.special = true; })));
    check_tensor_cores("32 (x) 128 heads", problem(32, 128, 3, 1, 1, f32, none, clipped));
    check_tensor_cores("32 (x) 128 heads, special", problem(32, 128, 5, 1, 1, f16, none, special));
    check_tensor_cores("16 x 256 right only", problem(16, 256, 2, 1, 1, none, f32, fused));
    check_tensor_cores("16 x Hadamard 128", problem(16, 128, 2, 1, 1, f16, hadamard, fused));
    check_tensor_cores("8 x Hadamard 32 alone", problem(8, 32, 4, 1, 1, none, hadamard, plain));
    for (float magnitude : { 1e-30f, 3e-4f, 1e6f, 1e15f }) {
        check_tensor_cores("64 x 32, magnitude", problem(64, 32, 3, 1, 1, f32, f32, with(plain, [](options &) {})));
        options o   = plain;
        o.magnitude = magnitude;
        o.factors   = magnitude > 1.0f ? 1e-6f : 1e6f;
        check_tensor_cores("64 x 32, magnitude", problem(64, 32, 3, 1, 1, f32, f32, o));
    }
    if (!slow) {
        check_tensor_cores("112 x 128, fused", problem(112, 128, 3, 1, 1, f32, f32, clipped));
        check_tensor_cores("112 x 128, 3 terms", problem(112, 128, 1, 1, 1, f32, f32, plain));
        check_tensor_cores("148 x 128, fused", problem(148, 128, 2, 1, 1, f32, f32, fused));
    }
}

// --- general kernels ---

template <typename A, typename B>
void product(const void * a, const void * b, float * c, const ggml_ext_kron_product & p,
             const ggml_ext_kron_shape & s) {
    ggml_ext_cuda_launch(ggml_ext_kron_product_kernel<A, B>, dim3(unsigned(ggml_ext_kron_product_blocks(p))),
                         dim3(GGML_EXT_KRON_FLAT), 0, nullptr, (const A *) a, (const B *) b, c, p, s);
}

void hadamard_kernel(const void * x, float * y, int order, const ggml_ext_kron_shape & s) {
    const int64_t n     = int64_t(s.n1) * s.n2;
    const int     chunk = ggml_ext_kron_chunk(order);
    ggml_ext_cuda_launch(ggml_ext_kron_hadamard_kernel, dim3(unsigned((n + chunk - 1) / chunk * s.n_tokens)),
                         dim3(GGML_EXT_KRON_FLAT), chunk * sizeof(float), nullptr, (const char *) x, y, order, n, s);
}

void check_general(const char * name, problem p) {
    const ggml_ext_kron_shape & s = p.shape;
    const int                   n = s.n1 * s.n2;
    std::vector<float>          z(s.n_tokens * n, std::nanf("")), y(s.n_tokens * n, std::nanf(""));
    const bool                  left = p.left.f.kind != none, matrix = p.right.f.kind == f32 || p.right.f.kind == f16;
    if (left) {
        const auto run = p.left.f.kind == f16 ? product<half, float> : product<float, float>;
        run(p.left.f.data, p.x.data(), matrix ? z.data() : y.data(), ggml_ext_kron_left_product(s), s);
    }
    if (matrix) {
        const auto run = p.right.f.kind == f16 ? product<float, half> : product<float, float>;
        run(left ? z.data() : p.x.data(), p.right.f.data, y.data(), ggml_ext_kron_right_product(s, !left), s);
    } else if (!left) {
        hadamard_kernel(p.x.data(), y.data(), p.right.f.kind == hadamard ? s.n2 : 1, s);
    } else if (p.right.f.kind == hadamard) {
        hadamard_kernel(y.data(), y.data(), s.n2, ggml_ext_kron_result_shape(s));
    }
    if (s.clip < 1.0f) {
        ggml_ext_cuda_launch(ggml_ext_kron_clip_kernel, dim3(unsigned(s.n_tokens)), dim3(GGML_EXT_KRON_FLAT), 0,
                             nullptr, y.data(), int64_t(n), s.clip);
    }
    const double nmse = error(p, y);
    CHECK(nmse < 1e-12, "%s: squared error %g", name, nmse);
}

void check_general_kernels() {
    options o;
    o.pad  = 3;
    o.clip = 0.6f;
    check_general("7 x 33", problem(7, 33, 3, 5, 2, f32, f16, o));
    check_general("70 x 65, f16 left", problem(70, 65, 2, 1, 1, f16, f32, o));
    check_general("left only", problem(33, 6, 2, 2, 1, f32, none, o));
    check_general("clip only", problem(33, 6, 2, 2, 1, none, none, o));
    check_general("left and Hadamard", problem(5, 64, 9, 2, 1, f16, hadamard, o));
    check_general("small Hadamard", problem(3, 4, 2, 2, 1, none, hadamard, o));
    o.special = true;
    check_general("special", problem(9, 21, 5, 1, 1, f32, f32, o));
    check_general("right only", problem(3, 17, 4, 1, 1, none, f32, options()));
    if (!slow) {
        check_general("Hadamard of 4096", problem(1, 4096, 2, 1, 1, none, hadamard, options()));
    }
}

}  // namespace

int main() {
    check_tensor_core_kernels();
    for (uint32_t seed : { 2u, 3u }) {
        ggml_ext_emulator::seed(seed);
        check_general_kernels();
        options o;
        o.quantized = true;
        o.clip      = 0.5f;
        check_tensor_cores("48 x 32, another order", problem(48, 32, 5, 1, 1, f32, f16, o));
    }
    return check_done();
}
