"""The pinned source of llama.cpp, and `ggml-ext build`."""
