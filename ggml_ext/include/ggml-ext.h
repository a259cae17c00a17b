// ggml-ext.h: the public C API of ggml-ext.
//
// Functions marked "ggml-base" live in libggml-base, those marked "ggml-cpu" in libggml-cpu, those
// marked "llama" in libllama; the libraries are the patched ones. The part between the two "cffi" marks is plain C without
// preprocessor lines: python/ggml_ext/runtime/native.py reads it as its declarations.
//
// Errors are negative return values (GGML_EXT_E_*); no function aborts on bad arguments.

#ifndef GGML_EXT_H
#define GGML_EXT_H

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// Keeps the entry points visible in the libraries, which upstream builds with hidden visibility
// only on some platforms.
#define GGML_EXT_API GGML_API

// The newest value of the GGUF key ggml_ext.version that this code understands.
#define GGML_EXT_FORMAT_VERSION 2

// --- cffi: begin ---

enum ggml_ext_error {
    GGML_EXT_E_TYPE   = -1,  // no such type or object, or one that cannot be used this way
    GGML_EXT_E_SHAPE  = -2,  // row length is no multiple of the type's block, or a negative size
    GGML_EXT_E_FINITE = -3,  // NaN, Inf, or a value too large for the type among the inputs
    GGML_EXT_E_MEMORY = -4,  // out of memory
};

// Version of the GGUF extension that this library reads and writes: the key ggml_ext.version.
// [ggml-base]
GGML_EXT_API int32_t ggml_ext_format_version(void);

// Type id for a name as in ggml_type_name ("fq4", "q4_K", ...; case is ignored), or
// GGML_EXT_E_TYPE. [ggml-base]
GGML_EXT_API int32_t ggml_ext_type_from_name(const char * name);

// Canonical name of a type, or NULL. [ggml-base]
GGML_EXT_API const char * ggml_ext_type_name(int32_t type);

// Weights per block, or an error. [ggml-base]
GGML_EXT_API int64_t ggml_ext_block_size(int32_t type);

// Bytes of one row of n_per_row weights, or an error. [ggml-base]
GGML_EXT_API int64_t ggml_ext_row_size(int32_t type, int64_t n_per_row);

// 1 if quantising to the type needs an importance matrix, 0 if not, or an error. [ggml-base]
GGML_EXT_API int32_t ggml_ext_needs_imatrix(int32_t type);

// Quantises nrows x n_per_row contiguous floats into dst (nrows * ggml_ext_row_size bytes).
// imatrix: n_per_row importances (mean squared input per column), all >= 0, or NULL.
// Works for every quantised ggml type, f16, bf16 and f32. Thread-safe: callers split rows.
// Returns the bytes written or an error; the row that holds a NaN or Inf is not looked for.
// [ggml-base]
GGML_EXT_API int64_t ggml_ext_quantize(int32_t type, const float * src, void * dst, int64_t nrows, int64_t n_per_row,
                                       const float * imatrix);

// Dequantises nrows x n_per_row weights to floats. Returns the number of floats or an error.
// [ggml-base]
GGML_EXT_API int64_t ggml_ext_dequantize(int32_t type, const void * src, float * dst, int64_t nrows, int64_t n_per_row);

// Names, separated by commas, of the dot-product paths of FQ4, FQ4_64, FQ3 and FQ3_64 that this processor can run, fastest
// first; the last is always "generic". [ggml-cpu]
GGML_EXT_API const char * ggml_ext_cpu_paths(void);

// Dot product of one quantised row with n floats as llama.cpp computes it: the floats are rounded
// to the type's activation type first. path: a name from ggml_ext_cpu_paths(), or NULL for the one
// in use; only these types have more than one. Returns 0 or an error. [ggml-cpu]
GGML_EXT_API int32_t ggml_ext_cpu_dot(int32_t type, const char * path, const void * row, const float * x, int64_t n,
                                      float * result);

// The nearest of 256 words for each of n vectors, of equally near ones the first, as coupled codes of a KV cache have it
// (docs/kv-cache.md). x: [n][channels], words: [256][channels], channels 4 or 8. Returns 0 or GGML_EXT_E_SHAPE. [ggml-cpu]
GGML_EXT_API int32_t ggml_ext_nearest_words(int64_t n, int32_t channels, const float * x, const float * words,
                                            uint8_t * codes);

// Quantised attention (docs/attention.md) for the whole process and every backend; it takes the place of the environment's
// GGML_EXT_ATTN. mode: "off", "half", "full", "half/f16", "full/f16", "half/f16/smooth", "full/f16/smooth" or
// "default". Not between the planning of a graph (ggml_graph_plan, or a backend's graph_compute) and the end of its
// computation, in any thread: the plan's work buffer is sized for the mode. Returns 0 or GGML_EXT_E_TYPE for another
// mode. [ggml-base]
GGML_EXT_API int32_t ggml_ext_attention_set(const char * mode);

