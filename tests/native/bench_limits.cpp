// Two limits of this machine's processor, which bench-cpu holds llama.cpp's speed against: the rate at which
// all threads read memory, and the int8 multiply-adds per second that they reach with every operand in a
// register, by the widest instructions present. docs/performance.md explains the figures.
//
//     bench_limits [--json] [--threads N] [--passes N] [--mib N]

#include "core/x86.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#if defined(__clang__)
#    define COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#    define COMPILER "gcc " __VERSION__
#else
#    define COMPILER "unknown"
#endif

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds from the moment that all threads are ready until the last one is done. work(i) runs in thread i.
template <typename F> double together(int n_threads, F work) {
    std::atomic<int>         ready{ 0 };
    std::atomic<bool>        go{ false };
    std::vector<std::thread> threads;
    for (int i = 0; i < n_threads; i++) {
        threads.emplace_back([&, i] {
            ready++;
            while (!go) {
            }
            work(i);
        });
    }
    while (ready < n_threads) {
        std::this_thread::yield();
    }
    const double start = now();
    go                 = true;
    for (std::thread & t : threads) {
        t.join();
    }
    return now() - start;
}

// --- reading memory ---

// Sum of n bytes at p, n a multiple of 256: the result keeps the loads.
uint64_t read_plain(const uint8_t * p, size_t n) {
    uint64_t sum[4] = { 0, 0, 0, 0 };
    for (size_t i = 0; i < n; i += sizeof(sum)) {
        uint64_t x[4];
        std::memcpy(x, p + i, sizeof(x));
        for (int j = 0; j < 4; j++) {
            sum[j] += x[j];
        }
    }
    return sum[0] + sum[1] + sum[2] + sum[3];
}

#ifdef GGML_EXT_X86
__attribute__((target("avx2"))) uint64_t read_avx2(const uint8_t * p, size_t n) {
    __m256i     sum[8];
#    pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        sum[j] = _mm256_setzero_si256();
    }
    for (size_t i = 0; i < n; i += 256) {
#    pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            sum[j] = _mm256_xor_si256(sum[j], _mm256_loadu_si256((const __m256i *) (p + i) + j));
        }
    }
#    pragma GCC unroll 7
    for (int j = 1; j < 8; j++) {
        sum[0] = _mm256_xor_si256(sum[0], sum[j]);
    }
    return (uint64_t) (sum[0][0] ^ sum[0][1] ^ sum[0][2] ^ sum[0][3]);
}
#endif

// --- int8 multiply-adds ---

// Each loop runs n times over CHAINS accumulators, enough to cover the latency of two units, and returns
// something that depends on all of them. The empty asm statements hide values from the optimiser: in the
// operands, so that no product can be taken out of the loop; in the accumulators, so that equal chains are
// not computed once. Every loop over accumulators has to be unrolled for them to be registers.
constexpr int CHAINS = 12;

int64_t macs_scalar(int64_t n) {
    int32_t acc[4] = { 0, 0, 0, 0 };
    int8_t  a = 3, b = 5;
    for (int64_t k = 0; k < n; k++) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            __asm__ volatile("" : "+r"(a), "+r"(b));
            acc[j] += a * b;
        }
    }
    return (int64_t) acc[0] + acc[1] + acc[2] + acc[3];
}

#ifdef GGML_EXT_X86
#    define EACH_CHAIN _Pragma("GCC unroll 12") for (int j = 0; j < CHAINS; j++)

// A function macs_NAME for TARGET: acc, a and b are vectors of TYPE, SET1 fills one with a byte, STEP is the
// new value of acc[j].
#    define MACS(NAME, TARGET, TYPE, SET1, STEP)                         \
        __attribute__((target(TARGET))) int64_t macs_##NAME(int64_t n) { \
            TYPE acc[CHAINS], a = SET1(3), b = SET1(5);                  \
            EACH_CHAIN {                                                 \
                acc[j] = SET1(0);                                        \
                __asm__ volatile("" : "+v"(acc[j]));                     \
            }                                                            \
            for (int64_t k = 0; k < n; k++) {                            \
                EACH_CHAIN {                                             \
                    __asm__ volatile("" : "+v"(a), "+v"(b));             \
                    acc[j] = STEP;                                       \
                }                                                        \
            }                                                            \
            int64_t sum = 0;                                             \
            EACH_CHAIN {                                                 \
                sum += acc[j][0];                                        \
            }                                                            \
            return sum;                                                  \
        }

MACS(avx2, "avx2", __m256i, _mm256_set1_epi8,
     _mm256_add_epi32(acc[j], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1))))
MACS(vnni256, "avx512f,avx512vl,avx512vnni", __m256i, _mm256_set1_epi8, _mm256_dpbusd_epi32(acc[j], a, b))
MACS(vnni512, "avx512f,avx512vnni", __m512i, _mm512_set1_epi8, _mm512_dpbusd_epi32(acc[j], a, b))
#    ifdef GGML_EXT_AVX_VNNI
MACS(avxvnni, "avxvnni", __m256i, _mm256_set1_epi8, _mm256_dpbusd_avx_epi32(acc[j], a, b))
#    endif
#    undef MACS
#    undef EACH_CHAIN
#endif

struct MacPath {
    const char * name;
    int64_t      macs;  // per turn of the loop
    int64_t (*run)(int64_t n);
};

