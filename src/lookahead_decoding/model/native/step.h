/* A step of a model as one call: a list of operations that all threads go through together.
 *
 * Every operation is divided over threads by what it gives, never along a sum, and a barrier stands between operations
 * that read each other's results. So a row's numbers depend on that row alone: they are the same, bit by bit, whatever
 * rows are beside it, however many threads there are, and wherever its keys lie in the cache.
 *
 * Weights lie in panels of 32 outputs, in the order in which a product reads them. A panel is read once for up to
 * twelve rows, whose sums stay in registers. The residual stream is float32; inputs of products and the cache are in
 * the model's dtype.
 */
#ifndef LOOKAHEAD_STEP_H
#define LOOKAHEAD_STEP_H

#include <stdint.h>

enum { PANEL = 32, AHEAD = 3072, TILE = 16, MOST = 64, SHARING = 64, SPAN = 256 };
enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum Kind { EMBED, NORM, PROJECT, GATE, ACTIVATE, ROTATE, ATTEND, ADD_NORMED, NORM_HEADS, BEST };
enum Norm { ROOT_MEAN_SQUARE = 0, LAYER_NORM = 1, NO_NORM = 2 };
enum Place { NORMED = 0, ATTENDED = 1, INNER = 2 };
enum Target { TO_HEADS = 0, TO_RESIDUAL = 1, TO_LOGITS = 2 };
enum Activation { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3, RELU_SQUARED = 4 };

typedef struct {
    int32_t kind, from, to, outputs, inputs, layer, option, kept, span, table, rotated;
    float eps, factor;
    const void *weight, *second;
    const float *bias;
} Op;

typedef struct {
    int32_t dtype, hidden, heads, key_heads, size, inner, vocabulary, count;
    float scale, cap;
    const Op *ops;
} Program;

typedef struct {
    int32_t rows, kept, threads, best, sequences;
    const int64_t *ids;
    /* Of each row: the angle that it has, and what it sees: all positions before `prefix`, and then the nodes of its
     * path, from `start` to the next row's start, itself the last. Node n stands in the slot of position prefix + n. */
    const int32_t *angle, *prefix, *start, *path, *sequence, *keep;
    void *const *keys, *const *values; /* of each layer, (batch, key heads, capacity, size) */
    /* Of each span, a kind of layer: the position in slot 0 of each sequence, and distances in numbers. */
    const int32_t *origin;
    const int64_t *by_sequence, *by_head;
    const float *const *cosines, *const *sines; /* tables, (positions, rotated / 2) */
    float *residual, *heads, *logits, *scores;
    void *normed, *attended, *inner;
    int64_t scores_of_a_thread, normed_of_a_thread; /* in bytes */
    float *partials; /* (rows, heads, blocks, 2 + size): of each block of positions, see attention.h */
    int64_t blocks;
    int32_t *found;                                 /* (kept, 1 + best): the very best, and the best in order */
    int64_t *next;                                  /* of each operation: what is not taken yet */
} Step;

/* What one thread does in a step; `barrier` is where all of them meet. */
typedef void (*Thread)(const Program *, const Step *, void *barrier, int thread);

void lookahead_meet(void *barrier, int threads);
void lookahead_avx512_bf16(const Program *, const Step *, void *, int);
void lookahead_avx512(const Program *, const Step *, void *, int);
void lookahead_avx2(const Program *, const Step *, void *, int);
void lookahead_neon(const Program *, const Step *, void *, int);
void lookahead_neon_bf16(const Program *, const Step *, void *, int);

#endif
