#if defined(__aarch64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("bf16"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+bf16")
#endif
#include <math.h>
#include <string.h>

#include "step.h"
#define PAIRS 1
#include "vector128.h"
#define BLOCKS_OF_THREE 1
#define RUN lookahead_neon_bf16
#include "operations.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