// The levels that quantised weights can take. A group is `group` consecutive weights of a row; its weights take
// the values scale * book[level] + offset, level = 0 .. n_levels - 1. All arrays are contiguous, row-major.
struct ggml_ext_grid {
    int64_t         n;         // weights per row
    int64_t         group;     // divides n
    int64_t         n_levels;  // 2 .. 64
    int64_t         n_books;
    const float *   books;     // [n_books][n_levels], each ascending
    const float *   scale;     // [rows][n / group]
    const float *   offset;    // [rows][n / group]
    const uint8_t * book;      // [rows][n / group], below n_books
};

// GPTQ (arXiv 2210.17323, algorithm 1) inside one block of columns. Rounds each row of w [nrows][n] from left to
// right; the error of column j, e_j = (w_j - q_j) / u_jj, is taken off the later columns k as e_j u_jk. u [n][n]:
// upper triangular, the block's part of the Cholesky factor U of the inverse Hessian (H^-1 = U^T U).
// levels [nrows][n]: the chosen levels. err [nrows][n]: e. cost [nrows]: sum of e_j^2.
// Returns 0 or an error. Thread-safe: callers split rows. [ggml-base]
GGML_EXT_API int32_t ggml_ext_gptq_grid(const struct ggml_ext_grid * grid, int64_t nrows, const float * w,
                                        const float * u, uint8_t * levels, float * err, float * cost);

// The same for one FQ4 block (n = 256), choosing the scale and the table rows as well: for each candidate scale, a
// sub-block takes the table row whose sum of e_j^2 over its 16 columns is least. u_inv [256][256]: the inverse of u.
// dst: nrows blocks of 138 bytes, one every `stride` bytes (even). [ggml-base]
GGML_EXT_API int32_t ggml_ext_gptq_fq4(int64_t nrows, const float * w, const float * u, const float * u_inv, void * dst,
                                       int64_t stride, float * err, float * cost);

// The same for one FQ4_64 block: n = 64, blocks of 35 bytes, any stride from that on. [ggml-base]
GGML_EXT_API int32_t ggml_ext_gptq_fq4_64(int64_t nrows, const float * w, const float * u, void * dst, int64_t stride,
                                          float * err, float * cost);

// Coordinate descent on (q - w) h (q - w)^T, row by row: each weight in turn takes the level that is best while
// the others stay. w [nrows][n], h [n][n] symmetric, levels [nrows][n] in and out. Stops after `sweeps` passes over
// a row or when a pass changes nothing. Returns the number of changes or an error. [ggml-base]
GGML_EXT_API int64_t ggml_ext_descend(const struct ggml_ext_grid * grid, int64_t nrows, const float * w,
                                      const float * h, int32_t sweeps, uint8_t * levels);

// Puts size bytes in the place of those at offset in the tensor of that name, in its own type, wherever the model has
// it. Not while a context computes. The model must be loaded neither mapped (LLAMA_LOAD_MODE_NONE) nor packed
// (use_extra_bufts false). Returns 0, GGML_EXT_E_TYPE for a tensor that is not there or in a mapped file, or
// GGML_EXT_E_SHAPE for bytes outside of it. [llama]
struct llama_model;
GGML_EXT_API int32_t ggml_ext_model_set_tensor(struct llama_model * model, const char * name, const void * data,
                                               int64_t offset, int64_t size);

// Measures a model's token embeddings (rows of token_embd.weight) and the outputs of its blocks, which
// llama.cpp names "l_out-<block>": n_layer + 1 tensors of [n_embd, n_tokens], below called outputs. The
// object is the user data of ggml_ext_layers_eval, which goes into llama_context_params.cb_eval.
struct ggml_ext_layers;

enum ggml_ext_layers_mode {
    GGML_EXT_LAYERS_RECORD = 0,  // write the outputs to the array
    GGML_EXT_LAYERS_FREE   = 1,  // compare them with the array
    GGML_EXT_LAYERS_FORCED = 2,  // compare, then put the array's values in their place
};

// For a model of n_layer blocks and width n_embd; NULL for sizes below 1 or without memory. [llama]
GGML_EXT_API struct ggml_ext_layers * ggml_ext_layers_new(int32_t n_layer, int64_t n_embd);

// [llama]
GGML_EXT_API void ggml_ext_layers_free(struct ggml_ext_layers * layers);

