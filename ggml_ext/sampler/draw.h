// The last step of the fused sampler: probabilities of the kept candidates, and the draw among them.

#pragma once

#include "candidates.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace ggml_ext_sampling {

template <class Rules> class distribution {
  public:
    distribution(const kernels & k, const candidates & c) : k(k), c(c) {}

    // Takes the weights of the candidates as they are now.
    void weigh();

    // Probabilities of the candidates, block by block: write(first index, count, p).
    template <class Write> void probabilities(Write write);

    // Index of the candidate at u in [0, 1) of the cumulative distribution in the order of the ids.
    int32_t draw(double u);

  private:
    int32_t find_in_block(size_t b, double below, double target);

    const kernels &     k;
    const candidates &  c;
    std::vector<double> block_sums;
    double              total    = 0;
    size_t              in_block = 0;  // the block whose weights `block` holds, from 1; 0: none
    double              block[block_size];
};

template <class Rules> void distribution<Rules>::weigh() {
    const scale s = c.weight_scale();
    block_sums.clear();
    total = 0;
    for (int32_t i = 0; i < c.size(); i += block_size) {
        block_sums.push_back(k.weights(c.logits() + i, std::min(block_size, c.size() - i), s, block));
        total += block_sums.back();
    }
    in_block = block_sums.size();
}

template <class Rules> template <class Write> void distribution<Rules>::probabilities(Write write) {
    for (int32_t i = 0; i < c.size(); i += block_size) {
        const int n = std::min(block_size, c.size() - i);
        k.weights(c.logits() + i, n, c.weight_scale(), block);
        float p[block_size];
        for (int j = 0; j < n; j++) {
            p[j] = float(block[j] / total);
        }
        write(i, n, p);
    }
    in_block = block_sums.size();
}

template <class Rules> int32_t distribution<Rules>::draw(double u) {
    const double target = Rules::draw_target(u, total);
    double       below  = 0;
    size_t       last   = 0;
    for (size_t b = 0; b < block_sums.size(); b++) {
        if (block_sums[b] > 0) {
            last = b;
            if (below + block_sums[b] > target) {
                break;
            }
            below += block_sums[b];
        }
    }
    return find_in_block(last, below, target);
}

// The first candidate of a block at which the sum is above the target; rounding can leave it at the last with a weight.
template <class Rules> int32_t distribution<Rules>::find_in_block(size_t b, double below, double target) {
    const int32_t first = int32_t(b) * block_size;
    const int     n     = std::min(block_size, c.size() - first);
    if (in_block != b + 1) {
        k.weights(c.logits() + first, n, c.weight_scale(), block);
        in_block = b + 1;
    }
    int last = 0;
    for (int j = 0; j < n; j++) {
        if (block[j] > 0) {
            last = j;
            below += block[j];
            if (below > target) {
                break;
            }
        }
    }
    return first + last;
}

}  // namespace ggml_ext_sampling
