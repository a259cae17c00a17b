// A digest that tells files apart which were not made to collide: FNV-1a with 64 bits.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

class ggml_ext_digest {
  public:
    void add(const void * data, size_t size) {
        const auto * bytes = static_cast<const unsigned char *>(data);
        for (size_t i = 0; i < size; i++) {
            state = (state ^ bytes[i]) * 0x100000001b3u;
        }
    }

    // With the length in front, so that neighbouring values cannot run into each other.
    template <typename T> void add(const std::vector<T> & values) {
        add(values.size());
        add(values.data(), values.size() * sizeof(T));
    }

    void add(const std::string & text) {
        add(text.size());
        add(text.data(), text.size());
    }

    void add(uint64_t number) { add(&number, sizeof(number)); }

    uint64_t value() const { return state; }

  private:
    uint64_t state = 0xcbf29ce484222325u;
};
