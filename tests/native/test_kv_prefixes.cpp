// Equal beginnings: merged where the tokens, and the graphs that read them, are the same from position 0 on, and nowhere
// else. The oracle names every token by its whole history; a slot keeps the name of the token that was stored in it, so
// after any number of merges a lane must find the names of its own histories.

#include "check.h"
#include "kv/pages.h"
#include "kv/prefixes.h"

#include <map>
#include <random>
#include <tuple>
#include <vector>

namespace {

constexpr uint32_t N_LANES = 5, N_LISTS = 2, N_BLOCKS = 80, SLOTS = GGML_EXT_KV_SLOTS;

struct Walk {
    ggml_ext_kv_pages    pages{ N_LANES, N_LISTS, N_BLOCKS };
    ggml_ext_kv_prefixes prefixes{ N_LANES };
    std::vector<int32_t> positions = std::vector<int32_t>(N_BLOCKS * SLOTS, -1);
    std::vector<int>     names     = std::vector<int>(N_BLOCKS * SLOTS, -1);

    std::vector<std::vector<int>>            lanes = std::vector<std::vector<int>>(N_LANES);  // names by position
    std::map<std::tuple<int, int, int>, int> known;  // name by the name before, token and kind
    std::mt19937                             random;

    explicit Walk(unsigned seed) : random(seed) { pages.keep_positions(positions.data(), SLOTS); }

    uint32_t below(uint32_t n) { return random() % n; }

    bool append(uint32_t lane, int token, uint32_t kind) {
        const llama_seq_id id       = llama_seq_id(lane);
        const llama_pos    position = llama_pos(lanes[lane].size());
        int32_t            slots[N_LISTS];
        if (!pages.append(&id, 1, position, slots)) {
            cut(lane, position);  // what was stored of it
            return false;
        }
        const std::tuple<int, int, int> history = { lanes[lane].empty() ? -1 : lanes[lane].back(), token, int(kind) };
        const int                       name    = known.emplace(history, int(known.size())).first->second;
        for (int32_t slot : slots) {
            names[slot] = name;
        }
        lanes[lane].push_back(name);
        prefixes.add(lane, position, token, kind);
        return true;
    }

    void read(uint32_t lane, const std::vector<int> & tokens, uint32_t kind = 1) {
        for (int token : tokens) {
            if (!append(lane, token, kind)) {
                break;
            }
        }
        prefixes.merge(lane, pages);
    }

    void cut(uint32_t lane, llama_pos p0) {
        pages.remove(lane, p0, INT32_MAX);
        prefixes.cut(lane, p0);
        lanes[lane].resize(std::min(lanes[lane].size(), size_t(p0)));
    }

    void copy(uint32_t from, uint32_t to, llama_pos p1) {
        cut(to, 0);
        CHECK(pages.share(from, to, 0, p1), "a copy into an empty lane");
        prefixes.copy(from, to, 0, p1);
        lanes[to] = lanes[from];
        lanes[to].resize(std::min(lanes[to].size(), size_t(p1)));
    }

    uint32_t n_used() const { return N_BLOCKS - pages.n_free(); }

    void check(const char * step) const {
        for (uint32_t lane = 0; lane < N_LANES; ++lane) {
            for (uint32_t list = 0; list < N_LISTS; ++list) {
                std::vector<int> found;
                for (const ggml_ext_kv_entry & entry : pages.list(lane, list)) {
                    for (int i = entry.begin; i < entry.begin + entry.count; ++i) {
                        CHECK(pages.positions(entry.block)[i] == int(found.size()), "%s: a position", step);
                        found.push_back(names[entry.block * SLOTS + i]);
                    }
                }
                CHECK(found == lanes[lane], "%s: lane %u finds another history", step, lane);
            }
        }
    }
};

std::vector<int> tokens(int n, int seed) {
    std::mt19937     random(seed);
    std::vector<int> result(n);
    for (int & token : result) {
        token = int(random() % 100);
    }
    return result;
}

std::vector<int> joined(std::vector<int> a, const std::vector<int> & b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

void test_what_is_shared() {
    Walk                   walk(0);
    const std::vector<int> beginning = tokens(150, 1);
    walk.read(0, joined(beginning, tokens(20, 2)));
    CHECK(walk.n_used() == 3 * N_LISTS, "%u used", walk.n_used());
    walk.read(1, joined(beginning, tokens(20, 3)));
    CHECK(walk.n_used() == 4 * N_LISTS, "two whole blocks are common: %u used", walk.n_used());
    walk.read(2, joined(beginning, tokens(20, 4)), 2);
    CHECK(walk.n_used() == 7 * N_LISTS, "another graph's rows: %u used", walk.n_used());
    walk.read(3, joined(beginning, tokens(20, 5)), 2);
    CHECK(walk.n_used() == 8 * N_LISTS, "of the same graph: %u used", walk.n_used());
    walk.read(4, joined(tokens(64, 9), std::vector<int>(beginning.begin() + 64, beginning.end())));
    CHECK(walk.n_used() == 11 * N_LISTS, "the same block behind another one: %u used", walk.n_used());
    walk.check("shared");
    walk.cut(0, 0);
    walk.read(0, tokens(64 * 3, 7));
    walk.check("the first reader gone");
}

// A block that its lane wrote anew is not what was known of it.
void test_blocks_that_changed() {
    Walk                   walk(0);
    const std::vector<int> first = tokens(64, 1);
    walk.read(0, first);
    walk.cut(0, 30);
    walk.read(0, tokens(34, 2));
    walk.read(1, first);
    walk.check("changed");
    CHECK(walk.n_used() == 2 * N_LISTS, "%u used", walk.n_used());
    walk.read(2, joined(std::vector<int>(first.begin(), first.begin() + 30), tokens(34, 2)));
    walk.check("as it is now");
    CHECK(walk.n_used() == 2 * N_LISTS, "%u used", walk.n_used());
}

void test_random_walks() {
    for (unsigned seed = 1; seed <= 30 && check_failures == 0; ++seed) {
        Walk walk(seed);
        for (int i = 0; i < 1000 && check_failures == 0; ++i) {
            const uint32_t lane = walk.below(N_LANES);
            const uint32_t size = uint32_t(walk.lanes[lane].size());
            switch (walk.below(6)) {
                case 0:
                    walk.cut(lane, llama_pos(walk.below(4) ? walk.below(size + 1) : 0));
                    break;
                case 1:
                    walk.copy(lane, (lane + 1) % N_LANES, llama_pos(walk.below(300)));
                    break;
                default:
                    // One of few texts, from where the lane is, so that many histories are equal.
                    const std::vector<int> text = tokens(400, int(walk.below(2)));
                    const uint32_t         n    = std::min(walk.below(150), 400 - std::min(size, 400u));
                    walk.read(lane, { text.begin() + std::min(size, 400u), text.begin() + std::min(size, 400u) + n },
                              1 + (walk.below(8) == 0));
            }
            walk.check("walk");
        }
    }
}

}  // namespace

int main() {
    test_what_is_shared();
    test_blocks_that_changed();
    test_random_walks();
    return check_done();
}
