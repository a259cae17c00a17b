// Blocks and runs of a paged KV cache against the plainest model of it: per lane and list a map from position to the
// value that was stored for it. After every few steps every lane must find its values where the runs say they are, rising
// positions, and free and held blocks must make all of them.

#include "check.h"
#include "kv/pages.h"

#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace {

constexpr uint32_t N_LANES = 6, N_LISTS = 3, N_BLOCKS = 40, SLOTS = GGML_EXT_KV_SLOTS, CHECK_EVERY = 8;

// What lane 0 .. holds: position -> a number that no other token has.
using Lane = std::map<llama_pos, int>;

struct Walk {
    ggml_ext_kv_pages    pages{ N_LANES, N_LISTS, N_BLOCKS };
    std::vector<int32_t> positions = std::vector<int32_t>(N_BLOCKS * SLOTS, -1);
    std::vector<int>     values    = std::vector<int>(N_BLOCKS * SLOTS, -1);
    std::vector<Lane>    lanes     = std::vector<Lane>(N_LANES);
    int                  next      = 0;
    std::mt19937         random;

    explicit Walk(unsigned seed) : random(seed) { pages.keep_positions(positions.data(), SLOTS); }

    uint32_t below(uint32_t n) { return random() % n; }

    llama_pos end_of(uint32_t lane) const { return lanes[lane].empty() ? 0 : lanes[lane].rbegin()->first + 1; }

    void check(const std::string & step) {
        std::set<int32_t> held;
        for (uint32_t lane = 0; lane < N_LANES; ++lane) {
            for (uint32_t list = 0; list < N_LISTS; ++list) {
                Lane found;
                int  last = -1;
                for (const ggml_ext_kv_entry & entry : pages.list(lane, list)) {
                    held.insert(entry.block);
                    for (int i = entry.begin; i < entry.begin + entry.count; ++i) {
                        const int position = pages.positions(entry.block)[i];
                        CHECK(position > last, "%s: lane %u list %u: %d behind %d", step.c_str(), lane, list, position,
                              last);
                        last            = position;
                        found[position] = values[entry.block * SLOTS + i] / int(N_LISTS);
                        CHECK(values[entry.block * SLOTS + i] % int(N_LISTS) == int(list), "%s: another list's slot",
                              step.c_str());
                    }
                }
                CHECK(found == lanes[lane], "%s: lane %u list %u holds %zu tokens, %zu expected", step.c_str(), lane,
                      list, found.size(), lanes[lane].size());
            }
        }
        CHECK(held.size() + pages.n_free() == N_BLOCKS, "%s: %zu held and %u free", step.c_str(), held.size(),
              pages.n_free());
    }

    // n tokens at the end of the given lanes, as far as the blocks reach.
    void append(std::vector<llama_seq_id> to, uint32_t n) {
        llama_pos position = 0;
        for (llama_seq_id lane : to) {
            position = std::max(position, end_of(lane));
        }
        if (to.size() == 1) {
            const bool fits = pages.n_needed(to[0], n) <= pages.n_free();
            CHECK(!fits || would_fit(to, n, position), "n_needed promised too much");
        }
        while (n-- > 0 && would_fit(to, 1, position)) {
            int32_t slots[N_LISTS];
            CHECK(pages.append(to.data(), to.size(), position, slots), "append after a copy took it");
            for (uint32_t list = 0; list < N_LISTS; ++list) {
                values[slots[list]] = next * int(N_LISTS) + int(list);
            }
            for (llama_seq_id lane : to) {
                lanes[lane][position] = next;
            }
            next++;
            position++;
        }
    }

    // One token at a position that none of the lanes has, most often among those that they have.
    void insert(const std::vector<llama_seq_id> & to, llama_pos position) {
        const bool taken =
            std::any_of(to.begin(), to.end(), [&](llama_seq_id lane) { return lanes[lane].count(position) > 0; });
        if (taken || pages.n_free() < N_LISTS) {
            return;
        }
        for (uint32_t list = 0; list < N_LISTS; ++list) {
            const int32_t slot = pages.insert(list, to, position);
            CHECK(slot >= 0, "no slot with %u blocks free", pages.n_free());
            CHECK(positions[slot] == position, "slot %d holds position %d", slot, positions[slot]);
            values[slot] = next * int(N_LISTS) + int(list);
        }
        for (llama_seq_id lane : to) {
            lanes[lane][position] = next;
        }
        next++;
    }

    bool would_fit(const std::vector<llama_seq_id> & to, uint32_t n, llama_pos position) const {
        ggml_ext_kv_pages copy = pages;
        copy.keep_positions(nullptr, 0);
        int32_t slots[N_LISTS];
        while (n-- > 0) {
            if (!copy.append(to.data(), to.size(), position++, slots)) {
                return false;
            }
        }
        return true;
    }

    void remove(uint32_t lane, llama_pos p0, llama_pos p1) {
        pages.remove(lane, p0, p1);
        lanes[lane].erase(lanes[lane].lower_bound(p0), lanes[lane].lower_bound(std::max(p0, p1)));
    }

    void share(uint32_t from, uint32_t to, llama_pos p0, llama_pos p1) {
        if (from == to) {
            return;
        }
        Lane       copied(lanes[from].lower_bound(p0), lanes[from].lower_bound(std::max(p0, p1)));
        const bool other = std::any_of(copied.begin(), copied.end(), [&](const auto & token) {
            const auto held = lanes[to].find(token.first);
            return held != lanes[to].end() && held->second != token.second;
        });
        const bool done  = pages.share(from, to, p0, std::max(p0, p1));
        CHECK(done == !other, "a copy that is %s", other ? "of other tokens than are there" : "fine");
        if (done) {
            lanes[to].insert(copied.begin(), copied.end());
        }
    }

