/* Attention, by key heads and by blocks of positions.
 *
 * A thread takes a block of positions for some rows and for all query heads that share a key head. Sixteen keys are laid
 * side by side once, and serve all of them. What a block gives is put together with the row's other blocks afterwards,
 * in the order of positions. Blocks begin at fixed positions and every sum runs over positions in their order, so that
 * neither the division of work nor the place of keys in the cache changes a bit.
 */

/* What one row sees, in the order of positions. Up to `straight` they lie side by side in the cache. */
typedef struct {
    int64_t base;
    const int32_t *path;
    int prefix, first, straight, end;
} View;

INLINE int64_t place(const View *view, int position, int size) {
    int slot = position < view->prefix ? position : view->prefix + view->path[position - view->prefix];
    return view->base + (int64_t)slot * size;
}

static View view_of(const Self *self, const Op *op, int row, int key_head) {
    const Step *step = self->step;
    int length = step->start[row + 1] - step->start[row], window = op->option;
    View view = {.base = beginning(step, op, row, key_head, self->program->size), .path = step->path + step->start[row]};
    view.prefix = view.straight = step->prefix[row];
    view.end = view.prefix + length;
    for (int i = 0; i < length && view.path[i] == i; i++) view.straight++;
    if (window > 0 && view.end > window) view.first = view.end - window;
    if (window < 0) view.first = (view.end - 1) / -window * -window; /* the last of its chunks */
    return view;
}

/* Some rows and query heads at one block of positions. */
typedef struct {
    View views[SHARING];
    int key_head, head, queries, row, rows, from, to; /* `queries` heads from `head` on; positions of the block */
    float *weights, *sums, *keys;                     /* (SHARING, SPAN), (SHARING, size), (size, TILE) */
    char *asked;                                      /* queries as products read them, (SHARING, size) */
    float most[SHARING], whole[SHARING];
} Task;

INLINE int lowest(const Task *task, const View *view) { return view->first > task->from ? view->first : task->from; }
INLINE int highest(const Task *task, const View *view) { return view->end < task->to ? view->end : task->to; }
INLINE int sees(const Task *task, const View *view) { return lowest(task, view) < highest(task, view); }

/* Keys of sixteen positions side by side: number by number, or pair by pair of bfloat16. */
static void lay(const Self *self, const View *view, int at, const void *keys, float *out) {
    static const float nothing[512];
    int size = self->program->size, dtype = self->program->dtype;
    const char *from[TILE];
    for (int i = 0; i < TILE; i++) {
        int inside = at + i >= view->first && at + i < view->end;
        from[i] = inside ? (const char *)keys + place(view, at + i, size) * bytes(dtype) : (const char *)nothing;
    }
    V numbers[TILE];
    int step = self->pairs ? 2 : 1;
    for (int d = 0; d < size / step; d += 16) {
        for (int i = 0; i < TILE; i++)
            numbers[i] = self->pairs ? load((const float *)from[i] + d) : wide(from[i], d, dtype);
        transposed(numbers);
        for (int i = 0; i < TILE; i++) store(out + (d + i) * TILE, numbers[i]);
    }
}

#define PRODUCTS(name, type, step, multiplied)                                                                         \
    INLINE void name##_of(const float *keys, const type *asked, int size, float *out, const int count) {               \
        V sum[ASKED];                                                                                                  \
        for (int q = 0; q < count; q++) sum[q] = all(0.0f);                                                            \
        for (int d = 0; d < size; d += step) {                                                                         \
            V key = load(keys + d / step * TILE);                                                                      \
            _Pragma("GCC unroll 8") for (int q = 0; q < count; q++) sum[q] = multiplied;                               \
        }                                                                                                              \
        for (int q = 0; q < count; q++) store(out + q * SPAN, sum[q]);                                                 \
    }                                                                                                                  \
    static void name(const float *keys, const void *queries, int size, float *out, int count) {                       \
        const type *asked = queries;                                                                                   \
        for (; count >= ASKED; count -= ASKED, asked += ASKED * size, out += ASKED * SPAN)                             \
            name##_of(keys, asked, size, out, ASKED);                                                                  \
        for (; count >= 2; count -= 2, asked += 2 * size, out += 2 * SPAN) name##_of(keys, asked, size, out, 2);       \
        for (; count; count--, asked += size, out += SPAN) name##_of(keys, asked, size, out, 1);                       \
    }
