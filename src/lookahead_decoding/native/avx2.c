#pragma GCC target("avx2,fma")
#include <math.h>
#include <string.h>

#include "step.h"
#include "vector256.h"
#define BLOCKS_OF_THREE 1
#define RUN lookahead_avx2
#include "operations.h"
