// A GPU of ggml's, on a CPU: supports_op, fusion, compute and the check for captured graphs are cuda/*.cu's own, called in
// the order in which upstream's ggml-cuda.cu calls them; what they leave to upstream is the CPU backend's. Kernels run in
// the emulator, the device's memory is plain memory that says that it is no host's.

#pragma once

#include "ggml-backend.h"

// Since the last reset.
struct stand_in_counts {
    int ours;      // nodes that ggml_ext_cuda_compute took
    int fused;     // nodes that ggml_ext_cuda_fuse took, each run of them counted as its nodes
    int upstream;  // nodes that it left to upstream
    int replayed;  // graphs that upstream would have launched as they were captured
};

ggml_backend_dev_t stand_in_device();  // registered with the first call
stand_in_counts &  stand_in_counted();

// The architecture that the kernels count as compiled for, 900 at first; the device's own stays 900.
void stand_in_compiled_for(int architecture);