PRODUCTS(products, float, 1, fused(key, all(asked[q * size + d]), sum[q]))
#ifdef PAIRS
PRODUCTS(pair_products, uint16_t, 2, pairs_fused(key, asked + q * size + d, sum[q]))
#endif

/* Products of all queries with all keys that they see. Rows of a sequence share keys that lie side by side. */
static void multiply(const Self *self, const Task *task, const void *keys) {
    int size = self->program->size;
    for (int at = task->from; at < task->to; at += TILE) {
        for (int r = 0, next; r < task->rows; r = next) {
            const View *view = task->views + r;
            next = r + 1;
            if (at >= view->end || at + TILE <= view->first) continue;
            View shared = *view;
            if (at + TILE <= view->straight) {
                for (; next < task->rows; next++) {
                    const View *other = task->views + next;
                    if (other->base != view->base || at + TILE > other->straight || at + TILE <= other->first) break;
                    if (other->first < shared.first) shared.first = other->first;
                }
            }
            lay(self, &shared, at, keys, task->keys);
            const char *asked = task->asked + (int64_t)r * task->queries * size * bytes(self->pairs ? BFLOAT16 : FLOAT32);
            float *out = task->weights + r * task->queries * SPAN + at - task->from;
#ifdef PAIRS
            if (self->pairs) {
                pair_products(task->keys, asked, size, out, (next - r) * task->queries);
                continue;
            }
#endif
            products(task->keys, asked, size, out, (next - r) * task->queries);
        }
    }
}

/* From products to weights, not yet divided by their sum. */
static void weigh(const Self *self, const Op *op, Task *task) {
    V scale = all(self->program->scale), cap = all(op->factor);
    for (int q = 0; q < task->rows * task->queries; q++) {
        const View *view = task->views + q / task->queries;
        float *weights = task->weights + q * SPAN - task->from;
        int first = lowest(task, view), end = highest(task, view);
        V best = all(-INFINITY), sum = all(0.0f);
        for (int at = first / TILE * TILE; at < end; at += TILE) {
            V score = mul(load(weights + at), scale);
            if (op->factor > 0) score = mul(hyperbolic_tangent(over(score, cap)), cap);
            score = between(score, first - at, end - at);
            store(weights + at, score);
            best = larger(best, score);
        }
        V most = all(largest(best));
        for (int at = first / TILE * TILE; at < end; at += TILE) {
            V score = load(weights + at);
            V weight = where_some(exponential(sub(score, most)), score);
            store(weights + at, weight);
            sum = add(sum, weight);
        }
        task->most[q] = largest(best), task->whole[q] = total(sum);
    }
}

INLINE void mix_of(const void *values, const View *view, int from, int to, int size, int dtype, const float *weights,
                   float *sums, const int queries, const int parts) {
    V sum[MIXED][4];
    for (int q = 0; q < queries; q++)
        for (int i = 0; i < parts; i++) sum[q][i] = load(sums + q * size + 16 * i);
    for (int position = from; position < to; position++) {
        int64_t value = place(view, position, size);
        V row[4] = {all(0.0f)};
#pragma GCC unroll 4
        for (int i = 0; i < parts; i++) row[i] = wide(values, value + 16 * i, dtype);
#pragma GCC unroll 4
        for (int q = 0; q < queries; q++) {
            V weight = all(weights[q * SPAN + position]);
#pragma GCC unroll 4
            for (int i = 0; i < parts; i++) sum[q][i] = fused(weight, row[i], sum[q][i]);
        }
    }
    for (int q = 0; q < queries; q++)
        for (int i = 0; i < parts; i++) store(sums + q * size + 16 * i, sum[q][i]);
}

