// The switch of quantised attention: the environment's GGML_EXT_ATTN, or ggml_ext_attention_set.

#include "setting.h"

#include "ggml-ext.h"
#include "ggml-impl.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    const char *                      name;
    struct ggml_ext_attention_setting setting;
} choices[] = {
    { "default",         { GGML_EXT_ATTENTION_HALF, false, false, true }  },
    { "off",             { GGML_EXT_ATTENTION_OFF, false, false, false }  },
    { "half",            { GGML_EXT_ATTENTION_HALF, false, false, false } },
    { "full",            { GGML_EXT_ATTENTION_FULL, false, false, false } },
    { "half/f16",        { GGML_EXT_ATTENTION_HALF, true, false, false }  },
    { "full/f16",        { GGML_EXT_ATTENTION_FULL, true, false, false }  },
    { "half/f16/smooth", { GGML_EXT_ATTENTION_HALF, true, true, false }   },
    { "full/f16/smooth", { GGML_EXT_ATTENTION_FULL, true, true, false }   },
};

enum { N_CHOICES = sizeof(choices) / sizeof(choices[0]), DEFAULT_CHOICE = 0, OFF_CHOICE = 1, UNREAD = -1 };

static atomic_int chosen = UNREAD;

static int attention_find(const char * name) {
    for (int i = 0; name != NULL && i < N_CHOICES; i++) {
        if (strcmp(choices[i].name, name) == 0) {
            return i;
        }
    }
    return UNREAD;
}

bool ggml_ext_attention_known(const char * mode) {
    return attention_find(mode) != UNREAD;
}

static int attention_from_environment(void) {
    const char * name = getenv("GGML_EXT_ATTN");
    if (name == NULL) {
        return DEFAULT_CHOICE;
    }
    if (!ggml_ext_attention_known(name)) {
        GGML_LOG_ERROR("ggml-ext: environment variable GGML_EXT_ATTN is '%s'; set it to %s; it is off now\n", name,
                       GGML_EXT_ATTENTION_MODES);
        return OFF_CHOICE;
    }
    return attention_find(name);
}

struct ggml_ext_attention_setting ggml_ext_attention_setting(void) {
    int choice = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (choice == UNREAD) {
        choice       = attention_from_environment();
        int expected = UNREAD;  // a set that came in between stays
        if (!atomic_compare_exchange_strong(&chosen, &expected, choice)) {
            choice = expected;
        }
    }
    return choices[choice].setting;
}

int32_t ggml_ext_attention_set(const char * mode) {
    const int choice = attention_find(mode);
    if (choice == UNREAD) {
        return GGML_EXT_E_TYPE;
    }
    atomic_store(&chosen, choice);
    return 0;
}