// What this processor can run; the first is the yardstick unless another is faster.
std::vector<MacPath> mac_paths() {
    std::vector<MacPath> paths;
#ifdef GGML_EXT_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni")) {
        paths.push_back({ "vpdpbusd-512", 64 * CHAINS, macs_vnni512 });
        if (__builtin_cpu_supports("avx512vl")) {
            paths.push_back({ "vpdpbusd-256", 32 * CHAINS, macs_vnni256 });
        }
    }
#    ifdef GGML_EXT_AVX_VNNI
    if (ggml_ext_has_avx_vnni()) {
        paths.push_back({ "vpdpbusd-avx", 32 * CHAINS, macs_avxvnni });
    }
#    endif
    if (__builtin_cpu_supports("avx2")) {
        paths.push_back({ "vpmaddubsw-256", 32 * CHAINS, macs_avx2 });
    }
#endif
    paths.push_back({ "scalar", 4, macs_scalar });
    return paths;
}

volatile uint64_t keep;

// Multiply-adds per second of all threads.
double mac_rate(const MacPath & path, int n_threads, int64_t turns) {
    const double seconds = together(n_threads, [&](int) { keep = (uint64_t) path.run(turns); });
    return (double) n_threads * (double) turns * (double) path.macs / seconds;
}

double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x.size() % 2 ? x[x.size() / 2] : (x[x.size() / 2 - 1] + x[x.size() / 2]) / 2;
}

double best(const std::vector<double> & x) {
    return *std::max_element(x.begin(), x.end());
}

struct Options {
    bool json    = false;
    int  threads = std::max(1, (int) std::thread::hardware_concurrency());
    int  passes  = 9;
    int  mib     = 1024;
};

[[noreturn]] void usage() {
    std::fprintf(stderr, "usage: bench_limits [--json] [--threads N] [--passes N] [--mib N]\n");
    std::exit(2);
}

Options parse(int argc, char ** argv) {
    Options o;
    for (int i = 1; i < argc; i++) {
        const std::string arg = argv[i];
        if (arg == "--json") {
            o.json = true;
            continue;
        }
        int * const value = arg == "--threads" ? &o.threads :
                            arg == "--passes"  ? &o.passes :
                            arg == "--mib"     ? &o.mib :
                                                 nullptr;
        if (!value || ++i == argc || (*value = std::atoi(argv[i])) < 1) {
            usage();
        }
    }
    return o;
}

// Bytes per second, one figure per pass over the buffer.
std::vector<double> read_rates(const Options & o) {
    uint64_t (*read)(const uint8_t *, size_t) = read_plain;
#ifdef GGML_EXT_X86
    if (__builtin_cpu_supports("avx2")) {
        read = read_avx2;
    }
#endif
    const size_t                            part = ((size_t) o.mib << 20) / (size_t) o.threads / 4096 * 4096;
    // Each thread fills its own part: the pages lie where that thread runs.
    std::vector<std::unique_ptr<uint8_t[]>> parts((size_t) o.threads);
    together(o.threads, [&](int i) {
        parts[(size_t) i].reset(new uint8_t[part]);
        std::memset(parts[(size_t) i].get(), i + 1, part);
    });
    std::vector<double> rates;
    for (int pass = 0; pass < o.passes; pass++) {
        const double seconds = together(o.threads, [&](int i) { keep = read(parts[(size_t) i].get(), part); });
        rates.push_back((double) part * o.threads / seconds);
    }
    return rates;
}

}  // namespace

int main(int argc, char ** argv) {
    const Options             o     = parse(argc, argv);
    const std::vector<double> reads = read_rates(o);

    std::vector<MacPath>             paths = mac_paths();
    std::vector<std::vector<double>> rates;
    for (const MacPath & path : paths) {
        const int64_t probe = 200000;
        const double  per_s = mac_rate(path, 1, probe) / (double) path.macs;  // turns per second
        const int64_t turns = std::max(probe, (int64_t) (per_s * 0.03));      // a pass takes 30 ms
        rates.emplace_back();
        for (int pass = 0; pass < o.passes; pass++) {
            rates.back().push_back(mac_rate(path, o.threads, turns));
        }
    }

    if (o.json) {
        std::printf("{\"compiler\": \"%s\", \"threads\": %d, \"passes\": %d, \"buffer_mib\": %d,\n", COMPILER,
                    o.threads, o.passes, o.mib);
        std::printf(" \"read_bytes_per_s\": {\"best\": %.0f, \"median\": %.0f},\n", best(reads), median(reads));
        std::printf(" \"int8_macs_per_s\": [");
        for (size_t i = 0; i < paths.size(); i++) {
            std::printf("%s\n  {\"path\": \"%s\", \"best\": %.0f, \"median\": %.0f}", i ? "," : "", paths[i].name,
                        best(rates[i]), median(rates[i]));
        }
        std::printf("]}\n");
        return 0;
    }
    std::printf("%d threads, %d passes: best, median\n", o.threads, o.passes);
    std::printf("%-22s %10.2f %10.2f GB/s, buffer of %d MiB\n", "read", best(reads) / 1e9, median(reads) / 1e9, o.mib);
    for (size_t i = 0; i < paths.size(); i++) {
        std::printf("int8 %-17s %10.2f %10.2f G multiply-adds/s\n", paths[i].name, best(rates[i]) / 1e9,
                    median(rates[i]) / 1e9);
    }
    return 0;
}
