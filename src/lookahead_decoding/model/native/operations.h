/* The operations of a step, in terms of a vector of sixteen numbers, `V`, and of products of a panel with some rows.
 *
 * Included once for each set of instructions, which names its entry RUN.
 */
#include "step.h"

INLINE V exponential(V x) {
    x = larger(x, all(-87.0f));
    x = smaller(x, all(88.0f));
    V n = rounded(mul(x, all(1.44269504f)));
    V r = unfused(n, all(0.693145752f), x);
    r = unfused(n, all(1.42860677e-6f), r);
    V y = all(1.9875691500e-4f);
    y = fused(y, r, all(1.3981999507e-3f));
    y = fused(y, r, all(8.3334519073e-3f));
    y = fused(y, r, all(4.1665795894e-2f));
    y = fused(y, r, all(1.6666665459e-1f));
    y = fused(y, r, all(5.0000001201e-1f));
    y = fused(mul(r, r), y, add(r, all(1.0f)));
    return scaled(y, n);
}

INLINE V hyperbolic_tangent(V x) {
    V one = all(1.0f), e = exponential(add(x, x));
    return sub(one, over(all(2.0f), add(e, one)));
}

INLINE V activated(V x, int kind) {
    V one = all(1.0f), half = all(0.5f);
    if (kind == SILU) return over(x, add(one, exponential(sub(all(0.0f), x))));
    if (kind == RELU) return larger(x, all(0.0f));
    if (kind == RELU_SQUARED) {
        x = larger(x, all(0.0f));
        return mul(x, x);
    }
    if (kind == GELU_TANH) {
        V cube = mul(mul(x, x), x);
        V inside = fused(cube, all(0.044715f), x);
        V bent = hyperbolic_tangent(mul(inside, all(0.7978845608f)));
        return mul(mul(half, x), add(one, bent));
    }
    float numbers[16];
    store(numbers, x);
    for (int i = 0; i < 16; i++) numbers[i] = 0.5f * numbers[i] * (1.0f + erff(numbers[i] * 0.70710678f));
    return load(numbers);
}

/* A panel for at most BLOCK rows, in blocks that have code of their own. The order of a sum is the same in all. */
#define PRODUCT(name, block, weight_type, type, sizes)                                                                 \
    static void name(const void *weight, const void *from, int64_t by, int inputs, float *out, int rows) {             \
        const weight_type *w = weight;                                                                                 \
        const type *x = from;                                                                                          \
        int at = 0;                                                                                                    \
        sizes(block)                                                                                                   \
    }
#define SOME(block, count)                                                                                             \
    for (; rows - at >= count; at += count) block(w, x + at * by, by, inputs, out + at * PANEL, count);
#if BLOCKS_OF_THREE
#define SIZES(block) SOME(block, 3) SOME(block, 2) SOME(block, 1)
#else
#define SIZES(block) SOME(block, 12) SOME(block, 8) SOME(block, 4) SOME(block, 2) SOME(block, 1)
#endif
#ifdef PAIRS
PRODUCT(half_product, half_block, uint16_t, uint16_t, SIZES)
#else
PRODUCT(split_product, split_block, uint16_t, float, SIZES)
#endif
PRODUCT(float16_product, float16_block, uint16_t, float, SIZES)
PRODUCT(single_product, single_block, float, float, SIZES)

typedef void (*Product)(const void *, const void *, int64_t, int, float *, int);

/* ---- operations ---- */

typedef struct {
    const Program *program;
    const Step *step;
    Product product;
    void *normed;
    float *scores;
    int thread;
    int held;  /* dtype of what products read */
    int pairs; /* keys are multiplied two numbers at a time */
} Self;

