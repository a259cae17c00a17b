// FQ4 or FQ4_64 matrix times 1 to 8 columns of int8 activations, at the speed of the weights' memory.
//
// A thread block owns a range of groups of 4 adjacent rows. The range is a list of items, group by group: 4 rows times
// 1024 weights (4 blocks, or 16 of FQ4_64) of k each. Its four warps take them in turn, so a group's k is spread over the warps, and each
// warp has its own ring of items in shared memory that cp.async fills two items ahead, across groups: no barrier and no
// row's end interrupts the stream. cp.async takes whole 16-byte units, as rows start at even addresses only, or anywhere; the
// bytes around an item that come with it are other weights of the same allocation.
//
// In an item, lane l has 16 bytes of q of each row, part l % 8 of block l / 8 (FQ4_64: l % 2 of l / 2): its 32 activations are in registers for all four rows.
// When a warp's items leave a group, its sums go to shared memory, and every `batch` groups the block adds the four warps'
// parts in order and finishes the rows (bias, gated linear unit). So the order of all additions is fixed.

#pragma once

#include "common/device.cuh"
#include "vec_plan.h"
#include "vec_product.cuh"

namespace ggml_ext {

constexpr int fq4_vec_threads = 32 * GGML_EXT_FQ4_VEC_WARPS;
constexpr int fq4_vec_stages  = 3;  // of a ring: one is read, two are under way

// 4 blocks (552 bytes) that start up to 14 bytes into the first unit touch at most 36 units of 16 bytes, and so do 16
// blocks of FQ4_64 (560 bytes) that start up to 15 bytes into it.
constexpr int fq4_vec_units     = 36;
constexpr int fq4_vec_row_bytes = 16 * fq4_vec_units;

template <int N_COLS> struct fq4_vec_shared {
    static constexpr int batch = N_COLS <= 2 ? 32 : 8;  // groups between two ends of rows

    fq4_spread table;
    char       ring[GGML_EXT_FQ4_VEC_WARPS][fq4_vec_stages][GGML_EXT_FQ4_VEC_ROWS][fq4_vec_row_bytes];
    float      parts[batch][GGML_EXT_FQ4_VEC_WARPS][N_COLS][GGML_EXT_FQ4_VEC_ROWS];
};

__device__ __forceinline__ float fq4_vec_apply_glu(const ggml_ext_fq4_vec_args & a, float gate, float up) {
    switch (a.glu) {
        case GGML_EXT_FQ4_VEC_SWIGLU:
            return gate / (1.0f + expf(-gate)) * up;
        case GGML_EXT_FQ4_VEC_GEGLU:
            return 0.5f * gate * (1.0f + tanhf(0.7978845608f * gate * (1.0f + 0.044715f * gate * gate))) * up;
        case GGML_EXT_FQ4_VEC_SWIGLU_OAI:
            gate = fminf(gate, a.glu_limit);
            up   = fmaxf(fminf(up, a.glu_limit), -a.glu_limit);
            return gate / (1.0f + expf(-a.glu_alpha * gate)) * (1.0f + up);
        case GGML_EXT_FQ4_VEC_SWIGLU_CLAMP:
            gate = fminf(gate, a.glu_limit);
            up   = fmaxf(fminf(up, a.glu_limit), -a.glu_limit);
            return gate / (1.0f + expf(-gate)) * up;
    }
    return 0.0f;
}

// One batch of the product, as pointers.
template <typename L> struct fq4_vec_problem {
    const char *   x;
    const char *   gate;
    const int8_t * codes;   // the first column's; others follow, a row of activations each
    const float *  scales;  // likewise, of block 0
    const char *   bias;
    const char *   gate_bias;
    char *         dst;  // the first column's

    __device__ explicit fq4_vec_problem(const ggml_ext_fq4_vec_args & a, int64_t batch) {
        const int64_t i2 = batch % a.ne2, i3 = batch / a.ne2;
        int64_t       act_row, weights, bias_at;
        if (a.ids) {
            const int64_t expert = *reinterpret_cast<const int32_t *>(a.ids + i2 * a.nb_ids0 + i3 * a.nb_ids1);
            act_row              = i3 * a.ne11 + i2 % a.ne11;
            weights              = expert * a.nb02;
            bias_at              = expert * a.nb_bias1;
            dst                  = a.dst + i2 * a.nb1 + i3 * a.nb2;
        } else {
            act_row = batch * a.ne11 + a.first_col;
            weights = i2 / a.ratio2 * a.nb02 + i3 / a.ratio3 * a.nb03;
            bias_at = i2 * a.nb_bias2 + i3 * a.nb_bias3;
            dst     = a.dst + i2 * a.nb2 + i3 * a.nb3 + a.first_col * a.nb1;
        }
        x         = a.x + weights;
        gate      = a.gate ? a.gate + weights : nullptr;
        codes     = a.codes + act_row * a.n_blocks * L::weights;
        scales    = a.scales + act_row;
        bias      = a.bias ? a.bias + bias_at : nullptr;
        gate_bias = a.gate_bias ? a.gate_bias + bias_at : nullptr;
    }
};

// A position in the list of items.
struct fq4_vec_cursor {
    int group, step;
};

template <typename L, int N_COLS, bool GATE> struct fq4_vec_block {
    static constexpr int rows       = GGML_EXT_FQ4_VEC_ROWS;
    static constexpr int batch      = fq4_vec_shared<N_COLS>::batch;
    static constexpr int blocks     = GGML_EXT_FQ4_VEC_WEIGHTS / L::weights;  // of an item's row
    static constexpr int item_bytes = blocks * L::bytes;
    static_assert(16 - L::alignment + item_bytes <= fq4_vec_row_bytes, "fits a row of a ring");
    static constexpr int out_rows = GATE ? rows / 2 : rows;  // of dst, per group; with a gate, rows 0, 1: x, 2, 3: gate

    const ggml_ext_fq4_vec_args & a;
    const fq4_vec_problem<L> &    p;
    fq4_vec_shared<N_COLS> &      shared;
    const int                     warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const fq4_vec_lane<L>         place;
    const int                     n_steps;
    const int64_t                 to_gate;  // bytes from x to gate

    __device__ fq4_vec_block(const ggml_ext_fq4_vec_args & a, const fq4_vec_problem<L> & p,
                             fq4_vec_shared<N_COLS> & shared) :
        a(a), p(p), shared(shared), place(lane), n_steps((a.n_blocks + blocks - 1) / blocks), to_gate(p.gate - p.x) {}

    // The warp's next item.
    __device__ __forceinline__ void advance(fq4_vec_cursor & at) const {
        at.group += GGML_EXT_FQ4_VEC_WARPS / n_steps;
        at.step += GGML_EXT_FQ4_VEC_WARPS % n_steps;
        if (at.step >= n_steps) {
            at.step -= n_steps;
            at.group++;
        }
    }

    // Copies what of units `lane` and 32 + lane % 4 of the item's rows holds bytes of existing rows and blocks.
    __device__ __forceinline__ void fetch_some(const char * row0, int n_rows, int n_blocks, char * to) const {
        const auto copy_unit = [&](int r, int unit) {
            const char * row    = row0 + (r % out_rows) * a.nb01 + (r < out_rows ? 0 : to_gate);
            const int    offset = int(reinterpret_cast<uintptr_t>(row) % 16);
            if (r % out_rows < n_rows && 16 * unit < offset + n_blocks * L::bytes) {
                cp_async<16>(to + r * fq4_vec_row_bytes + 16 * unit, row - offset + 16 * unit);
            }
        };
        for (int r = 0; r < rows; r++) {
            copy_unit(r, lane);
        }
        if (lane < 4 * rows) {
            copy_unit(lane / 4, 32 + lane % 4);
        }
    }

    const __device__ __forceinline__ static char * align_down(const char * p) {
        return reinterpret_cast<const char *>(reinterpret_cast<uintptr_t>(p) & ~uintptr_t(15));
    }

    // The same for an item that is whole: few instructions, for this is done as often as a row's product.
    __device__ __forceinline__ void fetch_whole(const char * row0, char * to) const {
        const char * units = row0 + 16 * lane;
#pragma unroll
        for (int r = 0; r < rows; r++) {
            const char * row = units + (r % out_rows) * a.nb01 + (r < out_rows ? 0 : to_gate);
            cp_async<16>(to + r * fq4_vec_row_bytes + 16 * lane, align_down(row));
        }
        const int    r = lane / 4, unit = 32 + lane % 4;
        const char * row = row0 + (r % out_rows) * a.nb01 + (r < out_rows ? 0 : to_gate);
        if (lane < 4 * rows && 16 * unit < int(reinterpret_cast<uintptr_t>(row) % 16) + item_bytes) {
            cp_async<16>(to + r * fq4_vec_row_bytes + 16 * unit, align_down(row) + 16 * unit);
        }
    }

    __device__ __forceinline__ void fetch(const fq4_vec_cursor & at, int stage) const {
        const int    n_blocks = a.n_blocks - at.step * blocks;
        const int    n_rows   = a.n_rows - at.group * out_rows;
        const char * row0     = p.x + int64_t(at.group * out_rows) * a.nb01 + at.step * item_bytes;
        char *       to       = &shared.ring[warp][stage][0][0];
        if (n_blocks >= blocks && n_rows >= out_rows) {
            fetch_whole(row0, to);
        } else {
            fetch_some(row0, n_rows, min(n_blocks, blocks), to);
        }
    }

    // Where in its first unit row r of an item starts.
    __device__ __forceinline__ int offset(const fq4_vec_cursor & at, int r) const {
        const unsigned row0 = unsigned(reinterpret_cast<uintptr_t>(p.x)) +
                              unsigned(at.group * out_rows) * unsigned(a.nb01) + unsigned(at.step * item_bytes);
        return (row0 + unsigned(r % out_rows * a.nb01) + (r < out_rows ? 0 : unsigned(to_gate))) % 16;
    }

    __device__ __forceinline__ void multiply(const fq4_vec_cursor & at, int stage, float (&acc)[rows][N_COLS]) const {
        const int block = at.step * blocks + place.block;
        if (block >= a.n_blocks) {
            return;
        }
        uint32_t y[N_COLS][8];
        float    scale[N_COLS];
#pragma unroll
        for (int c = 0; c < N_COLS; c++) {
            const int8_t * part = p.codes + (int64_t(c) * a.n_blocks + block) * L::weights + place.first;
            fq4_vec_order(__ldg(reinterpret_cast<const uint4 *>(part)), y[c]);
            fq4_vec_order(__ldg(reinterpret_cast<const uint4 *>(part + L::run)), y[c] + 4);
            scale[c] = __ldg(p.scales + int64_t(block) * a.n_act_rows + c);
        }
#pragma unroll
        for (int r = 0; r < rows; r++) {
            fq4_vec_product<L, N_COLS>(shared.ring[warp][stage][r], offset(at, r), place, shared.table, y, scale,
                                       acc[r]);
        }
    }

    // The warp's sums of a group, to parts[index]: lanes 16-31 keep rows 2 and 3, in those lanes 8-15 rows 1 and 3; then
    // eight lanes add up one row. Clears acc.
    __device__ __forceinline__ void flush(int index, float (&acc)[rows][N_COLS]) const {
        const bool upper = lane & 16, odd = lane & 8;
#pragma unroll
        for (int c = 0; c < N_COLS; c++) {
            float two[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float other = __shfl_xor_sync(0xffffffffu, upper ? acc[r][c] : acc[2 + r][c], 16);
                two[r]            = (upper ? acc[2 + r][c] : acc[r][c]) + other;
                acc[r][c] = acc[2 + r][c] = 0.0f;
            }
            const float other = __shfl_xor_sync(0xffffffffu, odd ? two[0] : two[1], 8);
            const float sum   = warp_sum<8>((odd ? two[1] : two[0]) + other);
            if (lane % 8 == 0) {
                shared.parts[index][warp][c][lane / 8] = sum;
            }
        }
    }

    __device__ __forceinline__ void clear_parts() const {
        for (int i = threadIdx.x; i < int(sizeof(shared.parts) / sizeof(float)); i += fq4_vec_threads) {
            (&shared.parts[0][0][0][0])[i] = 0.0f;
        }
    }

    __device__ __forceinline__ float total(int index, int c, int r) const {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < GGML_EXT_FQ4_VEC_WARPS; w++) {
            sum += shared.parts[index][w][c][r];
        }
        return sum;
    }

