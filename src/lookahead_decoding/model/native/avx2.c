#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include <math.h>
#include <string.h>

#include "step.h"
#include "vector256.h"
#define BLOCKS_OF_THREE 1
#define RUN lookahead_avx2
#include "operations.h"
#endif