    std::string step() {
        const uint32_t  lane = below(N_LANES), other = below(N_LANES);
        const llama_pos end = end_of(lane), cut = llama_pos(below(uint32_t(end) + 2));
        switch (below(12)) {
            case 0:
                pages.clear(lane);
                lanes[lane].clear();
                return "clear";
            case 1:
                remove(lane, cut, INT32_MAX);
                return "cut";
            case 2:
                remove(lane, cut, cut + llama_pos(below(80)));
                return "hole";
            case 3:
                remove(other, 0, INT32_MAX);
                share(lane, other, 0, INT32_MAX);
                return "copy";
            case 4:
                share(lane, other, cut, cut + llama_pos(below(150)));
                return "part";
            case 5:
                append({ llama_seq_id(lane), llama_seq_id((lane + 1 + below(N_LANES - 1)) % N_LANES) }, below(20));
                return "coupled";
            case 6:
                insert({ llama_seq_id(lane) }, cut);
                return "insert";
            case 7:
                insert({ llama_seq_id(lane), llama_seq_id((lane + 1 + below(N_LANES - 1)) % N_LANES) }, cut);
                return "insert into two";
            default:
                append({ llama_seq_id(lane) }, 1 + below(below(4) ? 8 : 200));
                return "append";
        }
    }
};

void test_random_walks() {
    for (unsigned seed = 1; seed <= 20 && check_failures == 0; ++seed) {
        Walk walk(seed);
        for (int i = 0; i < 5000 && check_failures == 0; ++i) {
            const std::string step = walk.step();
            if (i % CHECK_EVERY == 0) {
                walk.check(step + " " + std::to_string(i) + " of walk " + std::to_string(seed));
            }
        }
    }
}

void test_a_shared_prefix_is_stored_once() {
    Walk walk(0);
    walk.append({ 0 }, 2 * SLOTS + 10);
    for (uint32_t lane = 1; lane < N_LANES; ++lane) {
        walk.share(0, lane, 0, INT32_MAX);
    }
    CHECK(N_BLOCKS - walk.pages.n_free() == 3 * N_LISTS, "%u free", walk.pages.n_free());
    // The first to go on fills the open block, the others start their own; which of them is not known beforehand.
    uint64_t needed = 0;
    for (uint32_t lane = 0; lane < N_LANES; ++lane) {
        needed += walk.pages.n_needed(lane, 1);
    }
    CHECK(needed >= (N_LANES - 1) * N_LISTS, "%d blocks needed at most", int(needed));
    for (llama_seq_id lane = 0; lane < llama_seq_id(N_LANES); ++lane) {
        walk.append({ lane }, 1);
    }
    CHECK(N_BLOCKS - walk.pages.n_free() == (3 + N_LANES - 1) * N_LISTS, "%u free", walk.pages.n_free());
    walk.check("diverged");
}

void test_what_was_cut_is_written_again() {
    Walk walk(0);
    walk.append({ 0 }, 50);
    walk.remove(0, 20, INT32_MAX);
    walk.append({ 0 }, 44);
    CHECK(N_BLOCKS - walk.pages.n_free() == N_LISTS, "%u free", walk.pages.n_free());
    walk.check("cut and filled");
    // Not what another lane still sees.
    walk.share(0, 1, 0, INT32_MAX);
    walk.remove(0, 30, INT32_MAX);
    walk.append({ 0 }, 5);
    CHECK(N_BLOCKS - walk.pages.n_free() == 2 * N_LISTS, "%u free", walk.pages.n_free());
    walk.check("cut under another lane");
}

void test_tokens_between_others() {
    Walk walk(0);
    walk.append({ 0 }, 40);
    walk.remove(0, 10, 20);
    walk.share(0, 1, 0, INT32_MAX);
    for (llama_pos position : { 15, 16, 17, 12, 13 }) {
        walk.insert({ 0, 1 }, position);
    }
    walk.insert({ 0 }, 40);
    walk.check("inserted");
    CHECK(N_BLOCKS - walk.pages.n_free() <= 4 * N_LISTS, "%u free", walk.pages.n_free());
    while (walk.pages.n_free() > 0) {
        walk.insert({ 2 }, walk.end_of(2));
        if (walk.pages.n_free() < N_LISTS) {
            break;
        }
    }
    walk.check("full");
}

void test_the_last_block() {
    Walk walk(0);
    walk.append({ 0 }, N_BLOCKS / N_LISTS * SLOTS);
    CHECK(walk.pages.n_free() == N_BLOCKS % N_LISTS, "%u free", walk.pages.n_free());
    CHECK(!walk.would_fit({ 0 }, 1, walk.end_of(0)), "a token without a block");
    walk.remove(0, walk.end_of(0) - 1, INT32_MAX);
    CHECK(walk.would_fit({ 0 }, 1, walk.end_of(0)), "the slot that was given up");
}

}  // namespace

int main() {
    test_a_shared_prefix_is_stored_once();
    test_what_was_cut_is_written_again();
    test_the_last_block();
    test_tokens_between_others();
    test_random_walks();
    return check_done();
}
