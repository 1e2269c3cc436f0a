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
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

enum { PANEL = 32, BLOCK = 12, AHEAD = 3072, SPINS = 20000, TILE = 16, MOST = 64, QUERIES = 4 };
enum Dtype { FLOAT32 = 0, BFLOAT16 = 1 };
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
    int32_t *found;                                 /* (kept, best) */
    int64_t *next;                                  /* of each operation: what is not taken yet */
} Step;

#define FAST __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define HALF __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#define INLINE static inline __attribute__((always_inline))

/* ---- threads ---- */

typedef struct {
    _Atomic int waiting;
    _Atomic int round;
} Barrier;

static void meet(Barrier *barrier, int threads) {
    if (threads == 1) return;
    int round = atomic_load(&barrier->round);
    if (atomic_fetch_add(&barrier->waiting, 1) == threads - 1) {
        atomic_store(&barrier->waiting, 0);
        atomic_store(&barrier->round, round + 1);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&barrier->round, memory_order_acquire) == round; spins++) {
        if (spins < SPINS) _mm_pause();
        else sched_yield(); /* somebody else needs this core */
    }
}

INLINE int64_t take(int64_t *next, int64_t count) { return __atomic_fetch_add(next, count, __ATOMIC_RELAXED); }

/* ---- numbers ---- */

