// Random sequences in pages that share, part, are cut and lose slots, beside maps that say what each should hold.

#pragma once

#include "check.h"
#include "kv/evict.h"
#include "kv/pages.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

constexpr uint32_t N_LANES = 4, N_LISTS = 3, N_BLOCKS = 60, SLOTS = GGML_EXT_KV_SLOTS, SINK = 4, RECENT = 20;

struct Token {
    int   name;
    float score;

    bool operator==(const Token & other) const { return name == other.name; }
};

using Lane = std::map<llama_pos, Token>;

struct Walk {
    ggml_ext_kv_pages              pages{ N_LANES, N_LISTS, N_BLOCKS };
    std::vector<int32_t>           positions = std::vector<int32_t>(N_BLOCKS * SLOTS, -1);
    std::vector<Token>             stored    = std::vector<Token>(N_BLOCKS * SLOTS);
    std::vector<std::vector<Lane>> lanes     = std::vector<std::vector<Lane>>(N_LANES, std::vector<Lane>(N_LISTS));
    std::mt19937                   random;
    int                            next = 0;
    ggml_ext_kv_eviction           rule{ SINK, RECENT, 0.2, 0, 0, {}, {}, {} };

    explicit Walk(unsigned seed) : random(seed) {
        pages.keep_positions(positions.data(), SLOTS);
        rule.score = [this](uint32_t, int32_t slot) { return stored[slot].score; };
        rule.move  = [this](uint32_t, int32_t from, int32_t to, uint32_t n) {
            CHECK(to / int32_t(SLOTS) != from / int32_t(SLOTS) || to < from, "a slot moved upwards");
            CHECK(n > 0 && std::max(from % SLOTS, to % SLOTS) + n <= SLOTS, "%u slots are of several blocks", n);
            std::copy_n(stored.begin() + from, n, stored.begin() + to);
            std::copy_n(positions.begin() + from, n, positions.begin() + to);
        };
    }

    uint32_t below(uint32_t n) { return random() % n; }

    llama_pos end_of(uint32_t lane) const {
        llama_pos end = 0;
        for (const Lane & list : lanes[lane]) {
            end = std::max(end, list.empty() ? 0 : list.rbegin()->first + 1);
        }
        return end;
    }

    void append(uint32_t lane, uint32_t n) {
        for (llama_pos position = end_of(lane); n > 0; --n, ++position) {
            if (pages.n_needed(lane, 1) > pages.n_free()) {
                return;
            }
            const llama_seq_id id = llama_seq_id(lane);
            int32_t            slots[N_LISTS];
            CHECK(pages.append(&id, 1, position, slots), "append");
            for (uint32_t list = 0; list < N_LISTS; ++list) {
                // Whole numbers, so that there are equals; a list of its own range, so that floors count.
                const Token token           = { next++, float(below(50) + 10 * list) };
                stored[slots[list]]         = token;
                lanes[lane][list][position] = token;
            }
        }
    }

    void remove(uint32_t lane, llama_pos p0, llama_pos p1) {
        pages.remove(lane, p0, p1);
        for (Lane & list : lanes[lane]) {
            list.erase(list.lower_bound(p0), list.lower_bound(std::max(p0, p1)));
        }
    }

    void copy(uint32_t from, uint32_t to) {
        if (from != to) {
            remove(to, 0, INT32_MAX);
            CHECK(pages.share(from, to, 0, INT32_MAX), "copy");
            lanes[to] = lanes[from];
        }
    }

    std::vector<int32_t> slots_of(uint32_t lane, uint32_t list) const {
        std::vector<int32_t> slots;
        for (const ggml_ext_kv_entry & run : pages.list(lane, list)) {
            for (int i = run.begin; i < run.begin + run.count; ++i) {
                slots.push_back(run.block * int32_t(SLOTS) + i);
            }
        }
        return slots;
    }

    Lane found(uint32_t lane, uint32_t list) const {
        Lane result;
        int  last = -1;
        for (const int32_t slot : slots_of(lane, list)) {
            CHECK(positions[slot] > last, "positions do not rise");
            last         = positions[slot];
            result[last] = stored[slot];
        }
        return result;
    }

    void check(const char * step) const {
        for (uint32_t lane = 0; lane < N_LANES; ++lane) {
            for (uint32_t list = 0; list < N_LISTS; ++list) {
                CHECK(found(lane, list) == lanes[lane][list], "%s: lane %u list %u", step, lane, list);
            }
        }
    }

    void evict(uint32_t wanted) {
        const uint32_t free_before = pages.n_free();
        const bool     done        = ggml_ext_kv_evict(pages, rule, wanted);
        if (!done) {
            check("refused");
            CHECK(pages.n_free() == free_before, "refused and changed");
            CHECK(!possible(wanted), "refused %u of %u blocks", wanted, N_BLOCKS);
            return;
        }
        CHECK(pages.n_free() >= wanted, "%u free, %u wanted", pages.n_free(), wanted);
        compare(wanted);
    }

    static bool needed(const Lane & list, llama_pos position) {
        return position < llama_pos(SINK) || position > list.rbegin()->first - llama_pos(RECENT);
    }

    // By name: tokens of a list, and those that some lane needs.
    void names(uint32_t list, std::map<int, float> & all, std::set<int> & keep) const {
        for (uint32_t lane = 0; lane < N_LANES; ++lane) {
            for (const auto & [position, token] : lanes[lane][list]) {
                all[token.name] = token.score;
                if (needed(lanes[lane][list], position)) {
                    keep.insert(token.name);
                }
            }
        }
    }

