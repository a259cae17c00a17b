// Eviction by head against its rule, over random sequences that share, part and are cut: what is needed stays, the lowest
// scores go first wherever they are, no list falls below its floor, sharers lose the same tokens, the blocks asked for
// are free, and what stays is found where the runs say it is. The rule taken word by word says which slots go, also where
// scores are equal, not numbers or not there yet, and where neighbours lend each other theirs.

#include "kv_evict_walk.h"

namespace {

// Slots that no lane needs, by position, and the lanes that see each, against a look at every slot of every lane.
void check_old_slots(const Walk & walk) {
    for (uint32_t list = 0; list < N_LISTS; ++list) {
        std::map<std::pair<llama_pos, int32_t>, std::vector<llama_seq_id>> expected;
        std::set<std::pair<llama_pos, int32_t>>                            needed;
        for (uint32_t lane = 0; lane < N_LANES; ++lane) {
            for (const int32_t slot : walk.slots_of(lane, list)) {
                const std::pair<llama_pos, int32_t> key(walk.positions[slot], slot);
                const llama_pos                     last = walk.lanes[lane][list].rbegin()->first;
                expected[key].push_back(llama_seq_id(lane));
                if (key.first < llama_pos(SINK) || key.first > last - llama_pos(RECENT)) {
                    needed.insert(key);
                }
            }
        }
        for (const auto & key : needed) {
            expected.erase(key);
        }
        auto at = expected.begin();
        for (const ggml_ext_kv_old_slot & old : ggml_ext_kv_old_slots(walk.pages, list, walk.rule)) {
            const bool same =
                at != expected.end() && at->first == std::make_pair(old.position, old.slot) && at->second == old.lanes;
            CHECK(same, "list %u: slot %d of position %d", list, old.slot, old.position);
            if (!same) {
                return;
            }
            ++at;
        }
        CHECK(at == expected.end(), "list %u: slot %d is missing", list, at->first.second);
    }
}

template <typename Evict> void random_walk(Walk & walk, const Evict & evict) {
    for (int i = 0; i < 250 && check_failures == 0; ++i) {
        const uint32_t lane = walk.below(N_LANES);
        switch (walk.below(7)) {
            case 0:
                walk.remove(lane, llama_pos(walk.below(uint32_t(walk.end_of(lane)) + 1)), INT32_MAX);
                break;
            case 1:
                walk.copy(lane, walk.below(N_LANES));
                break;
            case 2:
            case 3:
                walk.rule.incoming = walk.below(3) * walk.below(100);
                evict(walk.below(N_BLOCKS / 2));
                break;
            default:
                walk.append(lane, walk.below(300));
        }
        walk.check("walk");
        check_old_slots(walk);
    }
}

void test_random_walks() {
    for (unsigned seed = 1; seed <= 10 && check_failures == 0; ++seed) {
        Walk walk(seed);
        random_walk(walk, [&](uint32_t wanted) { walk.evict(wanted); });
    }
}

void test_the_rule_word_by_word() {
    for (unsigned seed = 1; seed <= 5 && check_failures == 0; ++seed) {
        Walk walk(seed);
        walk.rule.pool = seed % 5;
        random_walk(walk, [&](uint32_t wanted) {
            for (Token & token : walk.stored) {
                const float values[] = { NAN, INFINITY, -INFINITY, float(walk.below(3)), float(walk.below(1000)) };
                token.score          = values[walk.below(5)];
            }
            walk.evict_by_rule(wanted);
        });
    }
}

// A list whose scores are all lower loses more, down to its floor.
void test_lists_differ() {
    Walk walk(1);
    walk.append(0, 500);
    walk.evict(40);
    std::vector<size_t> n;
    for (const Lane & list : walk.lanes[0]) {
        n.push_back(list.size());
    }
    CHECK(n[0] < n[2] && n[0] + n[1] + n[2] > 19 * SLOTS, "%zu %zu %zu of 20 blocks", n[0], n[1], n[2]);
}

void test_nan_goes_first() {
    Walk walk(1);
    walk.append(0, 500);
    int n = 0;
    for (Token & token : walk.stored) {
        token.score = token.name >= 0 && n++ % 20 == 0 ? NAN : token.score;
    }
    CHECK(ggml_ext_kv_evict(walk.pages, walk.rule, 48), "evict");
    for (uint32_t list = 0; list < N_LISTS; ++list) {
        const Lane      left = walk.found(0, list);
        const llama_pos end  = left.rbegin()->first - llama_pos(RECENT);
        for (const auto & [position, token] : left) {
            CHECK(position < llama_pos(SINK) || position > end || !std::isnan(token.score), "a NaN stayed at %d",
                  position);
        }
    }
}

// A slot is worth what its best neighbour is; what nothing has looked at yet lends its neighbours nothing, and stays.
void test_pooled_scores() {
    Walk walk(1);
    walk.rule.pool  = 2;
    walk.rule.floor = 0;
    walk.append(0, 200);
    walk.copy(0, 1);
    for (uint32_t list = 0; list < N_LISTS; ++list) {
        for (const ggml_ext_kv_entry & run : walk.pages.list(0, list)) {
            for (int i = run.begin; i < run.begin + run.count; ++i) {
                const int position                            = walk.pages.positions(run.block)[i];
                walk.stored[run.block * int(SLOTS) + i].score = position == 50  ? 9 :
                                                                position >= 150 ? INFINITY :
                                                                                  0.001f * float(position);
            }
        }
    }
    // 4 blocks of each list become 2: 128 slots.
    std::map<uint32_t, std::set<llama_pos>> lost;
    walk.rule.lost = [&](uint32_t lane, llama_pos position) { lost[lane].insert(position); };
    CHECK(ggml_ext_kv_evict(walk.pages, walk.rule, N_BLOCKS - 2 * N_LISTS), "evict");
    for (uint32_t list = 0; list < N_LISTS; ++list) {
        const Lane left = walk.found(0, list);
        for (llama_pos position = 0; position < 200; ++position) {
            const bool sink = position < llama_pos(SINK), pooled = position >= 48 && position <= 52;
            // Of the others the latest stay: 128 less 4 sinks, 5 about position 50 and 50 from 150 on is 69.
            const bool stays = sink || pooled || position >= 150 - 69;
            CHECK(left.count(position) == size_t(stays), "position %d", position);
            CHECK(lost[0].count(position) == size_t(!stays) && lost[1] == lost[0], "position %d of the lost", position);
        }
    }
}

}  // namespace

int main() {
    test_pooled_scores();
    test_lists_differ();
    test_nan_goes_first();
    test_random_walks();
    test_the_rule_word_by_word();
    return check_done();
}