INLINE FAST __m512 wide(const void *from, int64_t at, int dtype) {
    if (dtype == FLOAT32) return _mm512_loadu_ps((const float *)from + at);
    __m256i half = _mm256_loadu_si256((const __m256i *)((const uint16_t *)from + at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE FAST void narrow(void *to, int64_t at, __m512 x, int dtype) {
    if (dtype == FLOAT32) {
        _mm512_storeu_ps((float *)to + at, x);
        return;
    }
    __m512i bits = _mm512_castps_si512(x); /* to the nearest, and of two the even one */
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_storeu_si256((__m256i *)((uint16_t *)to + at), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}

INLINE FAST __m512 exponential(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    x = _mm512_min_ps(x, _mm512_set1_ps(88.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
    y = _mm512_fmadd_ps(_mm512_mul_ps(r, r), y, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(y, n);
}

INLINE FAST __m512 hyperbolic_tangent(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f), e = exponential(_mm512_add_ps(x, x));
    return _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, one)));
}

INLINE FAST __m512 activated(__m512 x, int kind) {
    __m512 one = _mm512_set1_ps(1.0f), half = _mm512_set1_ps(0.5f);
    if (kind == SILU) return _mm512_div_ps(x, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
    if (kind == RELU) return _mm512_max_ps(x, _mm512_setzero_ps());
    if (kind == RELU_SQUARED) {
        x = _mm512_max_ps(x, _mm512_setzero_ps());
        return _mm512_mul_ps(x, x);
    }
    if (kind == GELU_TANH) {
        __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
        __m512 inside = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
        __m512 bent = hyperbolic_tangent(_mm512_mul_ps(inside, _mm512_set1_ps(0.7978845608f)));
        return _mm512_mul_ps(_mm512_mul_ps(half, x), _mm512_add_ps(one, bent));
    }
    float numbers[16];
    _mm512_storeu_ps(numbers, x);
    for (int i = 0; i < 16; i++) numbers[i] = 0.5f * numbers[i] * (1.0f + erff(numbers[i] * 0.70710678f));
    return _mm512_loadu_ps(numbers);
}

/* Sixteen vectors to the sums of each. */
INLINE FAST __m512 sums(const __m512 *v) {
    __m512 a[8], b[4];
    for (int i = 0; i < 8; i++)
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    __m512 c = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
    __m512 d = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x88), _mm512_shuffle_f32x4(b[2], b[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
}

/* ---- products: a panel for some rows, out[row][32] ---- */

INLINE HALF void half_block(const uint16_t *w, const uint16_t *x, int64_t by, int inputs, float *out, const int rows) {
    __m512 low[BLOCK], high[BLOCK];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) low[r] = high[r] = _mm512_setzero_ps();
    for (int k = 0; k < inputs; k += 2) {
        __m512bh w0 = (__m512bh)_mm512_loadu_si512(w + k * PANEL);
        __m512bh w1 = (__m512bh)_mm512_loadu_si512(w + k * PANEL + PANEL);
        _mm_prefetch((const char *)(w + k * PANEL) + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)(w + k * PANEL) + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, x + r * by + k, 4);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            low[r] = _mm512_dpbf16_ps(low[r], w0, both);
            high[r] = _mm512_dpbf16_ps(high[r], w1, both);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        _mm512_storeu_ps(out + r * PANEL, low[r]);
        _mm512_storeu_ps(out + r * PANEL + 16, high[r]);
    }
}

/* bfloat16 without its instructions: the two numbers of a pair are the halves of 32 bits. */
INLINE FAST void split_block(const uint16_t *w, const uint16_t *x, int64_t by, int inputs, float *out, const int rows) {
    __m512 low[BLOCK], high[BLOCK];
    __m512i upper = _mm512_set1_epi32((int)0xffff0000);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) low[r] = high[r] = _mm512_setzero_ps();
    for (int k = 0; k < inputs; k += 2) {
        __m512i w0 = _mm512_loadu_si512(w + k * PANEL), w1 = _mm512_loadu_si512(w + k * PANEL + PANEL);
        __m512 even0 = _mm512_castsi512_ps(_mm512_slli_epi32(w0, 16)), odd0 = _mm512_castsi512_ps(_mm512_and_si512(w0, upper));
        __m512 even1 = _mm512_castsi512_ps(_mm512_slli_epi32(w1, 16)), odd1 = _mm512_castsi512_ps(_mm512_and_si512(w1, upper));
        _mm_prefetch((const char *)(w + k * PANEL) + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)(w + k * PANEL) + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            uint32_t pair;
            memcpy(&pair, x + r * by + k, 4);
            __m512 even = _mm512_castsi512_ps(_mm512_set1_epi32((int)(pair << 16)));
            __m512 odd = _mm512_castsi512_ps(_mm512_set1_epi32((int)(pair & 0xffff0000u)));
            low[r] = _mm512_fmadd_ps(odd0, odd, _mm512_fmadd_ps(even0, even, low[r]));
            high[r] = _mm512_fmadd_ps(odd1, odd, _mm512_fmadd_ps(even1, even, high[r]));
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        _mm512_storeu_ps(out + r * PANEL, low[r]);
        _mm512_storeu_ps(out + r * PANEL + 16, high[r]);
    }
}

INLINE FAST void single_block(const float *w, const float *x, int64_t by, int inputs, float *out, const int rows) {
    __m512 low[BLOCK], high[BLOCK];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) low[r] = high[r] = _mm512_setzero_ps();
    for (int k = 0; k < inputs; k++) {
        __m512 w0 = _mm512_loadu_ps(w + k * PANEL), w1 = _mm512_loadu_ps(w + k * PANEL + 16);
        _mm_prefetch((const char *)(w + k * PANEL) + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)(w + k * PANEL) + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            __m512 one = _mm512_set1_ps(x[r * by + k]);
            low[r] = _mm512_fmadd_ps(w0, one, low[r]);
            high[r] = _mm512_fmadd_ps(w1, one, high[r]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        _mm512_storeu_ps(out + r * PANEL, low[r]);
        _mm512_storeu_ps(out + r * PANEL + 16, high[r]);
    }
}

/* A panel for at most BLOCK rows: as many rows as there are in blocks of 12, 8, 4, 2 and 1, each a code of its own. */
#define PRODUCT(name, attribute, block, type)                                                                          \
    static attribute void name(const void *weight, const void *rows_from, int64_t by, int inputs, float *out, int rows) { \
        const type *w = weight, *x = rows_from;                                                                       \
        if (rows == 12) block(w, x, by, inputs, out, 12);                                                              \
        else {                                                                                                         \
            int at = 0;                                                                                                \
            if (rows & 8) block(w, x + at * by, by, inputs, out + at * PANEL, 8), at += 8;                             \
            if (rows & 4) block(w, x + at * by, by, inputs, out + at * PANEL, 4), at += 4;                             \
            if (rows & 2) block(w, x + at * by, by, inputs, out + at * PANEL, 2), at += 2;                             \
            if (rows & 1) block(w, x + at * by, by, inputs, out + at * PANEL, 1);                                      \
        }                                                                                                              \
    }
PRODUCT(half_product, HALF, half_block, uint16_t)
PRODUCT(split_product, FAST, split_block, uint16_t)
PRODUCT(single_product, FAST, single_block, float)

typedef void (*Product)(const void *, const void *, int64_t, int, float *, int);

static Product product_for(int dtype) {
    if (dtype == FLOAT32) return single_product;
    return __builtin_cpu_supports("avx512bf16") ? half_product : split_product;
}

/* ---- operations ---- */

typedef struct {
    const Program *program;
    const Step *step;
    Barrier *barrier;
    int thread;
    Product product;
    void *normed;
    float *scores;
} Self;

INLINE int64_t width(const Self *self) { return self->program->dtype == FLOAT32 ? 4 : 2; }

static FAST void embed(const Self *self, const Op *op) {
    const Program *program = self->program;
    const Step *step = self->step;
    __m512 factor = _mm512_set1_ps(op->factor);
    for (int row = self->thread; row < step->rows; row += step->threads)
        for (int i = 0; i < program->hidden; i += 16) {
            __m512 x = wide(op->weight, step->ids[row] * program->hidden + i, program->dtype);
            x = _mm512_mul_ps(x, factor);
            if (op->second) /* learned positions */
                x = _mm512_add_ps(x, wide(op->second, (int64_t)step->angle[row] * program->hidden + i, program->dtype));
            _mm512_storeu_ps(step->residual + (int64_t)row * program->hidden + i, x);
        }
}

/* Mean to take away and factor to multiply by, of one row. */
INLINE FAST void measured(const float *x, int count, const Op *op, float *mean, float *scale) {
    __m512 squares = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
    *mean = 0.0f;
    if (op->option == LAYER_NORM) {
        for (int i = 0; i < count; i += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + i));
        *mean = _mm512_reduce_add_ps(sum) / (float)count;
    }
    for (int i = 0; i < count; i += 16) {
        __m512 away = _mm512_sub_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(*mean));
        squares = _mm512_fmadd_ps(away, away, squares);
    }
    *scale = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)count + op->eps);
}