    // Writes the rows of groups first .. first + n_groups - 1.
    __device__ __forceinline__ void finish(int first, int n_groups) const {
        const int per_column = n_groups * out_rows;
        for (int i = threadIdx.x; i < per_column * N_COLS; i += fq4_vec_threads) {
            const int     c   = i / per_column;
            const int     g   = i % per_column / out_rows;
            const int     r   = i % out_rows;
            const int64_t row = int64_t(first + g) * out_rows + r;
            if (row >= a.n_rows) {
                continue;
            }
            float y = total(g, c, r);
            if (p.bias) {
                y += reinterpret_cast<const float *>(p.bias)[row];
            }
            if (GATE) {
                float gate = total(g, c, r + out_rows);
                if (p.gate_bias) {
                    gate += reinterpret_cast<const float *>(p.gate_bias)[row];
                }
                y = fq4_vec_apply_glu(a, gate, y);
            }
            reinterpret_cast<float *>(p.dst + c * a.nb1)[row] = y;
        }
    }

    // Groups first .. last - 1.
    __device__ __forceinline__ void run(int first, int last) const {
        static_assert(fq4_vec_stages == 3, "the cursors below");
        fq4_vec_cursor next = { first + warp / n_steps, warp % n_steps };  // what this warp fetches next
        fq4_vec_cursor at[2];                                              // of the items under way
        for (int stage = 0; stage < 2; stage++) {
            if (next.group < last) {
                fetch(next, stage);
            }
            cp_async_commit();
            at[stage] = next;
            advance(next);
        }
        fq4_spread_table<fq4_vec_splits_by_sign(N_COLS)>(shared.table, threadIdx.x);
        clear_parts();
        __syncthreads();

        float acc[rows][N_COLS] = {};
        int   stage             = 0;
        for (int begin = first; begin < last; begin += batch) {
            const int end = min(last, begin + batch);
            while (at[0].group < end) {
                // After the __syncwarp, all lanes have read the stage that is filled now.
                cp_async_wait<1>();
                __syncwarp();
                if (next.group < last) {
                    fetch(next, stage == 0 ? 2 : stage - 1);
                }
                cp_async_commit();
                multiply(at[0], stage, acc);
                stage = stage == 2 ? 0 : stage + 1;
                if (at[1].group != at[0].group) {
                    flush(at[0].group - begin, acc);
                }
                at[0] = at[1];
                at[1] = next;
                advance(next);
            }
            __syncthreads();
            finish(begin, end - begin);
            __syncthreads();
            clear_parts();
            __syncthreads();
        }
    }
};

}  // namespace ggml_ext

template <typename L, int N_COLS, bool GATE>
static __global__ void __launch_bounds__(ggml_ext::fq4_vec_threads, ggml_ext_fq4_vec_per_sm(N_COLS))
ggml_ext_fq4_vec_kernel(const ggml_ext_fq4_vec_args a) {
    using namespace ggml_ext;
    GGML_EXT_DYNAMIC_SHARED(fq4_vec_shared<N_COLS>, shared);
    const int rows   = GATE ? GGML_EXT_FQ4_VEC_ROWS / 2 : GGML_EXT_FQ4_VEC_ROWS;
    const int groups = (a.n_rows + rows - 1) / rows;
    const int first  = int(blockIdx.x) * a.groups_per_block;
    const int last   = min(groups, first + a.groups_per_block);
    for (int64_t batch = blockIdx.y; batch < a.n_batches; batch += gridDim.y) {
        const fq4_vec_problem<L> problem(a, batch);
        fq4_vec_block<L, N_COLS, GATE>(a, problem, *shared).run(first, last);
    }
}
