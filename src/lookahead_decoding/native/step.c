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

enum { PANEL = 32, BLOCK = 12, AHEAD = 3072, SPINS = 20000, TILE = 16, MOST = 64 };
enum Dtype { FLOAT32 = 0, BFLOAT16 = 1 };
enum Kind { EMBED, NORM, PROJECT, GATE, ROTATE, ATTEND, BEST };
enum Place { NORMED = 0, ATTENDED = 1, INNER = 2 };
enum Target { TO_HEADS = 0, TO_RESIDUAL = 1, TO_LOGITS = 2 };
enum Activation { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3 };

typedef struct {
    int32_t kind, from, to, outputs, inputs, layer, option, kept;
    float eps, factor;
    const void *weight, *second;
    const float *bias;
} Op;

typedef struct {
    int32_t dtype, hidden, heads, key_heads, size, inner, vocabulary, rotated, count;
    float scale, cap;
    const Op *ops;
} Program;

typedef struct {
    int32_t rows, kept, threads, best;
    const int64_t *ids;
    /* of each row: position in its text, slot that it is written to, and the slots that it sees: those before
     * `prefix`, then `path` from start to the next row's start, itself the last */
    const int32_t *position, *slot, *prefix, *start, *path, *sequence, *keep;
    void *const *keys, *const *values; /* of each layer, (batch, key heads, capacity, size) */
    int64_t by_sequence, by_head;      /* in numbers */
    const float *cosines, *sines;      /* (positions, rotated / 2) */
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
            _mm512_storeu_ps(step->residual + (int64_t)row * program->hidden + i, _mm512_mul_ps(x, factor));
        }
}

/* Every thread for itself, which takes less than waiting for others would. */
static FAST void norm(const Self *self, const Op *op) {
    int hidden = self->program->hidden;
    int rows = op->kept ? self->step->kept : self->step->rows;
    const float *weight = op->weight;
    for (int row = 0; row < rows; row++) {
        int64_t from = op->kept ? self->step->keep[row] : row;
        const float *x = self->step->residual + from * hidden;
        __m512 squares = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
        for (int i = 0; i < hidden; i += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + i));
        float mean = op->option ? _mm512_reduce_add_ps(sum) / (float)hidden : 0.0f;
        for (int i = 0; i < hidden; i += 16) {
            __m512 away = _mm512_sub_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(mean));
            squares = _mm512_fmadd_ps(away, away, squares);
        }
        float scale = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)hidden + op->eps);
        for (int i = 0; i < hidden; i += 16) {
            __m512 y = _mm512_sub_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(mean));
            y = _mm512_mul_ps(_mm512_mul_ps(y, _mm512_set1_ps(scale)), _mm512_loadu_ps(weight + i));
            if (op->bias) y = _mm512_add_ps(y, _mm512_loadu_ps(op->bias + i));
            narrow(self->normed, (int64_t)row * hidden + i, y, self->program->dtype);
        }
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

/* One head of one row: normed, rotated, and written to where attention reads it. */
static FAST void turn(const Program *program, const Op *op, const Step *step, float *x, int row, const float *weight) {
    int size = program->size, half = program->rotated / 2;
    if (weight) {
        __m512 squares = _mm512_setzero_ps();
        for (int i = 0; i < size; i += 16) {
            __m512 y = _mm512_loadu_ps(x + i);
            squares = _mm512_fmadd_ps(y, y, squares);
        }
        __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)size + op->eps));
        for (int i = 0; i < size; i += 16) {
            __m512 y = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), scale), _mm512_loadu_ps(weight + i));
            _mm512_storeu_ps(x + i, y);
        }
    }
    const float *cosines = step->cosines + (int64_t)step->position[row] * half;
    const float *sines = step->sines + (int64_t)step->position[row] * half;
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[half + i];
        x[i] = a * cosines[i] - b * sines[i];
        x[half + i] = b * cosines[i] + a * sines[i];
    }
}

INLINE FAST void copied(void *to, int64_t at, const float *x, int size, int dtype) {
    for (int i = 0; i < size; i += 16) narrow(to, at + i, _mm512_loadu_ps(x + i), dtype);
}

static FAST void rotate(const Self *self, const Op *op) {
    const Program *program = self->program;
    const Step *step = self->step;
    int size = program->size, heads = program->heads, key_heads = program->key_heads;
    int64_t wide_row = (int64_t)(heads + 2 * key_heads) * size;
    int all = heads + 2 * key_heads;
    for (int task = self->thread; task < step->rows * all; task += step->threads) {
        int row = task / all, head = task % all;
        float *x = step->heads + row * wide_row + (int64_t)head * size;
        if (head < heads + key_heads) turn(program, op, step, x, row, head < heads ? op->weight : op->second);
        if (head < heads) continue;
        int key = (head - heads) % key_heads;
        void *buffer = (head < heads + key_heads ? step->keys : step->values)[op->layer];
        int64_t at = step->sequence[row] * step->by_sequence + key * step->by_head + (int64_t)step->slot[row] * size;
        copied(buffer, at, x, size, program->dtype);
    }
}