INLINE FAST __m512 normed_at(const float *x, int i, const Op *op, float mean, float scale) {
    __m512 y = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(mean)), _mm512_set1_ps(scale));
    y = _mm512_mul_ps(y, _mm512_loadu_ps((const float *)op->weight + i));
    return op->bias ? _mm512_add_ps(y, _mm512_loadu_ps(op->bias + i)) : y;
}

/* Every thread for itself, which takes less than waiting for others would. */
static FAST void norm(const Self *self, const Op *op) {
    int hidden = self->program->hidden;
    int rows = op->kept ? self->step->kept : self->step->rows;
    for (int row = 0; row < rows; row++) {
        const float *x = self->step->residual + (int64_t)(op->kept ? self->step->keep[row] : row) * hidden;
        float mean = 0.0f, scale = 1.0f;
        if (op->option != NO_NORM) measured(x, hidden, op, &mean, &scale);
        for (int i = 0; i < hidden; i += 16) {
            __m512 y = op->option == NO_NORM ? _mm512_loadu_ps(x + i) : normed_at(x, i, op, mean, scale);
            narrow(self->normed, (int64_t)row * hidden + i, y, self->program->dtype);
        }
    }
}

/* What a projection has given is normed before it joins the residual stream. */
static FAST void add_normed(const Self *self, const Op *op) {
    int hidden = self->program->hidden;
    for (int row = self->thread; row < self->step->rows; row += self->step->threads) {
        const float *x = self->step->heads + (int64_t)row * hidden;
        float *to = self->step->residual + (int64_t)row * hidden, mean, scale;
        measured(x, hidden, op, &mean, &scale);
        for (int i = 0; i < hidden; i += 16) {
            __m512 y = normed_at(x, i, op, mean, scale);
            _mm512_storeu_ps(to + i, _mm512_fmadd_ps(y, _mm512_set1_ps(op->factor), _mm512_loadu_ps(to + i)));
        }
    }
}