    size_t least(uint32_t wanted) const {
        const size_t share = size_t(rule.floor * (N_BLOCKS - wanted) / N_LISTS) * SLOTS;
        return share - std::min<size_t>(share, rule.incoming);
    }

    // That n tokens of a list take, and those that come.
    uint32_t blocks_for(size_t n) const { return uint32_t((n + rule.incoming + SLOTS - 1) / SLOTS); }

    bool possible(uint32_t wanted) const {
        uint32_t blocks = 0;
        for (uint32_t list = 0; list < N_LISTS; ++list) {
            std::map<int, float> all;
            std::set<int>        keep;
            names(list, all, keep);
            const size_t n = std::max(keep.size(), std::min(all.size(), least(wanted)));
            blocks += blocks_for(n);
        }
        return blocks + wanted <= N_BLOCKS;
    }

    void compare(uint32_t wanted) {
        float highest_gone = -1, lowest_left = 1e9f;
        for (uint32_t list = 0; list < N_LISTS; ++list) {
            std::map<int, float> all;
            std::set<int>        keep, left;
            names(list, all, keep);
            for (uint32_t lane = 0; lane < N_LANES; ++lane) {
                Lane now = found(lane, list);
                for (const auto & [position, token] : now) {
                    left.insert(token.name);
                }
            }
            const size_t floor = std::min(all.size(), least(wanted));
            CHECK(left.size() >= floor, "list %u keeps %zu of at least %zu", list, left.size(), floor);
            for (const auto & [name, score] : all) {
                CHECK(left.count(name) || !keep.count(name), "a token that is needed went");
                if (!left.count(name)) {
                    highest_gone = std::max(highest_gone, score);
                } else if (!keep.count(name) && left.size() > floor) {
                    lowest_left = std::min(lowest_left, score);
                }
            }
            for (uint32_t lane = 0; lane < N_LANES; ++lane) {
                Lane expected;
                for (const auto & [position, token] : lanes[lane][list]) {
                    if (left.count(token.name)) {
                        expected[position] = token;
                    }
                }
                CHECK(found(lane, list) == expected, "lane %u list %u lost what another lane kept", lane, list);
                lanes[lane][list] = expected;
            }
        }
        CHECK(highest_gone <= lowest_left, "a score of %.0f went, one of %.0f stayed", highest_gone, lowest_left);
    }

    // Of slot i of a lane's list.
    float pooled(const std::vector<int32_t> & slots, size_t i) const {
        float best = stored[slots[i]].score;
        if (std::isnan(best)) {
            return -INFINITY;
        }
        for (size_t j = i - std::min<size_t>(i, rule.pool); j < std::min(slots.size(), i + rule.pool + 1); ++j) {
            const float score = stored[slots[j]].score;
            best              = score < INFINITY ? std::max(best, score) : best;
        }
        return best;
    }

    // The slots that go for `wanted` blocks; enough: whether that suffices.
    std::set<int32_t> gone_by_rule(uint32_t wanted, bool & enough) const {
        std::vector<std::tuple<float, llama_pos, int32_t, uint32_t>> order;
        std::vector<size_t>                                          n(N_LISTS);
        for (uint32_t list = 0; list < N_LISTS; ++list) {
            std::map<int32_t, float> scores;
            std::set<int32_t>        keep;
            for (uint32_t lane = 0; lane < N_LANES; ++lane) {
                const std::vector<int32_t> slots = slots_of(lane, list);
                for (size_t i = 0; i < slots.size(); ++i) {
                    float & score = scores.emplace(slots[i], -INFINITY).first->second;
                    score         = std::max(score, pooled(slots, i));
                    if (needed(lanes[lane][list], positions[slots[i]])) {
                        keep.insert(slots[i]);
                    }
                }
            }
            n[list] = scores.size();
            for (const auto & [slot, score] : scores) {
                if (!keep.count(slot)) {
                    order.emplace_back(score, positions[slot], slot, list);
                }
            }
        }
        std::sort(order.begin(), order.end());
        std::set<int32_t> gone;
        for (auto next = order.begin();; ++next) {
            size_t used = 0;
            for (const size_t each : n) {
                used += blocks_for(each);
            }
            enough = used + wanted <= N_BLOCKS;
            if (enough || next == order.end()) {
                return gone;
            }
            const auto [score, position, slot, list] = *next;
            if (n[list] > least(wanted)) {
                gone.insert(slot);
                n[list]--;
            }
        }
    }

    void evict_by_rule(uint32_t wanted) {
        bool                                          enough;
        const std::set<int32_t>                       gone = gone_by_rule(wanted, enough);
        std::multiset<std::pair<uint32_t, llama_pos>> lost, expected;
        for (uint32_t lane = 0; lane < N_LANES && enough; ++lane) {
            for (uint32_t list = 0; list < N_LISTS; ++list) {
                for (const int32_t slot : slots_of(lane, list)) {
                    if (gone.count(slot)) {
                        expected.emplace(lane, positions[slot]);
                        lanes[lane][list].erase(positions[slot]);
                    }
                }
            }
        }
        rule.lost = [&](uint32_t lane, llama_pos position) { lost.emplace(lane, position); };
        CHECK(ggml_ext_kv_evict(pages, rule, wanted) == enough, "%u of %u blocks", wanted, N_BLOCKS);
        CHECK(lost == expected, "%zu lost, %zu expected", lost.size(), expected.size());
    }
};
