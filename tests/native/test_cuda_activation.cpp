// The int8 form of activations: the kernel in the emulator, bit by bit against the definition in activation.cuh; and
// which buffer is whose.
//
// Caught by: the codes (a wrong lane, row or group stride, rounding that is not to nearest even), the scales (their
// transposed place, a maximum over part of a group), special groups (NaN, Inf, zeros, values too small for a scale),
// poison after the results (too many blocks or groups), and the slots' cases (a stale or early reused buffer).

#include "activation/quantize.cuh"
#include "activation/slots.h"
#include "check.h"

#include <random>

namespace {

std::mt19937 random_bits(7);

struct problem {
    ggml_ext_activation_shape shape;
    std::vector<float>        x;      // with padding between rows
    size_t                    first;  // element where row 0 starts

    const float * row(int64_t r) const {
        const int64_t i1 = r % shape.ne1, i2 = r / shape.ne1 % shape.ne2, i3 = r / shape.ne1 / shape.ne2;
        return x.data() + first + (i1 * shape.nb1 + i2 * shape.nb2 + i3 * shape.nb3) / 4;
    }
};

// pad: floats between rows; swapped: dimensions 1 and 2 lie the other way round in memory.
problem make(int64_t k, uint32_t ne1, uint32_t ne2, uint32_t ne3, int pad, bool swapped, size_t first) {
    problem       p;
    const int64_t nb = (k + pad) * 4;
    p.shape          = {
        k, int64_t(ne1) * ne2 * ne3, ne1, ne2, swapped ? nb * ne2 : nb, swapped ? nb : nb * ne1, nb * ne1 * ne2
    };
    p.first = first;
    p.x.resize(first + (k + pad) * p.shape.n_rows);
    std::normal_distribution<float> normal;
    for (float & v : p.x) {
        v = normal(random_bits);
    }
    return p;
}

void special_groups(problem & p, int group) {
    const auto at = [&](int64_t row, int64_t i) -> float & { return const_cast<float &>(p.row(row)[i]); };
    for (int i = 0; i < group; i++) {
        at(0, i) = 0.0f;                                    // zeros
        at(1, i) = i % 2 ? 1e-37f : -1e-38f;                // too small for a scale
        at(2, i) = float(i % 255 - 127) * 0.5f + 0.25f;     // ties, where the scale is 1/2
        at(5, i) = std::ldexp(float(i - 127), 120) * 1.5f;  // near the largest float
    }
    at(2, 3)         = -63.5f;
    at(2, group - 1) = 63.25f;
    at(3, group / 3) = std::nanf("");
    at(4, group - 1) = -INFINITY;
}

int rounded(float v, float max) {
    return int(std::nearbyint(double(v) * double(127.0f / max)));
}

void check_row(const problem & p, int group, int64_t r, const int8_t * codes, const float * scales) {
    for (int64_t g = 0; g < p.shape.k / group; g++) {
        const float * v     = p.row(r) + group * g;
        const float   scale = scales[g * p.shape.n_rows + r];
        float         max   = 0.0f;
        bool          bad   = false;
        for (int i = 0; i < group; i++) {
            max = std::fmax(max, std::fabs(v[i]));
            bad = bad || !std::isfinite(v[i]);
        }
        if (bad) {
            CHECK(std::isnan(scale), "row %ld, group %ld: %g", (long) r, (long) g, scale);
            continue;
        }
        const bool small = max < 0x1p-119f;
        CHECK(small ? scale == 0.0f : std::fabs(scale - max / 127.0f) <= 1.5e-7f * scale, "row %ld, group %ld: %g",
              (long) r, (long) g, scale);
        for (int i = 0; i < group; i++) {
            const int want = small ? 0 : rounded(v[i], max);
            const int got  = codes[r * p.shape.k + group * g + i];
            CHECK(got == want, "row %ld, value %ld: %d, not %d", (long) r, (long) (group * g + i), got, want);
        }
    }
}

void check_kernel(problem p, bool aligned, int group = 256) {
    if (p.shape.n_rows >= 6) {
        special_groups(p, group);
    }
    const int64_t       n_groups = p.shape.k / group * p.shape.n_rows, n = p.shape.k * p.shape.n_rows;
    std::vector<int8_t> codes(n + 512, 99);
    std::vector<float>  scales(n_groups + 64, 99.0f);
    const char *        x    = reinterpret_cast<const char *>(p.x.data() + p.first);
    const auto          plan = ggml_ext_activation_plan(p.shape, group, x);
    CHECK(plan.aligned == aligned, "alignment of the rows");
    const auto kernel = ggml_ext_activation_kernel_of(group, plan.aligned);
    ggml_ext_cuda_launch_overlapped(kernel, dim3(plan.n_blocks), dim3(GGML_EXT_ACTIVATION_THREADS), 0, nullptr, x,
                                    codes.data(), scales.data(), p.shape);
    for (int64_t r = 0; r < p.shape.n_rows; r++) {
        check_row(p, group, r, codes.data(), scales.data());
    }
    for (int64_t i = n; i < n + 512; i++) {
        CHECK(codes[i] == 99, "a code past the end");
    }
    for (int64_t i = n_groups; i < n_groups + 64; i++) {
        CHECK(scales[i] == 99.0f, "a scale past the end");
    }
}

// --- slots ---

std::vector<size_t> sizes;  // asked for

void * allocate(size_t size) {
    sizes.push_back(size);
    return reinterpret_cast<void *>(sizes.size());
}

ggml_tensor tensor(enum ggml_op op, void * data, int64_t n_rows) {
    ggml_tensor t = {};
    t.op          = op;
    t.data        = data;
    t.ne[0]       = 256;
    t.ne[1]       = n_rows;
    t.ne[2] = t.ne[3] = 1;
    return t;
}

void check_slots() {
    ggml_ext_activation_slots slots;
    char                      memory[8];
    ggml_tensor               t[4];
    void *                    buffers[4];
    for (int i = 0; i < 4; i++) {
        t[i]            = tensor(GGML_OP_MUL, memory + i, 1);
        const auto slot = slots.find(&t[i], 256, 1000, allocate);
        buffers[i]      = slot.buffer;
        CHECK(!slot.filled, "a tensor of which nothing is known");
    }
    CHECK(buffers[0] != buffers[1] && buffers[0] != buffers[2] && buffers[1] != buffers[2], "valid for two more calls");
    CHECK(slots.find(&t[1], 256, 1000, allocate).filled, "found again");
    CHECK(!slots.find(&t[0], 256, 1000, allocate).filled, "its buffer was given away");
    // The call for t[1] above counts as a use: t[2]'s buffer was the oldest.
    CHECK(slots.find(&t[1], 256, 1000, allocate).filled && !slots.find(&t[2], 256, 1000, allocate).filled,
          "the oldest goes first");
    CHECK(sizes.size() == 3, "no buffer is allocated anew");

    ggml_tensor view = tensor(GGML_OP_RESHAPE, memory + 1, 1);
    view.src[0]      = &t[1];
    CHECK(slots.find(&view, 256, 1000, allocate).filled, "a reshape that shows the same rows");
    view.ne[1] = 2;
    CHECK(!slots.find(&view, 256, 1000, allocate).filled, "another shape");
    ggml_tensor in_place = tensor(GGML_OP_ADD, memory + 1, 1);  // result in t[1]'s memory
    in_place.view_src    = &t[1];
    in_place.src[0]      = &t[1];
    CHECK(!slots.find(&in_place, 256, 1000, allocate).filled, "an op in place has another result");
    ggml_tensor other = t[1];
    CHECK(!slots.find(&other, 256, 1000, allocate).filled, "another tensor in the same memory");

    CHECK(slots.find(&other, 256, 1000, allocate).filled, "found before the next graph");
    CHECK(!slots.find(&other, 64, 1000, allocate).filled, "other groups of the same values");
    slots.forget();
    CHECK(!slots.find(&other, 256, 1000, allocate).filled, "the next graph computes it again");
    ggml_tensor leaf = tensor(GGML_OP_NONE, memory, 1);
    CHECK(!slots.find(&leaf, 256, 1000, allocate).filled && !slots.find(&leaf, 256, 1000, allocate).filled,
          "a leaf is never known");
}

void check_growth() {
    ggml_ext_activation_slots slots;
    sizes.clear();
    size_t largest = 0, total = 0;
    for (size_t size = 1000; size < 1000000; size += 1000) {
        const ggml_tensor leaf = tensor(GGML_OP_NONE, nullptr, 1);
        slots.find(&leaf, 256, size, allocate);
        CHECK(sizes.back() >= size || slots.allocated().size() == sizes.size(), "large enough");
        largest = size;
    }
    for (size_t size : sizes) {
        total += size;
    }
    CHECK(sizes.size() <= 3 * 11 && total <= 3 * 4 * largest, "%zu allocations, %zu bytes", sizes.size(), total);
    CHECK(slots.allocated().size() == sizes.size(), "all of them are known, to be freed");
}

}  // namespace

int main() {
    for (uint32_t seed : { 1u, 2u }) {
        ggml_ext_emulator::seed(seed);
        check_kernel(make(256, 1, 1, 1, 0, false, 0), true);
        check_kernel(make(768, 1, 1, 1, 0, false, 0), true);
        check_kernel(make(512, 7, 3, 2, 4, true, 0), true);
        check_kernel(make(256, 9, 1, 3, 3, false, 0), false);
        check_kernel(make(768, 3, 5, 1, 0, true, 1), false);
        check_kernel(make(64, 1, 1, 1, 0, false, 0), true, 64);
        check_kernel(make(576, 3, 5, 1, 4, true, 0), true, 64);
        check_kernel(make(192, 9, 1, 3, 3, false, 1), false, 64);
    }
    check_slots();
    check_growth();
    return check_done();
}