/* All queries, or all keys, of a row normed together. */
static FAST void norm_heads(const Self *self, const Op *op) {
    int64_t all = (int64_t)(self->program->heads + 2 * self->program->key_heads) * self->program->size;
    for (int row = self->thread; row < self->step->rows; row += self->step->threads) {
        float *x = self->step->heads + row * all + op->layer, mean, scale;
        measured(x, op->outputs, op, &mean, &scale);
        for (int i = 0; i < op->outputs; i += 16) _mm512_storeu_ps(x + i, normed_at(x, i, op, mean, scale));
    }
}

INLINE const void *source(const Self *self, int place) {
    if (place == NORMED) return self->normed;
    return place == ATTENDED ? self->step->attended : self->step->inner;
}

static FAST void finish(const Self *self, const Op *op, const float *sums, int panel, int first, int rows) {
    const Step *step = self->step;
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < PANEL; half += 16) {
            int at = panel * PANEL + half;
            if (at >= op->outputs) break;
            __m512 y = _mm512_loadu_ps(sums + r * PANEL + half);
            if (op->bias) y = _mm512_add_ps(y, _mm512_loadu_ps(op->bias + at));
            float *to = op->to == TO_HEADS ? step->heads : op->to == TO_RESIDUAL ? step->residual : step->logits;
            to += (int64_t)(first + r) * op->outputs + at;
            if (op->to == TO_RESIDUAL)
                y = _mm512_fmadd_ps(y, _mm512_set1_ps(op->factor), _mm512_loadu_ps(to));
            else if (op->factor != 1.0f)
                y = _mm512_mul_ps(y, _mm512_set1_ps(op->factor));
            if (op->to == TO_LOGITS && self->program->cap > 0) {
                __m512 cap = _mm512_set1_ps(self->program->cap);
                y = _mm512_mul_ps(hyperbolic_tangent(_mm512_div_ps(y, cap)), cap);
            }
            if (at + 16 <= op->outputs) _mm512_storeu_ps(to, y);
            else _mm512_mask_storeu_ps(to, (__mmask16)((1u << (op->outputs - at)) - 1), y);
        }
}

static FAST void project(const Self *self, const Op *op, int64_t *next) {
    const Step *step = self->step;
    int rows = op->kept ? step->kept : step->rows;
    int64_t panels = (op->outputs + PANEL - 1) / PANEL, size = (int64_t)PANEL * op->inputs * width(self);
    int64_t some = panels / (8 * step->threads) + 1;
    const char *from = source(self, op->from);
    float out[BLOCK * PANEL];
    for (int64_t panel = take(next, some); panel < panels; panel = take(next, some))
        for (int64_t end = panel + some; panel < end && panel < panels; panel++)
            for (int first = 0; first < rows; first += BLOCK) {
                int now = rows - first < BLOCK ? rows - first : BLOCK;
                const char *x = from + (int64_t)first * op->inputs * width(self);
                self->product((const char *)op->weight + panel * size, x, op->inputs, op->inputs, out, now);
                finish(self, op, out, (int)panel, first, now);
            }
}

/* Panels of gate and of the other take turns, so that their product never leaves the core. */
static FAST void gate(const Self *self, const Op *op, int64_t *next) {
    const Step *step = self->step;
    int dtype = self->program->dtype;
    int64_t panels = op->outputs / PANEL, size = (int64_t)PANEL * op->inputs * width(self);
    int64_t some = panels / (8 * step->threads) + 1;
    const char *from = source(self, op->from);
    float opened[BLOCK * PANEL], other[BLOCK * PANEL];
    for (int64_t panel = take(next, some); panel < panels; panel = take(next, some))
        for (int64_t end = panel + some; panel < end && panel < panels; panel++)
            for (int first = 0; first < step->rows; first += BLOCK) {
                int now = step->rows - first < BLOCK ? step->rows - first : BLOCK;
                const char *x = from + (int64_t)first * op->inputs * width(self);
                const char *weight = (const char *)op->weight + 2 * panel * size;
                self->product(weight, x, op->inputs, op->inputs, opened, now);
                self->product(weight + size, x, op->inputs, op->inputs, other, now);
                for (int r = 0; r < now; r++)
                    for (int half = 0; half < PANEL; half += 16) {
                        __m512 a = _mm512_loadu_ps(opened + r * PANEL + half);
                        __m512 b = _mm512_loadu_ps(other + r * PANEL + half);
                        if (op->bias) {
                            a = _mm512_add_ps(a, _mm512_loadu_ps(op->bias + panel * PANEL + half));
                            b = _mm512_add_ps(b, _mm512_loadu_ps(op->bias + op->outputs + panel * PANEL + half));
                        }
                        int64_t at = (int64_t)(first + r) * op->outputs + panel * PANEL + half;
                        narrow(step->inner, at, _mm512_mul_ps(activated(a, op->option), b), dtype);
                    }
            }
}

