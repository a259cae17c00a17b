// The random numbers of the fused sampler: a Mersenne twister as in upstream's dist sampler.

#pragma once

#include <cstdint>
#include <random>

namespace ggml_ext_sampling {

class generator {
  public:
    explicit generator(uint32_t seed) : first(seed), twister(seed) {}

    uint32_t seed() const { return first; }

    // Uniform in [0, 1): 53 bits of two draws, the high ones first. The same on every platform, which a distribution
    // of the standard library is not.
    double uniform() {
        const uint64_t high = twister();
        const uint64_t bits = high << 32 | twister();
        return double(bits >> 11) * 0x1p-53;
    }

  private:
    uint32_t     first;
    std::mt19937 twister;
};

}  // namespace ggml_ext_sampling
