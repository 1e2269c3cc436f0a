/* Which code runs a step, and how its threads begin and meet. */
#include "step.h"

#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>

enum { SPINS = 20000 };

typedef struct {
    _Atomic int waiting;
    _Atomic int round;
} Barrier;

void lookahead_meet(void *all, int threads) {
    Barrier *barrier = all;
    if (threads == 1) return;
    int round = atomic_load(&barrier->round);
    if (atomic_fetch_add(&barrier->waiting, 1) == threads - 1) {
        atomic_store(&barrier->waiting, 0);
        atomic_store(&barrier->round, round + 1);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&barrier->round, memory_order_acquire) == round; spins++) {
        if (spins < SPINS) __builtin_ia32_pause();
        else sched_yield(); /* somebody else needs this core */
    }
}

static const Thread KINDS[] = {0, lookahead_avx2, lookahead_avx512, lookahead_avx512_bf16};

/* The best code for this processor: 3 with products of bfloat16, 2 with AVX-512, 1 with AVX2, 0 none. */
int lookahead_able(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return 1;
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
}

/* A step by code of one kind, which this processor must be able to run. */
void lookahead_step(const Program *program, const Step *step, int kind) {
    Barrier barrier = {0, 0};
    Step own = *step;
    memset(step->next, 0, (size_t)program->count * 8 * sizeof(int64_t));
#pragma omp parallel num_threads(step->threads)
    {
#pragma omp single
        own.threads = omp_get_num_threads();
        KINDS[kind](program, &own, &barrier, omp_get_thread_num());
    }
}

/* Ask for large pages; a system without them says no, and nothing else is lost. */
void lookahead_large_pages(void *at, int64_t size) {
#ifdef MADV_HUGEPAGE
    madvise(at, (size_t)size, MADV_HUGEPAGE);
#else
    (void)at, (void)size;
#endif
}