/* A feed-forward network without a gate. */
static FAST void activate(const Self *self, const Op *op, int64_t *next) {
    const Step *step = self->step;
    int64_t panels = op->outputs / PANEL, size = (int64_t)PANEL * op->inputs * width(self);
    int64_t some = panels / (8 * step->threads) + 1;
    const char *from = source(self, op->from);
    float out[BLOCK * PANEL];
    for (int64_t panel = take(next, some); panel < panels; panel = take(next, some))
        for (int64_t end = panel + some; panel < end && panel < panels; panel++)
            for (int first = 0; first < step->rows; first += BLOCK) {
                int now = step->rows - first < BLOCK ? step->rows - first : BLOCK;
                const char *x = from + (int64_t)first * op->inputs * width(self);
                self->product((const char *)op->weight + panel * size, x, op->inputs, op->inputs, out, now);
                for (int r = 0; r < now; r++)
                    for (int half = 0; half < PANEL; half += 16) {
                        __m512 y = _mm512_loadu_ps(out + r * PANEL + half);
                        if (op->bias) y = _mm512_add_ps(y, _mm512_loadu_ps(op->bias + panel * PANEL + half));
                        int64_t at = (int64_t)(first + r) * op->outputs + panel * PANEL + half;
                        narrow(step->inner, at, activated(y, op->option), self->program->dtype);
                    }
            }
}

/* One head of one row: normed, and rotated. */
static FAST void turn(const Program *program, const Op *op, const Step *step, float *x, int row, const float *weight) {
    int size = program->size, half = op->rotated / 2;
    if (weight) {
        float mean, scale;
        Op own = *op;
        own.weight = weight, own.option = ROOT_MEAN_SQUARE, own.bias = NULL;
        measured(x, size, &own, &mean, &scale);
        for (int i = 0; i < size; i += 16) _mm512_storeu_ps(x + i, normed_at(x, i, &own, mean, scale));
    }
    if (!half) return;
    const float *cosines = step->cosines[op->table] + (int64_t)step->angle[row] * half;
    const float *sines = step->sines[op->table] + (int64_t)step->angle[row] * half;
    int apart = op->option ? 1 : half, by = op->option ? 2 : 1; /* pairs side by side, or halves */
    for (int i = 0; i < half; i++) {
        float a = x[i * by], b = x[i * by + apart];
        x[i * by] = a * cosines[i] - b * sines[i];
        x[i * by + apart] = b * cosines[i] + a * sines[i];
    }
}

INLINE FAST void copied(void *to, int64_t at, const float *x, int size, int dtype) {
    for (int i = 0; i < size; i += 16) narrow(to, at + i, _mm512_loadu_ps(x + i), dtype);
}

/* Where a sequence's keys of one head begin, in numbers, were its position 0 there. */
INLINE int64_t beginning(const Step *step, const Op *op, int row, int key_head, int size) {
    int sequence = step->sequence[row];
    return sequence * step->by_sequence[op->span] + key_head * step->by_head[op->span] -
           (int64_t)step->origin[op->span * step->sequences + sequence] * size;
}

