// Which buffer holds the int8 form of which tensor: the bookkeeping of activation.cu, with no CUDA in it.

#ifndef GGML_EXT_ACTIVATION_SLOTS_H
#define GGML_EXT_ACTIVATION_SLOTS_H

#include "common/views.h"
#include "ggml.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

// What one stream of one context has. A result of find() stays apart from those of the next two calls.
class ggml_ext_activation_slots {
  public:
    struct found {
        void * buffer;
        bool   filled;  // by an earlier find() of the same tensor since forget(); otherwise the caller fills it now
    };

    // `allocate` gives device memory. A buffer that is too small stays allocated, since captured CUDA graphs may
    // point to it; each one is at least twice its predecessor, so all of those take less than what is in use.
    template <typename F> found find(const ggml_tensor * x, int group, size_t size, const F & allocate) {
        key k         = describe(x);
        k.group       = group;
        slot * oldest = slots;
        calls++;
        for (slot & s : slots) {
            if (k.tensor && same(s.holds, k)) {
                s.last_use = calls;
                return { s.buffer, true };
            }
            oldest = s.last_use < oldest->last_use ? &s : oldest;
        }
        if (oldest->capacity < size) {
            oldest->capacity = std::max(size, 2 * oldest->capacity);
            oldest->buffer   = allocate(oldest->capacity);
            allocations.push_back(oldest->buffer);
        }
        oldest->holds    = k;
        oldest->last_use = calls;
        return { oldest->buffer, false };
    }

    // No buffer counts as filled any more.
    void forget() {
        for (slot & s : slots) {
            s.holds = {};
        }
    }

    const std::vector<void *> & allocated() const { return allocations; }

  private:
    static constexpr int n_slots = 3;  // for two further calls

    struct key {
        const ggml_tensor * tensor = nullptr;  // nullptr: never found again
        const void *        data   = nullptr;
        int                 group  = 0;        // values that share a scale
        int64_t             ne[GGML_MAX_DIMS];
        size_t              nb[GGML_MAX_DIMS];
    };

    struct slot {
        key      holds;
        void *   buffer   = nullptr;
        size_t   capacity = 0;
        uint64_t last_use = 0;
    };

    // A view is what it shows of the tensor that some op computed: one op, one value. A leaf may be written by others
    // between two uses.
    static key describe(const ggml_tensor * x) {
        const ggml_tensor * computed = x;
        while (computed->op != GGML_OP_NONE && ggml_ext_is_leaf_or_view(computed)) {
            computed = computed->src[0];
        }
        key k;
        k.tensor = computed->op == GGML_OP_NONE ? nullptr : computed;
        k.data   = x->data;
        std::memcpy(k.ne, x->ne, sizeof(k.ne));
        std::memcpy(k.nb, x->nb, sizeof(k.nb));
        return k;
    }

    static bool same(const key & a, const key & b) {
        return a.tensor == b.tensor && a.data == b.data && a.group == b.group &&
               std::memcmp(a.ne, b.ne, sizeof(a.ne)) == 0 && std::memcmp(a.nb, b.nb, sizeof(a.nb)) == 0;
    }

    slot                slots[n_slots];
    uint64_t            calls = 0;
    std::vector<void *> allocations;
};

#endif  // GGML_EXT_ACTIVATION_SLOTS_H
