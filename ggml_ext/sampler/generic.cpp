#include "exp.h"
#include "kernels.h"

#include <cmath>
#include <cstring>

namespace ggml_ext_sampling {

namespace {

bool range(const float * l, int n, float * min, float * max) {
    float least = l[0];
    float most  = l[0];
    bool  nan   = false;
    for (int i = 0; i < n; i++) {
        least = l[i] < least ? l[i] : least;
        most  = l[i] > most ? l[i] : most;
        nan   = nan || std::isnan(l[i]);
    }
    *min = least;
    *max = most;
    return !nan;
}

double weights(const float * l, int n, const scale & s, double * w) {
    double lane[8] = {};
    for (int i = 0; i < n; i++) {
        w[i] = exp_scalar((double(l[i]) - s.max) * s.inv_t);
        lane[i % 8] += w[i];
    }
    return add_lanes(lane);
}

void buckets(const float * l, int n, const scale & s, const bucketing & b, uint16_t * out) {
    const double last = b.n_buckets - 1;
    for (int i = 0; i < n; i++) {
        const double key = std::fabs((double(l[i]) - s.max) * s.inv_t - b.center) * b.per_key;
        out[i]           = uint16_t(key < last ? key : last);
    }
}

int compact(const float * l, const int32_t * id, int32_t first, int n, float least, float * out_l, int32_t * out_id) {
    int count = 0;
    for (int i = 0; i < n; i++) {
        const float value = l[i];
        out_id[count]     = id ? id[i] : first + i;
        out_l[count]      = value;
        count += value >= least;
    }
    return count;
}

bool unpack(const int32_t * data, int32_t first, int n, float * l) {
    bool consecutive = true;
    for (int i = 0; i < n; i++) {
        consecutive = consecutive && data[3 * i] == first + i;
        std::memcpy(l + i, data + 3 * i + 1, sizeof(*l));
    }
    return consecutive;
}

}  // namespace

const kernels & kernels_generic() {
    static constexpr kernels table = { "generic", range, weights, buckets, compact, unpack };
    return table;
}

const kernels & kernels_best() {
    static const kernels & best = kernels_avx512() ? *kernels_avx512() :
                                  kernels_avx2()   ? *kernels_avx2() :
                                                     kernels_generic();
    return best;
}

}  // namespace ggml_ext_sampling