static FAST void rotate(const Self *self, const Op *op) {
    const Program *program = self->program;
    const Step *step = self->step;
    int size = program->size, heads = program->heads, key_heads = program->key_heads;
    int all = heads + 2 * key_heads;
    for (int task = self->thread; task < step->rows * all; task += step->threads) {
        int row = task / all, head = task % all;
        float *x = step->heads + (int64_t)task * size;
        if (head < heads + key_heads) turn(program, op, step, x, row, head < heads ? op->weight : op->second);
        if (head < heads) continue;
        void *buffer = (head < heads + key_heads ? step->keys : step->values)[op->layer];
        int64_t slot = step->prefix[row] + step->path[step->start[row + 1] - 1];
        copied(buffer, beginning(step, op, row, (head - heads) % key_heads, size) + slot * size, x, size, program->dtype);
    }
}

/* What one row sees, in the order of positions. */
typedef struct {
    int64_t base;
    const int32_t *path;
    int prefix, first, end, size;
} View;

INLINE int64_t place(const View *view, int position) {
    int slot = position < view->prefix ? position : view->prefix + view->path[position - view->prefix];
    return view->base + (int64_t)slot * view->size;
}

/* Products of a query with the keys of sixteen positions. */
INLINE FAST void tile(const View *view, int at, const void *keys, const float *query, int dtype, __m512 *products) {
    for (int i = 0; i < TILE; i++) {
        __m512 sum = _mm512_setzero_ps();
        if (at + i >= view->first && at + i < view->end) {
            int64_t key = place(view, at + i);
            for (int d = 0; d < view->size; d += 16)
                sum = _mm512_fmadd_ps(_mm512_loadu_ps(query + d), wide(keys, key + d, dtype), sum);
        }
        products[i] = sum;
    }
}

/* The same by products of bfloat16; sizes are multiples of 32. */
INLINE HALF void half_tile(const View *view, int at, const uint16_t *keys, const uint16_t *query, __m512 *products) {
    for (int i = 0; i < TILE; i++) {
        __m512 sum = _mm512_setzero_ps();
        if (at + i >= view->first && at + i < view->end) {
            int64_t key = place(view, at + i);
            for (int d = 0; d < view->size; d += 32)
                sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(query + d), (__m512bh)_mm512_loadu_si512(keys + key + d));
        }
        products[i] = sum;
    }
}

/* Weights of the positions that a query sees, not yet divided by their sum, which is returned. */
#define WEIGHTS(name, attribute, type, product)                                                                        \
    static attribute float name(const View *view, const Program *program, float cap, const void *keys,                 \
                                const void *query, float *scores) {                                                    \
        __m512 best = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();                                          \
        for (int at = view->first / TILE * TILE; at < view->end; at += TILE) {                                         \
            __m512 products[TILE];                                                                                     \
            product;                                                                                                   \
            __m512 score = _mm512_mul_ps(sums(products), _mm512_set1_ps(program->scale));                              \
            if (cap > 0) {                                                                                             \
                __m512 bound = _mm512_set1_ps(cap);                                                                    \
                score = _mm512_mul_ps(hyperbolic_tangent(_mm512_div_ps(score, bound)), bound);                         \
            }                                                                                                          \
            __mmask16 inside = 0xffff;                                                                                 \
            if (at + TILE > view->end) inside &= (__mmask16)((1u << (view->end - at)) - 1);                            \
            if (at < view->first) inside &= (__mmask16)(0xffffu << (view->first - at));                                \
            score = _mm512_mask_blend_ps(inside, _mm512_set1_ps(-INFINITY), score);                                    \
            _mm512_storeu_ps(scores + at, score);                                                                      \
            best = _mm512_max_ps(best, score);                                                                         \
        }                                                                                                              \
        __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(best));                                                      \
        for (int at = view->first / TILE * TILE; at < view->end; at += TILE) {                                         \
            __m512 score = _mm512_loadu_ps(scores + at);                                                               \
            __mmask16 inside = _mm512_cmp_ps_mask(score, _mm512_set1_ps(-INFINITY), _CMP_NEQ_OQ);                      \
            __m512 weight = _mm512_maskz_mov_ps(inside, exponential(_mm512_sub_ps(score, most)));                      \
            _mm512_storeu_ps(scores + at, weight);                                                                     \
            total = _mm512_add_ps(total, weight);                                                                      \
        }                                                                                                              \
        return _mm512_reduce_add_ps(total);                                                                            \
    }
