#include "stand-in.h"

#include "common.cuh"
#include "common/views.h"
#include "ext-cuda.h"
#include "ggml-backend-impl.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"

namespace {

stand_in_counts counts;

// --- memory ---

const char * buffer_type_name(ggml_backend_buffer_type_t) {
    return "STAND-IN0";
}

void buffer_free(ggml_backend_buffer_t buffer) {
    std::free(buffer->context);
}

void * buffer_base(ggml_backend_buffer_t buffer) {
    return buffer->context;
}

void buffer_memset(ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    std::memset(static_cast<char *>(t->data) + offset, value, size);
}

void buffer_set(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    std::memcpy(static_cast<char *>(t->data) + offset, data, size);
}

void buffer_get(ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    std::memcpy(data, static_cast<const char *>(t->data) + offset, size);
}

void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    std::memset(buffer->context, value, buffer->size);
}

// Filled with NaN: what nobody writes must not count.
ggml_backend_buffer_t buffer_new(ggml_backend_buffer_type_t type, size_t size) {
    const ggml_backend_buffer_i interface = { buffer_free, buffer_base, nullptr, buffer_memset, buffer_set, buffer_get,
                                              nullptr,     nullptr,     nullptr, buffer_clear,  nullptr };
    void *                      memory    = std::aligned_alloc(256, GGML_PAD(size + 256, 256));
    std::memset(memory, 0xff, GGML_PAD(size + 256, 256));
    return ggml_backend_buffer_init(type, interface, memory, size);
}

size_t buffer_alignment(ggml_backend_buffer_type_t) {
    return 128;
}

ggml_backend_buffer_type * buffer_type() {
    static ggml_backend_buffer_type type = {
        { buffer_type_name, buffer_new, buffer_alignment, nullptr, nullptr, nullptr },
        nullptr, nullptr
    };
    return &type;
}

// --- the order of ggml_backend_cuda_graph_compute and ggml_cuda_graph_evaluate_and_capture ---

struct context {
    ggml_backend_cuda_context cuda;
    ggml_backend_ptr          cpu;

    context() : cpu(ggml_backend_cpu_init()) { ggml_backend_cpu_set_n_threads(cpu.get(), 1); }

    ~context() { ggml_ext_cuda_free(cuda); }
};

bool is_noop(const ggml_tensor * t) {
    return ggml_is_empty(t) || ggml_ext_is_leaf_or_view(t);
}

// ggml_cuda_graph_update_required
bool properties_changed(ggml_cuda_graph & graph, const ggml_cgraph * nodes) {
    if (nodes->uid != 0 && nodes->uid == graph.uid) {
        GGML_ASSERT(int(graph.node_props.size()) == nodes->n_nodes);
        return false;
    }
    graph.uid    = nodes->uid;
    bool changed = int(graph.node_props.size()) != nodes->n_nodes;
    graph.node_props.resize(nodes->n_nodes);
    for (int i = 0; i < nodes->n_nodes; i++) {
        ggml_cuda_graph::node_properties now = {};
        std::memcpy(&now.node, nodes->nodes[i], sizeof(now.node));
        for (int j = 0; j < GGML_MAX_SRC; j++) {
            now.node_src_data_ptrs[j] = nodes->nodes[i]->src[j] ? nodes->nodes[i]->src[j]->data : nullptr;
        }
        if (changed || std::memcmp(&graph.node_props[i], &now, sizeof(now)) != 0) {
            graph.node_props[i] = now;
            changed             = true;
        }
    }
    return changed;
}

