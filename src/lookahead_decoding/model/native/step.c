/* Which code runs a step, and how its threads begin and meet. */
#include "step.h"

#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

int omp_get_num_threads(void); /* of the library that torch has loaded; its header need not be there */
int omp_get_thread_num(void);

enum { SPINS = 20000 };

typedef struct {
    _Atomic int waiting;
    _Atomic int round;
} Barrier;

static inline void rest(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ volatile("yield");
#endif
}

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
        if (spins < SPINS) rest();
        else sched_yield(); /* somebody else needs this core */
    }
}

#if defined(__x86_64__)
static const Thread KINDS[] = {0, lookahead_avx2, lookahead_avx512, lookahead_avx512_bf16};

/* The best code for this processor: 3 with products of bfloat16, 2 with AVX-512, 1 with AVX2, 0 none. */
int lookahead_able(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return 1;
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
}
#elif defined(__aarch64__)
static const Thread KINDS[] = {0, lookahead_neon, lookahead_neon_bf16};

/* The best code for this processor: 2 with products of bfloat16, 1 with NEON, which all have. */
int lookahead_able(void) {
#if defined(__linux__)
    return getauxval(AT_HWCAP2) & 1 << 14 ? 2 : 1; /* HWCAP2_BF16 */
#elif defined(__APPLE__)
    int found = 0;
    size_t size = sizeof found;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &found, &size, 0, 0) == 0 && found ? 2 : 1;
#else
    return 1;
#endif
}
#else
static const Thread KINDS[] = {0};
int lookahead_able(void) { return 0; }
#endif

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
