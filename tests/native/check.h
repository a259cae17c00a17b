// The smallest test harness: CHECK counts and prints failures, check_done() is main's return value.

#pragma once

#include <cstdio>

static int check_failures = 0;

#define CHECK(condition, ...)                                           \
    do {                                                                \
        if (!(condition)) {                                             \
            check_failures++;                                           \
            std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            std::printf(__VA_ARGS__);                                   \
            std::printf("\n");                                          \
        }                                                               \
    } while (0)

static inline int check_done(void) {
    std::printf("%s\n", check_failures ? "FAILED" : "ok");
    return check_failures ? 1 : 0;
}