WEIGHTS(weights, FAST, float, tile(view, at, keys, query, program->dtype, products))
WEIGHTS(half_weights, HALF, uint16_t, half_tile(view, at, keys, query, products))

/* Sums of values by the weights of some queries that share them. */
INLINE FAST void mixed(const View *view, const void *values, int dtype, const float *scores, int64_t by, int from,
                       __m512 (*sum)[MOST / 16], const int queries, const int parts) {
    for (int q = 0; q < queries; q++)
        for (int i = 0; i < parts; i++) sum[q][i] = _mm512_setzero_ps();
    for (int position = view->first; position < view->end; position++) {
        int64_t value = place(view, position) + from;
        __m512 row[MOST / 16] = {_mm512_setzero_ps()};
#pragma GCC unroll 4
        for (int i = 0; i < parts; i++) row[i] = wide(values, value + 16 * i, dtype);
#pragma GCC unroll 4
        for (int q = 0; q < queries; q++) {
            __m512 weight = _mm512_set1_ps(scores[q * by + position]);
#pragma GCC unroll 4
            for (int i = 0; i < parts; i++) sum[q][i] = _mm512_fmadd_ps(weight, row[i], sum[q][i]);
        }
    }
}

/* Some query heads of one row that share a key head. */
static FAST void attend_some(const Self *self, const Op *op, int row, int head, int queries) {
    const Program *program = self->program;
    const Step *step = self->step;
    int size = program->size, dtype = program->dtype, all = program->heads + 2 * program->key_heads;
    View view = {beginning(step, op, row, head / (program->heads / program->key_heads), size),
                 step->path + step->start[row], step->prefix[row], 0, 0, size};
    view.end = view.prefix + step->start[row + 1] - step->start[row];
    if (op->option > 0 && view.end > op->option) view.first = view.end - op->option; /* a window */
    if (op->option < 0) view.first = (view.end - 1) / -op->option * -op->option;     /* the last of its chunks */
    int64_t by = self->step->scores_of_a_thread / 4 / QUERIES;
    float total[QUERIES];
    for (int q = 0; q < queries; q++) {
        const float *query = step->heads + ((int64_t)row * all + head + q) * size;
        const void *keys = step->keys[op->layer];
        if (dtype == BFLOAT16 && self->product == half_product && size % 32 == 0) {
            uint16_t narrowed[512];
            copied(narrowed, 0, query, size, dtype);
            total[q] = half_weights(&view, program, op->factor, keys, narrowed, self->scores + q * by);
        } else
            total[q] = weights(&view, program, op->factor, keys, query, self->scores + q * by);
    }
    for (int d = 0; d < size; d += MOST) {
        __m512 sum[QUERIES][MOST / 16];
        int parts = (size - d < MOST ? size - d : MOST) / 16;
        const void *values = step->values[op->layer];
#define MIX(n, p) mixed(&view, values, dtype, self->scores, by, d, sum, n, p)
        if (parts == 4 && queries == 4) MIX(4, 4);
        else if (parts == 4 && queries == 3) MIX(3, 4);
        else if (parts == 4 && queries == 2) MIX(2, 4);
        else if (parts == 4) MIX(1, 4);
        else MIX(queries, parts);
        for (int q = 0; q < queries; q++)
            for (int i = 0; i < parts; i++) {
                __m512 share = _mm512_set1_ps(1.0f / total[q]);
                int64_t to = ((int64_t)row * program->heads + head + q) * size + d + 16 * i;
                narrow(step->attended, to, _mm512_mul_ps(sum[q][i], share), dtype);
            }
    }
}