/* Values of some positions added to the sums of some queries that all see them. */
static void mix(const Self *self, const Task *task, const View *view, int from, int to, const void *values, int query,
                int queries) {
    int size = self->program->size, dtype = self->program->dtype, end = query + queries;
    for (int now; query < end; query += now) {
        now = end - query < MIXED ? end - query : MIXED;
        const float *weights = task->weights + query * SPAN - task->from;
        for (int d = 0, parts; d < size; d += 16 * parts) {
            parts = size - d < 64 ? (size - d) / 16 : 4;
            const char *part = (const char *)values + d * bytes(dtype);
            float *sums = task->sums + (int64_t)query * size + d;
#define MIX(n, p) mix_of(part, view, from, to, size, dtype, weights, sums, n, p)
            if (parts == 4 && now == MIXED) MIX(MIXED, 4);
            else if (parts == 4 && now == 3) MIX(3, 4);
            else if (parts == 4 && now == 2) MIX(2, 4);
            else if (parts == 4) MIX(1, 4);
            else if (now == MIXED) MIX(MIXED, parts);
            else MIX(now, parts);
#undef MIX
        }
    }
}

/* Sums of values: first what only one row sees, then what all see and lies side by side, then the rest of each row. */
static void mix_all(const Self *self, const Task *task, const void *values) {
    int from = task->from, to = task->to, queries = task->queries;
    for (int r = 0; r < task->rows; r++) {
        const View *view = task->views + r;
        if (view->base != task->views->base || !sees(task, view)) to = from;
        if (lowest(task, view) > from) from = lowest(task, view);
        if (view->straight < to) to = view->straight;
    }
    int shared = from < to;
    memset(task->sums, 0, (size_t)task->rows * queries * self->program->size * sizeof(float));
    for (int r = 0; r < task->rows && shared; r++) {
        const View *view = task->views + r;
        mix(self, task, view, lowest(task, view), from, values, r * queries, queries);
    }
    if (shared) mix(self, task, task->views, from, to, values, 0, task->rows * queries);
    for (int r = 0; r < task->rows; r++) {
        const View *view = task->views + r;
        mix(self, task, view, shared ? to : lowest(task, view), highest(task, view), values, r * queries, queries);
    }
}

INLINE int blocks_of(const View *view) { return (view->end - 1) / SPAN - view->first / SPAN + 1; }

/* Where a block's sums lie: the largest score, the sum of weights, and the sums of values. */
INLINE float *partial(const Self *self, int row, int head, int block) {
    const Program *program = self->program;
    int64_t of_head = ((int64_t)row * program->heads + head) * self->step->blocks + block;
    return self->step->partials + of_head * (program->size + 2);
}

static void give(const Self *self, const Task *task) {
    int size = self->program->size, heads = self->program->heads;
    for (int q = 0; q < task->rows * task->queries; q++) {
        const View *view = task->views + q / task->queries;
        if (!sees(task, view)) continue;
        int row = task->row + q / task->queries, head = task->head + q % task->queries;
        const float *sums = task->sums + (int64_t)q * size;
        if (blocks_of(view) > 1) {
            float *to = partial(self, row, head, task->from / SPAN - view->first / SPAN);
            to[0] = task->most[q], to[1] = task->whole[q];
            memcpy(to + 2, sums, (size_t)size * sizeof(float));
            continue;
        }
        V share = all(1.0f / task->whole[q]);
        for (int i = 0; i < size; i += 16)
            narrow(self->step->attended, ((int64_t)row * heads + head) * size + i, mul(load(sums + i), share), self->held);
    }
}

