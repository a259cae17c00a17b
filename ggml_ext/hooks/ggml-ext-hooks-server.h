// What the hook lines in upstream's tools/server/ call. Included by patched upstream sources only.

#ifndef GGML_EXT_HOOKS_SERVER_H
#define GGML_EXT_HOOKS_SERVER_H

#include "kv/usage.h"

// server_slot::to_json: what the slot holds in a cache of ours.
template <class Json> void ggml_ext_server_slot(Json & slot, llama_context * ctx, llama_seq_id id) {
    const ggml_ext_kv_usage usage = ggml_ext_kv_usage_of(ctx, id);
    if (usage.policy) {
        slot["kv"] = {
            { "policy",  usage.policy  },
            { "tokens",  usage.tokens  },
            { "rows",    usage.rows    },
            { "codes",   usage.codes   },
            { "evicted", usage.evicted },
            { "shared",  usage.shared  },
            { "bytes",   usage.bytes   },
        };
    }
}

#endif  // GGML_EXT_HOOKS_SERVER_H
