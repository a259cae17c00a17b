// What codes take RoPE for against what ggml computes: both kinds of pairs, a part of a head, frequency factors, scaled
// positions, YaRN; read off the node, or off a view of it.

#include "check.h"
#include "ggml-cpu.h"
#include "ggml-ext.h"
#include "ggml.h"
#include "kv/rope.h"
#include "kv_code/cold.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

namespace {

constexpr int D = 64, HEADS = 2, TOKENS = 5;

struct Rope {
    int   n_rot = D, mode = GGML_ROPE_TYPE_NORMAL;
    float base = 10000, scale = 1, ext = 0, attn = 1;
    bool  factors = false;
};

void check(const Rope & r, const char * name) {
    std::mt19937                    random(1);
    std::normal_distribution<float> dist;
    ggml_context *                  ctx     = ggml_init({ 1 << 22, nullptr, false });
    ggml_tensor *                   x       = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, HEADS, TOKENS);
    ggml_tensor *                   pos     = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, TOKENS);
    ggml_tensor *                   factors = r.factors ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, r.n_rot / 2) : nullptr;
    const int32_t                   positions[TOKENS] = { 0, 1, 77, 4097, 20000 };
    std::memcpy(pos->data, positions, sizeof(positions));
    for (int64_t i = 0; i < ggml_nelements(x); ++i) {
        ((float *) x->data)[i] = dist(random);
    }
    for (int i = 0; factors && i < r.n_rot / 2; ++i) {
        ((float *) factors->data)[i] = 1 + 0.25f * float(i % 5);
    }
    ggml_tensor * y = ggml_rope_ext(ctx, x, pos, factors, r.n_rot, r.mode, 4096, r.base, r.scale, r.ext, r.attn, 32, 1);
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, y);
    ggml_graph_compute_with_ctx(ctx, graph, 1);

    double  frequencies[D / 2];
    int32_t adjacent = -1;
    float   length   = 0;
    CHECK(ggml_ext_rope_of(ggml_reshape_2d(ctx, y, D * HEADS, TOKENS), frequencies, &adjacent, &length) == r.n_rot,
          "%s: channels", name);
    CHECK(adjacent == (r.mode == GGML_ROPE_TYPE_NORMAL), "%s: pairs", name);
    const ggml_ext_kv_rope rope = ggml_ext_kv_rope_of(y);
    std::vector<float>     angles(size_t(2 * GGML_EXT_KV_TURN) * r.n_rot);
    ggml_ext_kv_angles(rope, angles.data());
    double worst = 0;
    for (int t = 0; t < TOKENS; ++t) {
        const float * low  = angles.data() + size_t(positions[t] % GGML_EXT_KV_TURN) * r.n_rot;
        const float * high = angles.data() + size_t(GGML_EXT_KV_TURN + positions[t] / GGML_EXT_KV_TURN) * r.n_rot;
        for (int head = 0; head < HEADS; ++head) {
            const float * from = (const float *) x->data + (t * HEADS + head) * D;
            const float * to   = (const float *) y->data + (t * HEADS + head) * D;
            for (int i = 0; i < r.n_rot / 2; ++i) {
                const int    a = adjacent ? 2 * i : i, b = adjacent ? 2 * i + 1 : i + r.n_rot / 2, n = r.n_rot / 2;
                const double c = double(low[i]) * high[i] - double(low[n + i]) * high[n + i];
                const double s = double(low[n + i]) * high[i] + double(low[i]) * high[n + i];
                worst          = std::fmax(worst, std::fabs(length * (from[a] * c - from[b] * s) - to[a]));
                worst          = std::fmax(worst, std::fabs(length * (from[a] * s + from[b] * c) - to[b]));
                CHECK(std::fabs(c - std::cos(positions[t] * frequencies[i])) < 1e-6, "%s: tables and angle", name);
            }
        }
    }
    // ggml multiplies angles up in float: at 20,000 radians its own are off by thousandths.
    CHECK(worst < 0.002, "%s: off by %g", name, worst);
    ggml_free(ctx);
}

void test_others() {
    ggml_context * ctx         = ggml_init({ 1 << 20, nullptr, false });
    ggml_tensor *  x           = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, HEADS, TOKENS);
    ggml_tensor *  pos         = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 4 * TOKENS);
    int            sections[4] = { 8, 8, 8, 8 };
    double         frequencies[D / 2];
    int32_t        adjacent;
    float          length;
    CHECK(ggml_ext_rope_of(ggml_scale(ctx, x, 2), frequencies, &adjacent, &length) == 0 && length == 1, "no RoPE");
    ggml_tensor * y =
        ggml_rope_multi(ctx, x, pos, nullptr, D, sections, GGML_ROPE_TYPE_MROPE, 4096, 1e4, 1, 0, 1, 32, 1);
    CHECK(ggml_ext_rope_of(y, frequencies, &adjacent, &length) == GGML_EXT_E_TYPE, "positions of several dimensions");
    ggml_free(ctx);
}

}  // namespace

int main() {
    check({}, "plain");
    Rope r;
    r.mode = GGML_ROPE_TYPE_NEOX;
    check(r, "pairs half a head apart");
    r.n_rot = 32, r.base = 500000;
    check(r, "half of a head, another base");
    r.factors = true;
    check(r, "factors");
    r       = {};
    r.scale = 0.25f;
    check(r, "scaled positions");
    r.ext = 1, r.attn = 1.1f;
    check(r, "YaRN");
    r.mode = GGML_ROPE_TYPE_NEOX, r.ext = 0.5f, r.factors = true;
    check(r, "half of YaRN, with factors");
    test_others();
    return check_done();
}