/* The blocks of a row put together, in the order of positions. */
static void join(const Self *self, const Op *op) {
    const Program *program = self->program;
    int size = program->size;
    for (int task = self->thread; task < self->step->rows * program->heads; task += self->step->threads) {
        int row = task / program->heads, head = task % program->heads;
        View view = view_of(self, op, row, 0);
        int blocks = blocks_of(&view), by = size + 2;
        if (blocks == 1) continue;
        float *first = partial(self, row, head, 0), most = first[0], whole = 0.0f;
        for (int b = 1; b < blocks; b++) most = first[b * by] > most ? first[b * by] : most;
        for (int b = 0; b < blocks; b++) {
            float share[16];
            store(share, exponential(all(first[b * by] - most)));
            first[b * by] = share[0];
            whole += share[0] * first[b * by + 1];
        }
        for (int i = 0; i < size; i += 16) {
            V sum = all(0.0f);
            for (int b = 0; b < blocks; b++) sum = fused(all(first[b * by]), load(first + b * by + 2 + i), sum);
            narrow(self->step->attended, (int64_t)task * size + i, mul(sum, all(1.0f / whole)), self->held);
        }
    }
}

static void attend_block(const Self *self, const Op *op, Task *task) {
    const Program *program = self->program;
    int size = program->size, joined = program->heads + 2 * program->key_heads;
    for (int r = 0; r < task->rows; r++) {
        task->views[r] = view_of(self, op, task->row + r, task->key_head);
        const float *query = self->step->heads + ((int64_t)(task->row + r) * joined + task->head) * size;
        copied(task->asked, (int64_t)r * task->queries * size, query, task->queries * size, self->pairs ? BFLOAT16 : FLOAT32);
    }
    multiply(self, task, self->step->keys[op->layer]);
    weigh(self, op, task);
    mix_all(self, task, self->step->values[op->layer]);
    give(self, task);
}

/* Query heads of a key head are divided only where threads would have nothing to do. */
static void attend(const Self *self, const Op *op, int64_t *next, void *barrier) {
    const Step *step = self->step;
    const Program *program = self->program;
    int size = program->size, groups = program->heads / program->key_heads, first = INT32_MAX, last = 0, several = 0;
    for (int row = 0; row < step->rows; row++) {
        View view = view_of(self, op, row, 0);
        if (view.first / SPAN < first) first = view.first / SPAN;
        if ((view.end - 1) / SPAN > last) last = (view.end - 1) / SPAN;
        several |= blocks_of(&view) > 1;
    }
    int blocks = last - first + 1, parts = (groups + 15) / 16, rows = SHARING / ((groups + parts - 1) / parts);
    int units = program->key_heads * blocks;
#define TASKS ((int64_t)units * parts * ((step->rows + rows - 1) / rows))
    while (rows > 1 && TASKS < 4 * step->threads) rows = (rows + 1) / 2;
    while (parts < groups && TASKS < 2 * step->threads) parts++;
    int most = (groups + parts - 1) / parts, together = (step->rows + rows - 1) / rows;
    int64_t tasks = TASKS, some = tasks / (8 * step->threads) + 1;
    Task task = {.weights = self->scores};
    task.sums = task.weights + SHARING * SPAN, task.keys = task.sums + SHARING * size;
    task.asked = (char *)(task.keys + TILE * size);
    for (int64_t at = take(next, some); at < tasks; at = take(next, some))
        for (int64_t number = at; number < at + some && number < tasks; number++) {
            int part = (int)(number / together) % parts, unit = (int)(number / together / parts);
            task.row = (int)(number % together) * rows; /* rows share keys */
            task.rows = step->rows - task.row < rows ? step->rows - task.row : rows;
            task.queries = groups - part * most < most ? groups - part * most : most;
            if (task.queries <= 0) continue;
            task.key_head = unit / blocks;
            task.head = task.key_head * groups + part * most;
            task.from = (first + unit % blocks) * SPAN, task.to = task.from + SPAN;
            attend_block(self, op, &task);
        }
    if (!several) return;
    lookahead_meet(barrier, step->threads);
    join(self, op);
}
