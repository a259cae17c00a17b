#include "candidates.h"

#include <cfloat>
#include <limits>

namespace ggml_ext_sampling {

void candidates::begin(const float * logits, int32_t n_vocab) {
    l   = logits;
    ids = nullptr;
    n   = n_vocab;
    t   = 1;
    begin_measure();
}

bool candidates::drop_infinite() {
    if (std::isinf(most)) {
        return false;
    }
    if (std::isinf(least)) {
        keep_from(-FLT_MAX);
    }
    return true;
}

void candidates::begin_measure() {
    maxima.resize(size_t((n + block_size - 1) / block_size));
    least    = std::numeric_limits<float>::infinity();
    most     = -least;
    measured = true;
}

bool candidates::measure_block(int32_t first) {
    float      low;
    float &    high    = maxima[size_t(first / block_size)];
    const bool numbers = k.range(l + first, std::min(block_size, n - first), &low, &high);
    least              = std::min(least, low);
    most               = std::max(most, high);
    return numbers;
}

void candidates::measure() {
    begin_measure();
    for (int32_t i = 0; i < n; i += block_size) {
        measure_block(i);
    }
}

const std::vector<float> & candidates::block_maxima() {
    if (!measured) {
        measure();
    }
    return maxima;
}

void candidates::reserve() {
    const size_t room = size_t(n) + compact_slack;
    if (own_l.size() < room) {
        // Never while the candidates are in these vectors: then there is room for them.
        own_l.resize(room);
        own_ids.resize(room);
    }
}

void candidates::own(int32_t count) {
    l        = own_l.data();
    ids      = own_ids.data();
    n        = count;
    measured = false;
}

void candidates::keep_from(float value) {
    reserve();
    int32_t count = 0;
    for (int32_t i = 0; i < n; i += block_size) {
        if (!measured || maxima[size_t(i / block_size)] >= value) {
            count += k.compact(l + i, ids ? ids + i : nullptr, i, std::min(block_size, n - i), value,
                               own_l.data() + count, own_ids.data() + count);
        }
    }
    own(count);
    least = value;
}

void candidates::keep_largest() {
    keep_from(most);
    n = 1;
}

}  // namespace ggml_ext_sampling
