#include "common.cuh"
#include "vec.cuh"
#include "vec.h"

template <typename L, int N_COLS, bool GATE>
static void launch(ggml_backend_cuda_context & ctx, const ggml_ext_fq4_vec_plan & plan,
                   const ggml_ext_fq4_vec_args & args) {
    constexpr size_t shared_bytes = sizeof(ggml_ext::fq4_vec_shared<N_COLS>);
    static_assert(shared_bytes <= 48 * 1024, "what every device grants");
    CUDA_CHECK(ggml_ext_cuda_launch(ggml_ext_fq4_vec_kernel<L, N_COLS, GATE>, dim3(plan.grid_x, plan.grid_y),
                                    dim3(ggml_ext::fq4_vec_threads), shared_bytes, ctx.stream(), args));
}

template <typename L>
static void launch_columns(ggml_backend_cuda_context & ctx, int n_cols, const ggml_ext_fq4_vec_plan & plan,
                           const ggml_ext_fq4_vec_args & args) {
    switch (n_cols) {
        case 1:
            return args.gate ? launch<L, 1, true>(ctx, plan, args) : launch<L, 1, false>(ctx, plan, args);
        case 2:
            return launch<L, 2, false>(ctx, plan, args);
        case 3:
            return launch<L, 3, false>(ctx, plan, args);
        case 4:
            return launch<L, 4, false>(ctx, plan, args);
        case 5:
            return launch<L, 5, false>(ctx, plan, args);
        case 6:
            return launch<L, 6, false>(ctx, plan, args);
        case 7:
            return launch<L, 7, false>(ctx, plan, args);
        case 8:
            return launch<L, 8, false>(ctx, plan, args);
    }
    GGML_ABORT("FQ4 matrix-vector product of %d columns", n_cols);
}

void ggml_ext_cuda_fq4_vec(ggml_backend_cuda_context & ctx, ggml_type type, int n_cols, ggml_ext_fq4_vec_args args) {
    if (args.n_rows == 0 || args.n_batches == 0) {
        return;
    }
    const ggml_ext_fq4_vec_plan plan =
        ggml_ext_fq4_vec_make_plan(args.n_rows, args.gate != nullptr, args.n_batches,
                                   ggml_cuda_info().devices[ctx.device].nsm, ggml_ext_fq4_vec_per_sm(n_cols));
    args.groups_per_block = plan.groups_per_block;
    type == GGML_TYPE_FQ4 ? launch_columns<ggml_ext::fq4_layout>(ctx, n_cols, plan, args) :
                            launch_columns<ggml_ext::fq4_64_layout>(ctx, n_cols, plan, args);
}