// Whether upstream would launch what it captured before, without a look at the nodes.
bool is_replayed(ggml_backend_cuda_context & ctx, const ggml_cgraph * nodes) {
    auto & graph = ctx.cuda_graphs[nodes->nodes[0]];
    if (!graph) {
        graph = std::make_unique<ggml_cuda_graph>();
    }
    const bool changed     = properties_changed(*graph, nodes);
    const bool replayed    = graph->warmup_complete && !changed && graph->captured;
    graph->captured        = !changed;  // with the second evaluation of the same nodes
    graph->warmup_complete = !changed;
    return replayed;
}

ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    context & ctx = *static_cast<context *>(backend->context);
    ggml_ext_cuda_check_settings(ctx.cuda);
    counts.replayed += is_replayed(ctx.cuda, graph);
    ggml_ext_cuda_graph_begin(ctx.cuda);
    for (int i = 0; i < graph->n_nodes; i++) {
        ggml_tensor * node = graph->nodes[i];
        if (is_noop(node) || !(node->flags & GGML_TENSOR_FLAG_COMPUTE)) {
            continue;
        }
        if (const int following = ggml_ext_cuda_fuse(ctx.cuda, graph, i)) {
            counts.fused += following + 1;
            i += following;
        } else if (ggml_ext_cuda_compute(ctx.cuda, node)) {
            counts.ours++;
        } else {
            ggml_cgraph one = ggml_graph_view(graph, i, i + 1);
            counts.upstream++;
            if (ggml_backend_graph_compute(ctx.cpu.get(), &one) != GGML_STATUS_SUCCESS) {
                return GGML_STATUS_FAILED;
            }
        }
    }
    return GGML_STATUS_SUCCESS;
}

// --- device ---

const char * backend_name(ggml_backend_t) {
    return "STAND-IN0";
}

void backend_free(ggml_backend_t backend) {
    delete static_cast<context *>(backend->context);
    delete backend;
}

const char * device_name(ggml_backend_dev_t) {
    return "STAND-IN0";
}

void device_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    *free = *total = size_t(1) << 30;
}

enum ggml_backend_dev_type device_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props = { device_name(dev), device_name(dev), 0, 0, device_type(dev), nullptr, {} };
    device_memory(dev, &props->memory_free, &props->memory_total);
}

ggml_backend_t device_init(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid     = { 0x5a };
    auto * const     made     = new ggml_backend{};
    made->guid                = &guid;
    made->iface.get_name      = backend_name;
    made->iface.free          = backend_free;
    made->iface.graph_compute = graph_compute;
    made->device              = dev;
    made->context             = new context;
    return made;
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t) {
    return buffer_type();
}

bool has_type_of_ours(const ggml_tensor * op) {
    bool found = op->type >= GGML_TYPE_FQ4;
    for (const ggml_tensor * source : op->src) {
        found = found || (source && source->type >= GGML_TYPE_FQ4);
    }
    return found;
}

// ggml_backend_cuda_device_supports_op after our hook, as far as it tells: no type of ours but where nothing is computed
// or bytes are copied; attention over a quantised cache with K and V of one type only.
bool upstream_supports(const ggml_tensor * op) {
    if (ggml_ext_is_leaf_or_view(op) || op->op == GGML_OP_CONT || op->op == GGML_OP_DUP) {
        return true;
    }
    if (op->op == GGML_OP_CPY && op->src[0]->type == op->src[1]->type) {
        return ggml_is_contiguous(op->src[0]) && ggml_is_contiguous(op->src[1]);
    }
    if (op->op == GGML_OP_FLASH_ATTN_EXT && op->src[1]->type != op->src[2]->type) {
        return false;
    }
    return !has_type_of_ours(op) && op->op != GGML_OP_EXT &&
           ggml_backend_dev_supports_op(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), op);
}

bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    const ggml_ext_cuda_answer answer = ggml_ext_cuda_supports(0, op);
    return answer == GGML_EXT_CUDA_NOT_OURS ? upstream_supports(op) : answer == GGML_EXT_CUDA_YES;
}

bool device_supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
    return type == buffer_type();
}

const char * registry_name(ggml_backend_reg_t) {
    return "STAND-IN";
}

size_t registry_count(ggml_backend_reg_t) {
    return 1;
}

ggml_backend_dev_t registry_device(ggml_backend_reg_t, size_t) {
    return stand_in_device();
}

}  // namespace

ggml_backend_dev_t stand_in_device() {
    static ggml_backend_reg registry = {
        GGML_BACKEND_API_VERSION, { registry_name, registry_count, registry_device, nullptr },
         nullptr
    };
    static ggml_backend_device device = {
        { device_name, device_name, device_memory, device_type, device_props, device_init, device_buffer_type, nullptr,
         nullptr, device_supports_op, device_supports_buft, nullptr, nullptr, nullptr, nullptr },
        &registry,
        nullptr
    };
    if (!buffer_type()->device) {
        buffer_type()->device = &device;
        ggml_backend_register(&registry);
    }
    return &device;
}

stand_in_counts & stand_in_counted() {
    return counts;
}

void stand_in_compiled_for(int architecture) {
    ggml_cuda_info().compiled = architecture;
}