INLINE int64_t bytes(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

INLINE int64_t take(int64_t *next, int64_t count) { return __atomic_fetch_add(next, count, __ATOMIC_RELAXED); }

/* Numbers of a table that lies in panels, as that of a head does which shares it. */
INLINE V of_panels(const void *table, int64_t row, int from, int size, int dtype) {
    float numbers[16];
    uint16_t halves[16];
    int64_t panel = row / PANEL * PANEL * size, lane = row % PANEL;
    for (int i = 0, k = from; i < 16; i++, k++) {
        int64_t in_pairs = panel + (int64_t)(k / 2 * PANEL + lane) * 2 + k % 2, at = panel + (int64_t)k * PANEL + lane;
        if (dtype == FLOAT32) numbers[i] = ((const float *)table)[at];
        else halves[i] = ((const uint16_t *)table)[dtype == BFLOAT16 ? in_pairs : at];
    }
    return dtype == FLOAT32 ? load(numbers) : wide(halves, 0, dtype);
}

static void embed(const Self *self, const Op *op) {
    const Program *program = self->program;
    const Step *step = self->step;
    V factor = all(op->factor);
    for (int row = self->thread; row < step->rows; row += step->threads)
        for (int i = 0; i < program->hidden; i += 16) {
            V x = op->option ? of_panels(op->weight, step->ids[row], i, program->hidden, program->dtype)
                             : wide(op->weight, step->ids[row] * program->hidden + i, program->dtype);
            x = mul(x, factor);
            if (op->second) /* learned positions */
                x = add(x, wide(op->second, (int64_t)step->angle[row] * program->hidden + i, program->dtype));
            store(step->residual + (int64_t)row * program->hidden + i, x);
        }
}

/* Mean to take away and factor to multiply by, of one row. */
INLINE void measured(const float *x, int count, const Op *op, float *mean, float *scale) {
    V squares = all(0.0f), sum = all(0.0f);
    *mean = 0.0f;
    if (op->option == LAYER_NORM) {
        for (int i = 0; i < count; i += 16) sum = add(sum, load(x + i));
        *mean = total(sum) / (float)count;
    }
    for (int i = 0; i < count; i += 16) {
        V away = sub(load(x + i), all(*mean));
        squares = fused(away, away, squares);
    }
    *scale = 1.0f / sqrtf(total(squares) / (float)count + op->eps);
}

INLINE V normed_at(const float *x, int i, const Op *op, float mean, float scale) {
    V y = mul(sub(load(x + i), all(mean)), all(scale));
    y = mul(y, load((const float *)op->weight + i));
    return op->bias ? add(y, load(op->bias + i)) : y;
}

/* Every thread for itself, which takes less than waiting for others would. */
static void norm(const Self *self, const Op *op) {
    int hidden = self->program->hidden;
    int rows = op->kept ? self->step->kept : self->step->rows;
    for (int row = 0; row < rows; row++) {
        const float *x = self->step->residual + (int64_t)(op->kept ? self->step->keep[row] : row) * hidden;
        float mean = 0.0f, scale = 1.0f;
        if (op->option != NO_NORM) measured(x, hidden, op, &mean, &scale);
        for (int i = 0; i < hidden; i += 16) {
            V y = op->option == NO_NORM ? load(x + i) : normed_at(x, i, op, mean, scale);
            narrow(self->normed, (int64_t)row * hidden + i, y, self->held);
        }
    }
}

/* What a projection has given is normed before it joins the residual stream. */
static void add_normed(const Self *self, const Op *op) {
    int hidden = self->program->hidden;
    for (int row = self->thread; row < self->step->rows; row += self->step->threads) {
        const float *x = self->step->heads + (int64_t)row * hidden;
        float *to = self->step->residual + (int64_t)row * hidden, mean, scale;
        measured(x, hidden, op, &mean, &scale);
        for (int i = 0; i < hidden; i += 16) {
            V y = normed_at(x, i, op, mean, scale);
            store(to + i, fused(y, all(op->factor), load(to + i)));
        }
    }
}

/* All queries, or all keys, of a row normed together. */
static void norm_heads(const Self *self, const Op *op) {
    int64_t joined = (int64_t)(self->program->heads + 2 * self->program->key_heads) * self->program->size;
    for (int row = self->thread; row < self->step->rows; row += self->step->threads) {
        float *x = self->step->heads + row * joined + op->layer, mean, scale;
        measured(x, op->outputs, op, &mean, &scale);
        for (int i = 0; i < op->outputs; i += 16) store(x + i, normed_at(x, i, op, mean, scale));
    }
}

INLINE const void *source(const Self *self, int place) {
    if (place == NORMED) return self->normed;
    return place == ATTENDED ? self->step->attended : self->step->inner;
}

static void finish(const Self *self, const Op *op, const float *sums, int panel, int first, int rows) {
    const Step *step = self->step;
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < PANEL; half += 16) {
            int at = panel * PANEL + half;
            if (at >= op->outputs) break;
            V y = load(sums + r * PANEL + half);
            if (op->bias) y = add(y, load(op->bias + at));
            float *to = op->to == TO_HEADS ? step->heads : op->to == TO_RESIDUAL ? step->residual : step->logits;
            to += (int64_t)(first + r) * op->outputs + at;
            if (op->to == TO_RESIDUAL)
                y = fused(y, all(op->factor), load(to));
            else if (op->factor != 1.0f)
                y = mul(y, all(op->factor));
            if (op->to == TO_LOGITS && self->program->cap > 0) {
                V cap = all(self->program->cap);
                y = mul(hyperbolic_tangent(over(y, cap)), cap);
            }
            if (at + 16 <= op->outputs) store(to, y);
            else store_some(to, y, op->outputs - at);
        }
}