static FAST void attend(const Self *self, const Op *op, int64_t *next) {
    const Step *step = self->step;
    int groups = self->program->heads / self->program->key_heads, most = groups < QUERIES ? groups : QUERIES;
    if (step->rows * self->program->key_heads < 4 * step->threads) most = 1; /* or some threads had nothing to do */
    int parts = (groups + most - 1) / most;
    int64_t tasks = (int64_t)step->rows * self->program->key_heads * parts, some = tasks / (8 * step->threads) + 1;
    for (int64_t task = take(next, some); task < tasks; task = take(next, some))
        for (int64_t end = task + some; task < end && task < tasks; task++) {
            int row = (int)(task % step->rows), part = (int)(task / step->rows); /* rows share keys */
            int first = part % parts * most, queries = groups - first < most ? groups - first : most;
            attend_some(self, op, row, part / parts * groups + first, queries);
        }
}

/* The best tokens of each row, best first; of equal ones the first. */
static FAST void best(const Self *self) {
    const Step *step = self->step;
    int vocabulary = self->program->vocabulary, count = step->best;
    for (int row = self->thread; row < step->kept; row += step->threads) {
        const float *logits = step->logits + (int64_t)row * vocabulary;
        int32_t *found = step->found + (int64_t)row * count;
        float values[MOST];
        int have = 0;
        for (int at = 0; at < vocabulary; at += 16) {
            __mmask16 inside = vocabulary - at >= 16 ? 0xffff : (__mmask16)((1u << (vocabulary - at)) - 1);
            __m512 x = _mm512_maskz_loadu_ps(inside, logits + at);
            __m512 least = _mm512_set1_ps(have < count ? -INFINITY : values[count - 1]);
            __mmask16 better = _mm512_mask_cmp_ps_mask(inside, x, least, _CMP_GT_OQ);
            while (better) {
                int token = at + __builtin_ctz(better);
                better &= (__mmask16)(better - 1);
                float value = logits[token];
                if (have == count && !(value > values[count - 1])) continue;
                int place = have < count ? have++ : count - 1;
                for (; place > 0 && value > values[place - 1]; place--) {
                    values[place] = values[place - 1];
                    found[place] = found[place - 1];
                }
                values[place] = value;
                found[place] = token;
            }
        }
        for (; have < count; have++) found[have] = 0; /* a row of nothing but NaN */
    }
}

static void one_thread(const Program *program, const Step *step, Barrier *barrier, Product product, int thread) {
    Self self = {program, step, barrier, thread, product, (char *)step->normed + thread * step->normed_of_a_thread,
                 (float *)((char *)step->scores + thread * step->scores_of_a_thread)};
    for (int i = 0; i < program->count; i++) {
        const Op *op = program->ops + i;
        int64_t *next = step->next + 8 * i; /* on a cache line of its own */
        switch (op->kind) {
            case EMBED: embed(&self, op); break;
            case NORM: norm(&self, op); continue;
            case PROJECT: project(&self, op, next); break;
            case GATE: gate(&self, op, next); break;
            case ACTIVATE: activate(&self, op, next); break;
            case ADD_NORMED: add_normed(&self, op); break;
            case NORM_HEADS: norm_heads(&self, op); break;
            case ROTATE: rotate(&self, op); break;
            case ATTEND: attend(&self, op, next); break;
            case BEST: best(&self); break;
        }
        meet(barrier, step->threads);
    }
}

int lookahead_step(const Program *program, const Step *step) {
    Barrier barrier = {0, 0};
    Product product = product_for(program->dtype);
    memset(step->next, 0, (size_t)program->count * 8 * sizeof(int64_t));
    Step own = *step;
#pragma omp parallel num_threads(step->threads)
    {
#pragma omp single
        own.threads = omp_get_num_threads();
        one_thread(program, &own, &barrier, product, omp_get_thread_num());
    }
    return own.threads;
}

/* Ask for large pages; a system without them says no, and nothing else is lost. */
void lookahead_large_pages(void *at, int64_t size) {
#ifdef MADV_HUGEPAGE
    madvise(at, (size_t)size, MADV_HUGEPAGE);
#else
    (void)at, (void)size;
#endif
}

/* Whether this processor has what the code above is written in: 2 with products of bfloat16, 1 without, 0 not at all. */
int lookahead_able(void) {
    __builtin_cpu_init();
    int able = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return able ? 1 + !!__builtin_cpu_supports("avx512bf16") : 0;
}
