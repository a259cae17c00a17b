// Kernels that a device would not survive, and launches that it would not take: the CUDA emulator must end the process
// and say why.

#include "check.h"
#include "common/device.cuh"

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <string>

namespace {

__global__ void divergent_barrier_kernel(int) {
    if (threadIdx.x % 2) {
        __syncthreads();
    } else {
        __syncwarp();
    }
}

__global__ void missing_lane_kernel(int) {
    if (threadIdx.x != 3) {
        __syncwarp();
    }
}

__global__ void outside_mask_kernel(int) {
    __shfl_sync(0xfffffffeu, 1, 0);
}

__global__ void mixed_masks_kernel(int) {
    __shfl_sync(threadIdx.x % 32 < 16 ? 0xffffffffu : 0xfffffff0u, 1, 0);
}

__global__ void misaligned_copy_kernel(int size) {
    alignas(16) static char a[64], b[64];
    size == 4 ? ggml_ext::cp_async<4>(a + 2, b) : ggml_ext::cp_async<16>(a, b + 8);
}

__global__ void misaligned_matrix_kernel(int last_lane) {
    alignas(16) static char a[64];
    uint32_t                r[4];
    ggml_ext::ldmatrix_x4(r, a + (int(threadIdx.x) == last_lane ? 8 : 0));
}

__global__ void no_such_path_kernel(int) {
    ggml_ext::unreachable_arch();
}

__global__ void one_thread_waits_not_kernel(int thread) {
    if (int(threadIdx.x) != thread) {
        ggml_ext::grid_dependency_wait();
    }
}

// Runs the launch in a child, which must end by abort() with `reason` on its standard error.
void check_stops(const char * reason, void (*kernel)(int), int argument, dim3 grid = 1, dim3 block = 64,
                 size_t shared_bytes = 0, bool overlapped = false) {
    int ends[2];
    if (pipe(ends) != 0) {
        CHECK(false, "no pipe");
        return;
    }
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        overlapped ? ggml_ext_cuda_launch_overlapped(kernel, grid, block, shared_bytes, nullptr, argument) :
                     ggml_ext_cuda_launch(kernel, grid, block, shared_bytes, nullptr, argument);
        _exit(0);
    }
    close(ends[1]);
    std::string said;
    char        part[256];
    for (ssize_t n; (n = read(ends[0], part, sizeof(part))) > 0;) {
        said.append(part, size_t(n));
    }
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT, "status %d in place of: %s", status, reason);
    CHECK(said.find(reason) != std::string::npos, "\"%s\" in place of: %s", said.c_str(), reason);
}

}  // namespace

int main() {
    check_stops("deadlock", divergent_barrier_kernel, 0);
    check_stops("deadlock", missing_lane_kernel, 0);
    check_stops("whose mask leaves it out", outside_mask_kernel, 0);
    check_stops("different warp operations", mixed_masks_kernel, 0);
    for (int size : { 4, 16 }) {
        check_stops("cp_async: an address is not aligned", misaligned_copy_kernel, size);
    }
    check_stops("ldmatrix: a row is not aligned", misaligned_matrix_kernel, 31);
    check_stops("that this architecture does not have", no_such_path_kernel, 0);
    check_stops("ends without grid_dependency_wait", one_thread_waits_not_kernel, 63, 1, 64, 0, true);
    check_stops("a launch that no device takes", missing_lane_kernel, 0, 1, 1025);
    check_stops("a launch that no device takes", missing_lane_kernel, 0, 1, 0);
    check_stops("a launch that no device takes", missing_lane_kernel, 0, dim3(1, 65536));
    check_stops("a launch that no device takes", missing_lane_kernel, 0, dim3(1, 1, 65536));
    check_stops("a launch that no device takes", missing_lane_kernel, 0, dim3(0));
    check_stops("a launch that no device takes", missing_lane_kernel, 0, 1, 64, 227 * 1024 + 1);
    return check_done();
}