static void project(const Self *self, const Op *op, int64_t *next) {
    const Step *step = self->step;
    int rows = op->kept ? step->kept : step->rows;
    int64_t panels = (op->outputs + PANEL - 1) / PANEL, size = (int64_t)PANEL * op->inputs * bytes(self->program->dtype);
    int64_t some = panels / (8 * step->threads) + 1;
    const char *from = source(self, op->from);
    float out[BLOCK * PANEL];
    for (int64_t panel = take(next, some); panel < panels; panel = take(next, some))
        for (int64_t end = panel + some; panel < end && panel < panels; panel++)
            for (int first = 0; first < rows; first += BLOCK) {
                int now = rows - first < BLOCK ? rows - first : BLOCK;
                const char *x = from + (int64_t)first * op->inputs * bytes(self->held);
                self->product((const char *)op->weight + panel * size, x, op->inputs, op->inputs, out, now);
                finish(self, op, out, (int)panel, first, now);
            }
}

/* Panels of gate and of the other take turns, so that their product never leaves the core. */
static void gate(const Self *self, const Op *op, int64_t *next) {
    const Step *step = self->step;
    int64_t panels = op->outputs / PANEL, size = (int64_t)PANEL * op->inputs * bytes(self->program->dtype);
    int64_t some = panels / (8 * step->threads) + 1;
    const char *from = source(self, op->from);
    float opened[BLOCK * PANEL], other[BLOCK * PANEL];
    for (int64_t panel = take(next, some); panel < panels; panel = take(next, some))
        for (int64_t end = panel + some; panel < end && panel < panels; panel++)
            for (int first = 0; first < step->rows; first += BLOCK) {
                int now = step->rows - first < BLOCK ? step->rows - first : BLOCK;
                const char *x = from + (int64_t)first * op->inputs * bytes(self->held);
                const char *weight = (const char *)op->weight + 2 * panel * size;
                self->product(weight, x, op->inputs, op->inputs, opened, now);
                self->product(weight + size, x, op->inputs, op->inputs, other, now);
                for (int r = 0; r < now; r++)
                    for (int half = 0; half < PANEL; half += 16) {
                        V a = load(opened + r * PANEL + half);
                        V b = load(other + r * PANEL + half);
                        if (op->bias) {
                            a = add(a, load(op->bias + panel * PANEL + half));
                            b = add(b, load(op->bias + op->outputs + panel * PANEL + half));
                        }
                        int64_t at = (int64_t)(first + r) * op->outputs + panel * PANEL + half;
                        narrow(step->inner, at, mul(activated(a, op->option), b), self->held);
                    }
            }
}

