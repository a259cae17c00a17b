// Relative error of attention per cache type and mode, without and with outlier channels in K: the table of
// docs/attention.md. "own": against attention in double over the cache as it is; "total": over K and V before they
// were rounded for the cache. Root mean square over the result, 16 queries over 1024 positions, 8 heads of 128 that
// share 2 of K and V, normal q, K and V.

#include "attention_reference.h"
#include "ggml-ext.h"

using namespace attention;

int main() {
    ggml_cpu_init();
    const ggml_type types[]     = { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_F16 };
    const Outliers  outliers[]  = { NONE, SCALED, SHIFTED };
    const char *    quantised[] = { "off", "half", "full" };
    const char *    f16[]       = { "off", "half/f16", "half/f16/smooth", "full/f16", "full/f16/smooth" };
    std::printf("| cache | GGML_EXT_ATTN | plain, own | total | x 50, own | total | + 50, own | total |\n"
                "|---|---|---|---|---|---|---|---|\n");
    for (ggml_type type : types) {
        const bool   is_f16 = type == GGML_TYPE_F16;
        const size_t n      = is_f16 ? std::size(f16) : std::size(quantised);
        for (size_t m = 0; m < n; m++) {
            const char * mode = is_f16 ? f16[m] : quantised[m];
            if (ggml_ext_attention_set(mode) != 0) {
                std::fprintf(stderr, "%s: unknown mode\n", mode);
                return 1;
            }
            std::printf("| %s | %s |", ggml_type_name(type), mode);
            for (Outliers o : outliers) {
                Case c     = { 128, 128, 1024, 16, 2, 4, type, type };
                c.outliers = o;
                Problem    problem(c);
                const auto got = problem.compute(1);
                c.k = c.v = GGML_TYPE_F32;
                std::printf(" %.5f | %.5f |", relative_error(got, reference(problem)),
                            relative_error(got, reference(Problem(c))));
            }
            std::printf("\n");
        }
    }
    return 0;
}
