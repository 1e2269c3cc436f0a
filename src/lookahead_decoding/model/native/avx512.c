#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#include <math.h>
#include <string.h>

#include "step.h"
#include "vector512.h"
#define BLOCKS_OF_THREE 0
#define RUN lookahead_avx512
#include "operations.h"
#endif
