// Times ops through ggml's backend interface, the way llama.cpp runs them: graphs of equal nodes on different data, so
// that no cache holds them, replayed (the CUDA backend captures a graph at its third run), contenders in turns. Every
// output is poisoned before each run and checked after it.

#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <functional>
#include <string>
#include <vector>

namespace ggml_ext_bench {

struct options {
    ggml_backend_t device;
    ggml_backend_t cpu;          // the reference
    size_t         cache_bytes;  // inputs of a contender's nodes exceed it
    double         seconds;      // of one timed run, at least
    int            rounds;
};

struct contender {
    std::string name;
    double      bytes;  // that one node has to move: weights or cache, and activations
    double      ops;    // multiply-adds of one node, times two; 0: not counted
    // Inputs (fresh tensors of ctx) and the result of one node over n columns (tokens). With fewer columns each input
    // is a prefix of what it is with all of them.
    std::function<ggml_tensor *(ggml_context * ctx, int64_t n)> build;
    int64_t                                                     n;
    std::function<void()> select = [] {};  // a process-wide setting, before it runs
};

// What a round gave. Seconds per node; nmse against the CPU backend over the first columns, once per contender.
struct figures {
    std::vector<double> seconds;
    double              nmse;
};

// Runs the contenders in turns. Throws std::runtime_error, naming the contender, where the device lacks the op, an
// output keeps poison, or nmse is above max_nmse.
std::vector<figures> measure(const options & options, const std::vector<contender> & contenders, double max_nmse);

// Prints one line of JSON per contender.
void report(const std::string & name, const std::string & shape, const std::vector<contender> & contenders,
            const std::vector<figures> & found);

// The parts of the program; each prints its lines. scale divides the sizes, for tests on a CPU.
struct part {
    const char * name;
    void (*run)(const options & options, int scale);
};

extern const part copy, fq4_mul_mat, fq4_mul_mat_id, kron, attention_prefill, attention_decode, sample;

// Writes a model of random weights with the shape of Llama-3-8B. Throws std::runtime_error.
void write_model(const std::string & path, const std::string & type, int layers, bool transforms, int scale);

}  // namespace ggml_ext_bench
