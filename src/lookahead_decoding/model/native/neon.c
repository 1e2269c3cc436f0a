#if defined(__aarch64__)
#include <math.h>
#include <string.h>

#include "step.h"
#include "vector128.h"
#define BLOCKS_OF_THREE 1
#define RUN lookahead_neon
#include "operations.h"
#endif