// Prepares one llama_decode of n_tokens tokens, at most n_ubatch. outputs: the caller's array of
// [n_layer + 1][n_tokens][n_embd] floats, which that decode writes or reads. The first n_skip tokens are
// not measured; logits are to be requested for exactly the others, since the last block may be computed
// for no more. Returns 0 or an error. [llama]
GGML_EXT_API int32_t ggml_ext_layers_begin(struct ggml_ext_layers * layers, int32_t mode, float * outputs,
                                           int64_t n_tokens, int64_t n_skip);

// A ggml_backend_sched_eval_callback. It ends the graph after the last block, so the decode computes
// no logits. [llama]
GGML_EXT_API bool ggml_ext_layers_eval(struct ggml_tensor * tensor, bool ask, void * layers);

// Sums over the measured tokens of the decode, n_layer + 1 values each: error = sum (output - array)^2,
// signal = sum array^2. Returns the number of outputs that were seen (none before a decode), or
// GGML_EXT_E_SHAPE if one was no contiguous F32 [n_embd, tokens] or came twice. [llama]
GGML_EXT_API int32_t ggml_ext_layers_sums(const struct ggml_ext_layers * layers, double * error, double * signal);

// Observes a model: which activations its matrices read, and sums over the tokens of a text (docs/observe.md). The object
// is the user data of ggml_ext_observer_eval, which goes into llama_context_params.cb_eval. One context at a time.
//
// A site is what some matrices of the model read: the values (activations of a graph) that share a reader, together.
struct ggml_ext_observer;

enum { GGML_EXT_MOMENT_PANEL = 256 };  // rows of a second moment that are stored from the diagonal on

// What a site's sums go into. The caller's arrays; they stay valid until the next ggml_ext_observer_sums.
//
// A block of sums, `size` floats: tokens [1 + n_experts]; the moment sum x^T x in panels: rows i .. i + PANEL - 1 (or to
// n - 1) of columns i .. n - 1, row after row; where n_experts > 0 then the diagonals [n_experts][n], sums of x^2 over the
// tokens that each expert got; and with MOMENTS_OWN n_experts moments in panels. With MOMENTS_NONE, [n] sums of x^2 take
// the place of the moment.
enum ggml_ext_moments {
    GGML_EXT_MOMENTS_NONE   = 0,
    GGML_EXT_MOMENTS_SHARED = 1,
    GGML_EXT_MOMENTS_OWN    = 2,
};

struct ggml_ext_site_sums {
    const float * before;         // the sums until now, NULL for zeros; may be `after`
    float *       after;          // before + the sums of the decode; NULL: the site is not observed
    float *       absmax;         // [n] in and out: largest |x| of each channel, x scaled as in the sums; or NULL, as
                                  // with MOMENTS_NONE
    float *       sample;         // [sample_rows][n]: row r of the text, scaled, r a multiple of sample_stride, at
                                  // r / sample_stride; or NULL
    int64_t       sample_rows;    // rows beyond are GGML_EXT_E_SHAPE
    int64_t       sample_stride;  // >= 1
    int32_t       moments;        // enum ggml_ext_moments
};

// n_threads: of the sums. NULL without memory or a CPU backend. [llama]
GGML_EXT_API struct ggml_ext_observer * ggml_ext_observer_new(int32_t n_threads);

// [llama]
GGML_EXT_API void ggml_ext_observer_free(struct ggml_ext_observer * observer);

// The sites of the graph that was built last, as JSON, and what becomes of all other weights; docs/observe.md has the
// fields. NULL before a context has been made. The text is valid until the next graph is built. [llama]
GGML_EXT_API const char * ggml_ext_observer_table(const struct ggml_ext_observer * observer);

// Floats of a block of sums, or an error. [llama]
GGML_EXT_API int64_t ggml_ext_observer_size(int64_t n, int64_t n_experts, int32_t moments);

// Where the sums of the next decodes go: one for each site of the table, in its order. Returns 0 or GGML_EXT_E_SHAPE for
// another number of sites. [llama]
GGML_EXT_API int32_t ggml_ext_observer_sums(struct ggml_ext_observer * observer, int64_t n_sites,
                                            const struct ggml_ext_site_sums * sums);

// Prepares one llama_decode of n_tokens tokens in one micro-batch, all of them with logits, so that the last block
// computes all of them. first_token: how many tokens of the text came before. largest: a token counts at most as much as
// so many median ones (its x is scaled down), 0 for no limit. weights: [n_tokens], how much each token counts, or NULL.
// Returns 0 or an error. [llama]
GGML_EXT_API int32_t ggml_ext_observer_begin(struct ggml_ext_observer * observer, int64_t first_token, int64_t n_tokens,
                                             float largest, const float * weights);

// A ggml_backend_sched_eval_callback. [llama]
GGML_EXT_API bool ggml_ext_observer_eval(struct ggml_tensor * tensor, bool ask, void * observer);