/* A feed-forward network without a gate. */
static void activate(const Self *self, const Op *op, int64_t *next) {
    const Step *step = self->step;
    int64_t panels = op->outputs / PANEL, size = (int64_t)PANEL * op->inputs * bytes(self->program->dtype);
    int64_t some = panels / (8 * step->threads) + 1;
    const char *from = source(self, op->from);
    float out[BLOCK * PANEL];
    for (int64_t panel = take(next, some); panel < panels; panel = take(next, some))
        for (int64_t end = panel + some; panel < end && panel < panels; panel++)
            for (int first = 0; first < step->rows; first += BLOCK) {
                int now = step->rows - first < BLOCK ? step->rows - first : BLOCK;
                const char *x = from + (int64_t)first * op->inputs * bytes(self->held);
                self->product((const char *)op->weight + panel * size, x, op->inputs, op->inputs, out, now);
                for (int r = 0; r < now; r++)
                    for (int half = 0; half < PANEL; half += 16) {
                        V y = load(out + r * PANEL + half);
                        if (op->bias) y = add(y, load(op->bias + panel * PANEL + half));
                        int64_t at = (int64_t)(first + r) * op->outputs + panel * PANEL + half;
                        narrow(step->inner, at, activated(y, op->option), self->held);
                    }
            }
}

/* One head of one row: normed, and rotated. */
static void turn(const Program *program, const Op *op, const Step *step, float *x, int row, const float *weight) {
    int size = program->size, half = op->rotated / 2;
    if (weight) {
        float mean, scale;
        Op own = *op;
        own.weight = weight, own.option = ROOT_MEAN_SQUARE, own.bias = NULL;
        measured(x, size, &own, &mean, &scale);
        for (int i = 0; i < size; i += 16) store(x + i, normed_at(x, i, &own, mean, scale));
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

INLINE void copied(void *to, int64_t at, const float *x, int size, int dtype) {
    for (int i = 0; i < size; i += 16) narrow(to, at + i, load(x + i), dtype);
}

/* Where a sequence's keys of one head begin, in numbers, were its position 0 there. */
INLINE int64_t beginning(const Step *step, const Op *op, int row, int key_head, int size) {
    int sequence = step->sequence[row];
    return sequence * step->by_sequence[op->span] + key_head * step->by_head[op->span] -
           (int64_t)step->origin[op->span * step->sequences + sequence] * size;
}

static void rotate(const Self *self, const Op *op) {
    const Program *program = self->program;
    const Step *step = self->step;
    int size = program->size, heads = program->heads, key_heads = program->key_heads;
    int joined = heads + 2 * key_heads;
    for (int task = self->thread; task < step->rows * joined; task += step->threads) {
        int row = task / joined, head = task % joined;
        float *x = step->heads + (int64_t)task * size;
        if (head < heads + key_heads) turn(program, op, step, x, row, head < heads ? op->weight : op->second);
        if (head < heads) continue;
        void *buffer = (head < heads + key_heads ? step->keys : step->values)[op->layer];
        int64_t slot = step->prefix[row] + step->path[step->start[row + 1] - 1];
        copied(buffer, beginning(step, op, row, (head - heads) % key_heads, size) + slot * size, x, size, program->dtype);
    }
}

#include "attention.h"

/* The best tokens of each row, best first; of equal ones the first. */
static void best(const Self *self) {
    const Step *step = self->step;
    int vocabulary = self->program->vocabulary, count = step->best;
    for (int row = self->thread; row < step->kept; row += step->threads) {
        const float *logits = step->logits + (int64_t)row * vocabulary;
        int32_t *found = step->found + (int64_t)row * (1 + count) + 1;
        float values[MOST];
        int have = 0;
        for (int at = 0; at < vocabulary; at += 16) {
            V x = vocabulary - at >= 16 ? load(logits + at) : load_some(logits + at, vocabulary - at);
            uint32_t better = above(x, have < count ? -INFINITY : values[count - 1]);
            while (better) {
                int token = at + __builtin_ctz(better);
                better &= better - 1;
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
        found[-1] = found[0];
    }
}

void RUN(const Program *program, const Step *step, void *barrier, int thread) {
    Self self = {program, step, single_product, (char *)step->normed + thread * step->normed_of_a_thread,
                 (float *)((char *)step->scores + thread * step->scores_of_a_thread), thread, FLOAT32, 0};
    if (program->dtype == FLOAT16) self.product = float16_product;
    if (program->dtype == BFLOAT16) {
#ifdef PAIRS
        self.product = half_product, self.held = BFLOAT16, self.pairs = program->size % 32 == 0;
#else
        self.product = split_product;
#endif
    }
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
            case ATTEND: attend(&self, op, next, barrier); break;
            case BEST: best(&self); break;
        }
        lookahead_meet(barrier, step->threads);
    }
}
