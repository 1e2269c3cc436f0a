#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#include <math.h>
#include <string.h>

#include "step.h"
#define PAIRS 1
#include "vector512.h"
#define BLOCKS_OF_THREE 0
#define RUN lookahead_avx512_bf16
#include "operations.h"
#endif
