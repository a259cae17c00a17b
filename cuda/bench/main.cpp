// Speed of our ops on a device beside upstream's on the same device.
//
//     bench_device [--device NAME] [--quick] [--scale N] PART...      one line of JSON per contender
//     bench_device --model FILE TYPE LAYERS [--transforms] [--scale N]
//
// Device: a name as llama.cpp lists it; by default the first GPU.

#include "bench.h"
#include "ggml-cpu.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

using namespace ggml_ext_bench;

namespace {

const part * const parts[] = { &copy,  &fq4_mul_mat, &fq4_mul_mat_id, &kron, &attention_prefill, &attention_decode,
                               &sample };

struct arguments {
    std::string              device, model;
    int                      scale      = 1;
    bool                     quick      = false;
    bool                     transforms = false;
    std::vector<std::string> rest;
};

arguments parse(int argc, char ** argv) {
    arguments  found;
    const auto value = [&](int & i) {
        if (i + 1 >= argc) {
            throw std::runtime_error(std::string(argv[i]) + " needs a value");
        }
        return std::string(argv[++i]);
    };
    for (int i = 1; i < argc; i++) {
        const std::string name = argv[i];
        if (name == "--device") {
            found.device = value(i);
        } else if (name == "--model") {
            found.model = value(i);
        } else if (name == "--scale") {
            found.scale = std::max(1, atoi(value(i).c_str()));
        } else if (name == "--quick") {
            found.quick = true;
        } else if (name == "--transforms") {
            found.transforms = true;
        } else if (name[0] == '-') {
            throw std::runtime_error("unknown option " + name);
        } else {
            found.rest.push_back(name);
        }
    }
    return found;
}

void run(const arguments & arguments) {
    ggml_backend_dev_t device = arguments.device.empty() ? ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU) :
                                                           ggml_backend_dev_by_name(arguments.device.c_str());
    if (!device) {
        throw std::runtime_error(arguments.device.empty() ? "no GPU" : "no device " + arguments.device);
    }
    ggml_backend_ptr backend(ggml_backend_dev_init(device, nullptr)), cpu(ggml_backend_cpu_init());
    ggml_backend_cpu_set_use_ref(cpu.get(), true);
    const size_t  cache   = (arguments.scale == 1 ? size_t(256) : size_t(1)) << 20;
    const options options = { backend.get(), cpu.get(), cache, arguments.quick ? 0.01 : 0.05, arguments.quick ? 3 : 7 };
    for (const std::string & name : arguments.rest) {
        bool known = false;
        for (const part * part : parts) {
            if (name == part->name) {
                part->run(options, arguments.scale);
                known = true;
            }
        }
        if (!known) {
            throw std::runtime_error("no part " + name);
        }
    }
}

}  // namespace

int main(int argc, char ** argv) {
    try {
        const arguments arguments = parse(argc, argv);
        if (!arguments.model.empty()) {
            if (arguments.rest.size() != 2) {
                throw std::runtime_error("--model FILE needs TYPE and LAYERS");
            }
            write_model(arguments.model, arguments.rest[0], atoi(arguments.rest[1].c_str()), arguments.transforms,
                        arguments.scale);
        } else {
            run(arguments);
        }
    } catch (const std::exception & error) {
        std::fprintf(stderr, "bench_device: error: %s\n", error.what());
        return 1;
    }
    return 0;
}
