// The encoder's bytes are part of the format: the same on every machine and from every compiler. The hashes are those of
// x86-64; a compiler that fuses multiplications and additions, another order of a sum, another table or another search
// gives other ones.

#include "check.h"
#include "fq3/fq3.h"
#include "fq3_64/fq3_64.h"
#include "fq4/fq4.h"
#include "ggml-cpu.h"

#include <cinttypes>
#include <vector>

namespace {

// Weights of all magnitudes from integers alone, since math libraries differ in their last bits.
std::vector<float> weights(int64_t n, uint64_t seed) {
    std::vector<float> x(n);
    for (float & v : x) {
        int64_t sum = 0;
        for (int i = 0; i < 4; i++) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            sum += (int64_t) (seed >> 40) - (1 << 23);
        }
        v = (float) sum * (seed >> 33 & 15 ? 0x1p-26f : 0x1p-23f);
    }
    return x;
}

uint64_t fnv1a(const std::vector<uint8_t> & bytes) {
    uint64_t hash = 14695981039346656037u;
    for (uint8_t byte : bytes) {
        hash = (hash ^ byte) * 1099511628211u;
    }
    return hash;
}

struct Type {
    const char * name;
    size_t       row_bytes;  // of 1024 weights
    size_t (*quantize)(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
};

void test(const Type & type, const float * importance, uint64_t expected) {
    const int64_t      rows = 64, n = 1024;
    std::vector<float> x = weights(rows * n, 7);
    // Every other row: pairs of v and -v. A row of the table and its mirror image then cost the same but for rounding,
    // so the last bit of every sum decides.
    for (int64_t i = 0; i < rows * n; i += 2) {
        x[i + 1] = i / n % 2 ? -x[i] : x[i + 1];
    }
    std::vector<uint8_t> data(rows * type.row_bytes);
    type.quantize(x.data(), data.data(), rows, n, importance);
    const uint64_t hash = fnv1a(data);
    CHECK(hash == expected, "%s, %s importances: hash %016" PRIx64 ", expected %016" PRIx64, type.name,
          importance ? "with" : "without", hash, expected);
}

}  // namespace

int main() {
    ggml_cpu_init();
    const Type fq4    = { "FQ4", 4 * sizeof(ggml_ext_block_fq4), ggml_ext_fq4_quantize };
    const Type fq3    = { "FQ3", 4 * sizeof(ggml_ext_block_fq3), ggml_ext_fq3_quantize };
    const Type fq3_64 = { "FQ3_64", 16 * sizeof(ggml_ext_block_fq3_64), ggml_ext_fq3_64_quantize };
    test(fq4, nullptr, 0x8b7d4a81bfc2858f);
    test(fq3, nullptr, 0x37101200bca4dd46);
    test(fq3_64, nullptr, 0x567d887b33c5fb40);
    std::vector<float> importance = weights(1024, 8);
    for (size_t i = 0; i < importance.size(); i++) {
        importance[i] = i % 2 ? importance[i - 1] : importance[i] * importance[i];
    }
    test(fq4, importance.data(), 0x64486d5f69101f7a);
    test(fq3, importance.data(), 0x0130a02f7aace957);
    test(fq3_64, importance.data(), 0x050a0d32529ef309);
    return check_done();
}
