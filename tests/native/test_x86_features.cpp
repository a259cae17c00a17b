// What CPUID says, against the compiler's own detection where that knows the name.

#include "check.h"
#include "core/x86.h"

namespace {

#ifdef GGML_EXT_X86

void test_features() {
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
#    if !defined(__clang__) && __GNUC__ >= 11
    avx2 = avx2 && __builtin_cpu_supports("f16c");
    CHECK(ggml_ext_has_avx_vnni() == (avx2 && __builtin_cpu_supports("avxvnni")), "avx-vnni");
#    endif
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    for (int i = 0; i < 2; i++) {  // asked, and remembered
        CHECK(ggml_ext_has_avx2() == avx2, "avx2");
        CHECK(ggml_ext_has_avx512() == avx512, "avx512");
        CHECK(ggml_ext_has_avx512_vnni() == vnni, "avx512 vnni");
        CHECK(ggml_ext_has_avx512_vbmi() == (vnni && __builtin_cpu_supports("avx512vbmi")), "avx512 vbmi");
    }
    std::printf("avx2 %d, avx-vnni %d, avx512 %d, vnni %d, vbmi %d\n", ggml_ext_has_avx2(), ggml_ext_has_avx_vnni(),
                ggml_ext_has_avx512(), ggml_ext_has_avx512_vnni(), ggml_ext_has_avx512_vbmi());
}

#else

void test_features() {
    std::printf("not x86-64\n");
}

#endif

}  // namespace

int main() {
    test_features();
    return check_done();
}
