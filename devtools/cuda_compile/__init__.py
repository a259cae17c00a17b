"""scripts/cuda-compile: our kernels for every architecture, and the whole patched ggml-cuda for one."""