/* One query head of one row over the positions that it sees, in their order, wherever they lie. */
static FAST void attend_one(const Self *self, const Op *op, int row, int head) {
    const Program *program = self->program;
    const Step *step = self->step;
    int size = program->size, dtype = program->dtype, all = program->heads + 2 * program->key_heads;
    const float *query = step->heads + (int64_t)row * all * size + (int64_t)head * size;
    int64_t base = step->sequence[row] * step->by_sequence + (head / (program->heads / program->key_heads)) * step->by_head;
    int prefix = step->prefix[row];
    const int32_t *path = step->path + step->start[row];
    int seen = prefix + step->start[row + 1] - step->start[row];
    int first = op->option && seen > op->option ? seen - op->option : 0; /* a window */
    const void *keys = step->keys[op->layer], *values = step->values[op->layer];
    float *scores = self->scores;
    __m512 best = _mm512_set1_ps(-INFINITY);
    for (int at = first / TILE * TILE; at < seen; at += TILE) {
        __m512 products[TILE];
        for (int i = 0; i < TILE; i++) {
            int position = at + i;
            __m512 sum = _mm512_setzero_ps();
            if (position < seen) {
                int64_t key = base + (int64_t)(position < prefix ? position : path[position - prefix]) * size;
                for (int d = 0; d < size; d += 16)
                    sum = _mm512_fmadd_ps(_mm512_loadu_ps(query + d), wide(keys, key + d, dtype), sum);
            }
            products[i] = sum;
        }
        __m512 score = _mm512_mul_ps(sums(products), _mm512_set1_ps(program->scale));
        if (op->factor > 0) {
            __m512 cap = _mm512_set1_ps(op->factor);
            score = _mm512_mul_ps(hyperbolic_tangent(_mm512_div_ps(score, cap)), cap);
        }
        __mmask16 inside = 0xffff;
        if (at + TILE > seen) inside &= (__mmask16)((1u << (seen - at)) - 1);
        if (at < first) inside &= (__mmask16)(0xffffu << (first - at));
        score = _mm512_mask_blend_ps(inside, _mm512_set1_ps(-INFINITY), score);
        _mm512_storeu_ps(scores + at, score);
        best = _mm512_max_ps(best, score);
    }
    __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(best)), total = _mm512_setzero_ps();
    for (int at = first / TILE * TILE; at < seen; at += TILE) {
        __m512 score = _mm512_loadu_ps(scores + at);
        __mmask16 inside = _mm512_cmp_ps_mask(score, _mm512_set1_ps(-INFINITY), _CMP_NEQ_OQ);
        __m512 weight = _mm512_maskz_mov_ps(inside, exponential(_mm512_sub_ps(score, most)));
        _mm512_storeu_ps(scores + at, weight);
        total = _mm512_add_ps(total, weight);
    }
    __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
    int64_t to = ((int64_t)row * program->heads + head) * size;
    for (int d = 0; d < size; d += MOST) {
        __m512 sum[MOST / 16];
        int parts = (size - d < MOST ? size - d : MOST) / 16;
        for (int i = 0; i < MOST / 16; i++) sum[i] = _mm512_setzero_ps();
        for (int position = first; position < seen; position++) {
            __m512 weight = _mm512_set1_ps(scores[position]);
            int64_t value = base + (int64_t)(position < prefix ? position : path[position - prefix]) * size + d;
            if (parts == MOST / 16) {
#pragma GCC unroll 4
                for (int i = 0; i < MOST / 16; i++) sum[i] = _mm512_fmadd_ps(weight, wide(values, value + 16 * i, dtype), sum[i]);
            } else
                for (int i = 0; i < parts; i++) sum[i] = _mm512_fmadd_ps(weight, wide(values, value + 16 * i, dtype), sum[i]);
        }
        for (int i = 0; i < parts; i++) narrow(step->attended, to + d + 16 * i, _mm512_mul_ps(sum[i], share), dtype);
    }
}

static FAST void attend(const Self *self, const Op *op, int64_t *next) {
    const Step *step = self->step;
    int heads = self->program->heads;
    int64_t tasks = (int64_t)step->rows * heads, some = tasks / (8 * step->threads) + 1;
    for (int64_t task = take(next, some); task < tasks; task = take(next, some))
        for (int64_t end = task + some; task < end && task < tasks; task++)
            attend_one(self, op, (int)(task % step->rows), (int)(task / step->rows)); /* rows share keys */
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

/* Whether this processor has what the code above is written in: 2 with products of bfloat16, 1 without, 0 not at all. */
int lookahead_able(void) {
    __builtin_cpu_init();
    int able = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return able ? 1 + !!__builtin_cpu_supports("avx512bf16") : 0;
}
