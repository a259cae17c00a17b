// How many thread blocks a multiprocessor holds at once. Plain C++, for plans and their tests.

#ifndef GGML_EXT_CUDA_OCCUPANCY_H
#define GGML_EXT_CUDA_OCCUPANCY_H

#include <cstddef>

namespace ggml_ext {

constexpr int sm_registers = 65536;  // of 32 bits

// By registers: `registers` per thread, as compiled.
constexpr int blocks_by_registers(int registers, int threads) {
    return sm_registers / (registers * threads);
}

// By shared memory: a multiprocessor has 1 KiB more than block_limit, the most that one block may have, and a block takes
// 1 KiB more than it asks for (CUDA C++ Programming Guide, "Compute Capabilities").
constexpr int blocks_by_shared(size_t block_limit, size_t shared_bytes) {
    return int((block_limit + 1024) / (shared_bytes + 1024));
}

}  // namespace ggml_ext

#endif  // GGML_EXT_CUDA_OCCUPANCY_H