// Whether all sites of the decode have been seen: a ggml_abort_callback, which ends the graph before the logits are
// computed; llama_decode then returns 2. [llama]
GGML_EXT_API bool ggml_ext_observer_done(void * observer);

// Ends what begin began. Returns the number of sites that were summed, GGML_EXT_E_FINITE for NaN or Inf in one,
// GGML_EXT_E_SHAPE for a site of another form than in the table, or GGML_EXT_E_MEMORY. [llama]
GGML_EXT_API int64_t ggml_ext_observer_end(struct ggml_ext_observer * observer);

// The anchor of the site that an error of ggml_ext_observer_end is about, or "". [llama]
GGML_EXT_API const char * ggml_ext_observer_culprit(const struct ggml_ext_observer * observer);

// For a graph's callback: what RoPE has done to a tensor that is its result, or a view of one. frequencies: room for half a
// head's channels, radians per position, of each pair that is turned; adjacent: whether pairs are channels 2 i and 2 i + 1,
// and not i and i + half of them; length: the factor that all values are multiplied by. Returns how many of a head's
// channels are turned, 0 for another tensor, or GGML_EXT_E_TYPE for a form that codes cannot undo. [llama]
GGML_EXT_API int32_t ggml_ext_rope_of(const struct ggml_tensor * tensor, double * frequencies, int32_t * adjacent,
                                      float * length);

// Fused sampler (docs/sampling.md): top-k, locally typical, top-p, min-p and temperature in any order, and the draw, as
// one llama_sampler. Logit bias, penalties and grammars stay upstream's and run before it in a chain.
struct llama_sampler;

enum ggml_ext_sampler_stage {
    GGML_EXT_SAMPLER_TOP_K       = 0,
    GGML_EXT_SAMPLER_TYPICAL     = 1,
    GGML_EXT_SAMPLER_TOP_P       = 2,
    GGML_EXT_SAMPLER_MIN_P       = 3,
    GGML_EXT_SAMPLER_TEMPERATURE = 4,
};

// A stage that is not listed is off, and so is one whose value says so. Ties: of equal logits the lower token id
// comes first.
struct ggml_ext_sampler_params {
    int32_t  n_stages;     // 0 .. 8
    int32_t  stages[8];    // enum ggml_ext_sampler_stage, each at most once, run in this order; upstream's default is
                           // top_k, typical, top_p, min_p, temperature
    float    temperature;  // <= 0: the largest logit
    int32_t  top_k;        // <= 0: off
    float    top_p;        // >= 1: off
    float    min_p;        // <= 0: off
    float    typical_p;    // >= 1: off
    size_t   min_keep;     // top-p, min-p and typical keep at least so many candidates
    uint32_t seed;         // 0xFFFFFFFF: random, and again at every llama_sampler_reset
};

// The sampler, for llama_sampler_chain_add or by itself; llama_sampler_free frees it. It must be the last of a chain.
// It offers backend sampling (llama_set_sampler) for the stages top-k, top-p, min-p, temperature in this order.
// NULL, with a line in llama.cpp's log, for a number that is not finite, an unknown stage or one listed twice.
//
// llama_sampler_apply leaves the kept candidates in ascending order of their ids (sorted = false) with p set, and
// `selected`. Where a logit is NaN or +Inf, or none is finite, it leaves none (size 0, selected -1, which
// llama_sampler_sample refuses) and logs that once; data[-1] then exists and holds LLAMA_TOKEN_NULL.
// Reset, clone and free are as of upstream's dist sampler; one sampler is for one thread at a time. [llama]
GGML_EXT_API struct llama_sampler * ggml_ext_sampler_fused(const struct ggml_ext_sampler_params * params);

// Draws a token for logits [n_vocab] without an array of candidates; advances the generator as apply does. Returns
// the token, GGML_EXT_E_FINITE where apply would leave none, GGML_EXT_E_SHAPE for n_vocab < 1, or GGML_EXT_E_TYPE for
// another sampler or a null pointer. [llama]
GGML_EXT_API int32_t ggml_ext_sampler_sample_logits(struct llama_sampler * fused, const float * logits,
                                                    int32_t n_vocab);

// The kept tokens in ascending order and their probabilities, without a draw. ids, probs [n_vocab]. Returns their
// count or an error as above. [llama]
GGML_EXT_API int32_t ggml_ext_sampler_kept(struct llama_sampler * fused, const float * logits, int32_t n_vocab,
                                           int32_t * ids, float * probs);

// The seed in use (a random one too, unlike the parameter), or GGML_EXT_E_TYPE for another sampler or a null pointer.
// [llama]
GGML_EXT_API int64_t ggml_ext_sampler_seed(const struct llama_sampler * fused);

// --- cffi: end ---

#ifdef __cplusplus
}
#endif

#endif  // GGML_EXT_H
