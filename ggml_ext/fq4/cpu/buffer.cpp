#include "buffer.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#ifdef __linux__
#    include <sys/mman.h>

#    include <cstdlib>

namespace {

constexpr size_t HUGE_PAGE = 2u << 20;

void * allocate(size_t size) {
    void * data = nullptr;
    if (posix_memalign(&data, HUGE_PAGE, GGML_PAD(size, HUGE_PAGE)) != 0) {
        return nullptr;
    }
    madvise(data, GGML_PAD(size, HUGE_PAGE), MADV_HUGEPAGE);  // a hint: refused, the pages are small
    return data;
}

void release(ggml_backend_buffer_t buffer) {
    free(buffer->context);
}

}  // namespace

#else

namespace {

void * allocate(size_t size) {
    return ggml_aligned_malloc(size);
}

void release(ggml_backend_buffer_t buffer) {
    ggml_aligned_free(buffer->context, buffer->size);
}

}  // namespace

#endif

ggml_backend_buffer_t ggml_ext_fq4_buffer_alloc(ggml_backend_buffer_type_t type, size_t size) {
    void * data = allocate(size);
    if (data == nullptr) {
        GGML_LOG_ERROR("%s: cannot allocate %zu bytes\n", __func__, size);
        return nullptr;
    }
    ggml_backend_buffer_t buffer = ggml_backend_cpu_buffer_from_ptr(data, size);
    buffer->buft                 = type;
    buffer->iface.free_buffer    = release;
    return buffer;
}
