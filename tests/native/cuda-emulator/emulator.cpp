#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>

#ifdef __SANITIZE_ADDRESS__
#    include <sanitizer/common_interface_defs.h>
#endif

namespace ggml_ext_emulator {

uint3 thread_idx, block_idx;
dim3  block_dim, grid_dim;

namespace {

constexpr size_t stack_size = 256 * 1024;
constexpr int    poison     = 0xff;  // NaN as float and half, -1 as an integer

struct copy {
    void *       to;
    const void * from;
    size_t       size;
    bool         valid;
};

enum class state { ready, at_barrier, in_warp, done };

struct fiber {
    ucontext_t                     context;
    char *                         stack      = nullptr;
    void *                         fake_stack = nullptr;  // of the address sanitizer
    uint3                          index;
    state                          now;
    int                            barrier_result;
    char                           all_parts[32 * exchange_limit];  // of its latest warp operation
    std::vector<copy>              open;                            // cp_async since the last commit
    std::vector<std::vector<copy>> groups;                          // committed, oldest first
    bool                           has_waited = false;              // grid_dependency_wait
};

// A warp operation that lanes have begun: all of `mask` must come with parts of the same size.
struct warp {
    unsigned arrived = 0, mask = 0;
    size_t   size = 0;
    char     parts[32 * exchange_limit];
};

ucontext_t                           scheduler;
std::vector<fiber>                   fibers;
std::vector<warp>                    warps;
size_t                               current;
std::vector<std::unique_ptr<char[]>> stacks;
char *                               shared_memory;
const std::function<void()> *        kernel;
std::mt19937                         order(1);
int                                  barrier_waiting, barrier_sum, n_running;
#ifdef __SANITIZE_ADDRESS__
const void * scheduler_stack;
size_t       scheduler_stack_size;
#endif

void to_scheduler(bool last = false) {
    fiber & f = fibers[current];
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(last ? nullptr : &f.fake_stack, scheduler_stack, scheduler_stack_size);
#else
    (void) last;
#endif
    swapcontext(&f.context, &scheduler);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
}

void to_fiber(size_t i) {
    current    = i;
    fiber & f  = fibers[i];
    thread_idx = f.index;
#ifdef __SANITIZE_ADDRESS__
    void * fake;
    __sanitizer_start_switch_fiber(&fake, f.stack, stack_size);
#endif
    swapcontext(&scheduler, &f.context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void perform(std::vector<copy> & copies) {
    for (const copy & c : copies) {
        if (c.valid) {
            std::memcpy(c.to, c.from, c.size);
        } else {
            std::memset(c.to, 0, c.size);
        }
    }
    copies.clear();
}

void release_barrier() {
    for (fiber & f : fibers) {
        if (f.now == state::at_barrier) {
            f.now            = state::ready;
            f.barrier_result = barrier_sum;
        }
    }
    barrier_waiting = barrier_sum = 0;
}

void thread_main() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
    (*kernel)();
    fiber & f = fibers[current];
    f.now     = state::done;
    n_running--;
    if (n_running > 0 && barrier_waiting == n_running) {
        release_barrier();
    }
    to_scheduler(true);
}

void start(size_t i) {
    fiber & f = fibers[i];
    while (stacks.size() <= i) {
        stacks.emplace_back(new char[stack_size]);
    }
    f.stack = stacks[i].get();
    f.now   = state::ready;
    f.index = { unsigned(i) % block_dim.x, unsigned(i) / block_dim.x % block_dim.y,
                unsigned(i) / (block_dim.x * block_dim.y) };
    getcontext(&f.context);
    f.context.uc_stack.ss_sp   = f.stack;
    f.context.uc_stack.ss_size = stack_size;
    f.context.uc_link          = nullptr;
    makecontext(&f.context, thread_main, 0);
}

// Exactly as much as asked for, so that the address sanitizer sees the first byte past it.
void allocate_shared(size_t n_bytes) {
    void * memory = nullptr;
    if (n_bytes && posix_memalign(&memory, 128, n_bytes)) {
        fail("no memory");
    }
    if (memory) {
        std::memset(memory, poison, n_bytes);
    }
    shared_memory = static_cast<char *>(memory);
}

// Runs every thread of a warp that is ready up to its next wait, in any order. Returns whether there was one.
bool run_warp(size_t warp) {
    size_t lanes[32], n = 0;
    for (size_t i = 32 * warp; i < std::min(32 * warp + 32, fibers.size()); i++) {
        lanes[n++] = i;
    }
    std::shuffle(lanes, lanes + n, order);
    bool moved = false;
    for (size_t i = 0; i < n; i++) {
        if (fibers[lanes[i]].now == state::ready) {
            to_fiber(lanes[i]);
            moved = true;
        }
    }
    return moved;
}

// Any warp with a thread that can run.
size_t ready_warp() {
    std::vector<size_t> ready;
    for (size_t i = 0; i < fibers.size(); i++) {
        if (fibers[i].now == state::ready && (ready.empty() || ready.back() != i / 32)) {
            ready.push_back(i / 32);
        }
    }
    if (ready.empty()) {
        fail("deadlock: threads wait at a barrier or in a warp operation that others never reach");
    }
    return ready[order() % ready.size()];
}

void run_block(size_t n_threads) {
    fibers.clear();
    fibers.resize(n_threads);
    warps.clear();
    warps.resize((n_threads + 31) / 32);
    n_running       = int(n_threads);
    barrier_waiting = barrier_sum = 0;
    for (size_t i = 0; i < n_threads; i++) {
        start(i);
    }
    while (n_running > 0) {
        // One warp runs on while the others stand still, so that a barrier that is missing shows.
        const size_t warp = ready_warp();
        for (int rounds = 1 << order() % 8; rounds > 0 && run_warp(warp); rounds--) {
        }
    }
}

}  // namespace

void fail(const char * what) {
    std::fprintf(stderr, "CUDA emulator: %s (block %u %u %u, thread %u %u %u)\n", what, block_idx.x, block_idx.y,
                 block_idx.z, thread_idx.x, thread_idx.y, thread_idx.z);
    std::abort();
}

void seed(uint32_t value) {
    order.seed(value);
}

char * dynamic_shared() {
    return shared_memory;
}

unsigned lane() {
    return unsigned(current % 32);
}

int block_barrier(int value) {
    barrier_sum += value;
    barrier_waiting++;
    fibers[current].now = state::at_barrier;
    if (barrier_waiting == n_running) {
        release_barrier();
    }
    // Even the last thread gives way, so that the others' code runs before and after its own.
    to_scheduler();
    return fibers[current].barrier_result;
}

const char * exchange(unsigned mask, const void * mine, size_t size) {
    const unsigned own = lane();
    if (!(mask >> own & 1)) {
        fail("a lane takes part in a warp operation whose mask leaves it out");
    }
    const size_t first = current / 32 * 32;
    warp &       w     = warps[current / 32];
    if (w.arrived && (w.mask != mask || w.size != size)) {
        fail("lanes of one warp are in different warp operations");
    }
    w.mask = mask;
    w.size = size;
    w.arrived |= 1u << own;
    std::memcpy(w.parts + own * size, mine, size);
    fibers[current].now = state::in_warp;
    if (w.arrived == mask) {
        for (size_t i = first; i < std::min(first + 32, fibers.size()); i++) {
            if (mask >> (i - first) & 1) {
                std::memcpy(fibers[i].all_parts, w.parts, 32 * size);
                fibers[i].now = state::ready;
            }
        }
        w.arrived = 0;
    }
    to_scheduler();
    return fibers[current].all_parts;
}

// Until the wait, what is at the destination is unknown: a device may write it at once or at the last moment.
void async_copy(void * to, const void * from, size_t size, bool valid) {
    std::memset(to, poison, size);
    fibers[current].open.push_back({ to, from, size, valid });
}

void async_commit() {
    fiber & f = fibers[current];
    f.groups.push_back(std::move(f.open));
    f.open.clear();
}

void async_wait(int pending) {
    fiber & f = fibers[current];
    while (f.groups.size() > size_t(pending)) {
        perform(f.groups.front());
        f.groups.erase(f.groups.begin());
    }
}

void wait_for_grid() {
    fibers[current].has_waited = true;
}

bool has_waited() {
    return fibers[current].has_waited;
}

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()> & body) {
    const size_t n_threads = size_t(block.x) * block.y * block.z;
    if (n_threads == 0 || n_threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 ||
        grid.z > 65535 || shared_bytes > 227 * 1024) {
        fail("a launch that no device takes");
    }
    block_dim = block;
    grid_dim  = grid;
    kernel    = &body;
    for (unsigned z = 0; z < grid.z; z++) {
        for (unsigned y = 0; y < grid.y; y++) {
            for (unsigned x = 0; x < grid.x; x++) {
                block_idx = { x, y, z };
                allocate_shared(shared_bytes);
                run_block(n_threads);
                std::free(shared_memory);
            }
        }
    }
}

}  // namespace ggml_ext_emulator
