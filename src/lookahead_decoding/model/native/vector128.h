/* Sixteen numbers in four registers of NEON. */
#include <arm_neon.h>

typedef struct {
    float32x4_t part[4];
} V;
#define INLINE static inline __attribute__((always_inline))

INLINE V load(const float *p) { return (V){{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
INLINE void store(float *p, V x) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.part[i]);
}
INLINE V all(float x) { return (V){{vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}}; }

#define OF_TWO(name, instruction)                                                                                      \
    INLINE V name(V a, V b) {                                                                                          \
        for (int i = 0; i < 4; i++) a.part[i] = instruction(a.part[i], b.part[i]);                                     \
        return a;                                                                                                      \
    }
OF_TWO(add, vaddq_f32)
OF_TWO(sub, vsubq_f32)
OF_TWO(mul, vmulq_f32)
OF_TWO(over, vdivq_f32)
OF_TWO(larger, vmaxq_f32)
OF_TWO(smaller, vminq_f32)

INLINE V fused(V a, V b, V c) { /* a * b + c */
    for (int i = 0; i < 4; i++) c.part[i] = vfmaq_f32(c.part[i], a.part[i], b.part[i]);
    return c;
}
INLINE V unfused(V a, V b, V c) { /* c - a * b */
    for (int i = 0; i < 4; i++) c.part[i] = vfmsq_f32(c.part[i], a.part[i], b.part[i]);
    return c;
}
INLINE V rounded(V x) {
    for (int i = 0; i < 4; i++) x.part[i] = vrndnq_f32(x.part[i]);
    return x;
}
INLINE V scaled(V x, V n) { /* x * 2^n */
    for (int i = 0; i < 4; i++) {
        int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.part[i]), vdupq_n_s32(127)), 23);
        x.part[i] = vmulq_f32(x.part[i], vreinterpretq_f32_s32(power));
    }
    return x;
}
INLINE float total(V x) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(x.part[0], x.part[1]), vaddq_f32(x.part[2], x.part[3])));
}
INLINE float largest(V x) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.part[0], x.part[1]), vmaxq_f32(x.part[2], x.part[3])));
}

/* The lanes from `from` up to `to`, and less than every number in the others. */
INLINE V between(V x, int from, int to) {
    static const int32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int i = 0; i < 4; i++) {
        int32x4_t lane = vld1q_s32(lanes + 4 * i);
        uint32x4_t inside = vandq_u32(vcgeq_s32(lane, vdupq_n_s32(from)), vcltq_s32(lane, vdupq_n_s32(to)));
        x.part[i] = vbslq_f32(inside, x.part[i], vdupq_n_f32(-INFINITY));
    }
    return x;
}

#include "some.h"

/* Zero in the lanes where `of` is less than every number. */
INLINE V where_some(V x, V of) {
    for (int i = 0; i < 4; i++) {
        uint32x4_t none = vceqq_f32(of.part[i], vdupq_n_f32(-INFINITY));
        x.part[i] = vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x.part[i]), none));
    }
    return x;
}

/* A bit per lane that is above a number. */
INLINE uint32_t above(V x, float least) {
    static const uint32_t bits[4] = {1, 2, 4, 8};
    uint32_t found = 0;
    for (int i = 0; i < 4; i++)
        found |= vaddvq_u32(vandq_u32(vcgtq_f32(x.part[i], vdupq_n_f32(least)), vld1q_u32(bits))) << (4 * i);
    return found;
}

INLINE V wide(const void *from, int64_t at, int dtype) {
    if (dtype == FLOAT32) return load((const float *)from + at);
    V x;
    for (int i = 0; i < 4; i++) {
        uint16x4_t half = vld1_u16((const uint16_t *)from + at + 4 * i);
        x.part[i] = dtype == FLOAT16 ? vcvt_f32_f16(vreinterpret_f16_u16(half))
                                     : vreinterpretq_f32_u32(vshll_n_u16(half, 16));
    }
    return x;
}

INLINE void narrow(void *to, int64_t at, V x, int dtype) {
    if (dtype == FLOAT32) {
        store((float *)to + at, x);
        return;
    }
    for (int i = 0; i < 4; i++) {
        uint16_t *half = (uint16_t *)to + at + 4 * i;
        if (dtype == FLOAT16) {
            vst1_u16(half, vreinterpret_u16_f16(vcvt_f16_f32(x.part[i])));
            continue;
        }
        uint32x4_t bits = vreinterpretq_u32_f32(x.part[i]); /* to the nearest, and of two the even one */
        uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        bits = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        vst1_u16(half, vshrn_n_u32(bits, 16));
    }
}

/* Sixteen vectors, so that the first has the first lanes of all. */
INLINE void transposed(V *v) {
    V to[16];
    for (int row = 0; row < 4; row++)
        for (int column = 0; column < 4; column++) {
            float32x4x2_t a = vtrnq_f32(v[4 * row].part[column], v[4 * row + 1].part[column]);
            float32x4x2_t b = vtrnq_f32(v[4 * row + 2].part[column], v[4 * row + 3].part[column]);
            V *out = to + 4 * column;
            out[0].part[row] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
            out[1].part[row] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
            out[2].part[row] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
            out[3].part[row] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
        }
    for (int i = 0; i < 16; i++) v[i] = to[i];
}

#ifdef PAIRS
/* A pair of bfloat16, multiplied with sixteen pairs. */
INLINE V pairs_fused(V many, const uint16_t *pair, V sum) {
    int32_t both;
    memcpy(&both, pair, 4);
    for (int i = 0; i < 4; i++)
        sum.part[i] = vbfdotq_f32(sum.part[i], vreinterpretq_bf16_f32(many.part[i]), vreinterpretq_bf16_s32(vdupq_n_s32(both)));
    return sum;
}
#endif

/* ---- products: a panel for some rows, out[row][32] ---- */

enum { BLOCK = 12, ASKED = 4, MIXED = 2 };

#define PRODUCT_BLOCK(name, weight_type, type, step, per, ready, multiplied)                                            \
    INLINE void name(const weight_type *w, const type *x, int64_t by, int inputs, float *out, const int rows) {        \
        float32x4_t sum[3][8];                                                                                         \
        _Pragma("GCC unroll 3") for (int r = 0; r < rows; r++)                                                         \
            _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) sum[r][i] = vdupq_n_f32(0.0f);                         \
        for (int k = 0; k < inputs; k += step) {                                                                       \
            const weight_type *at = w + k * PANEL;                                                                     \
            __builtin_prefetch((const char *)at + AHEAD);                                                              \
            _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) {                                                      \
                const weight_type *p = at + per * i;                                                                   \
                ready;                                                                                                 \
                _Pragma("GCC unroll 3") for (int r = 0; r < rows; r++) {                                               \
                    const type *one = x + r * by + k;                                                                  \
                    multiplied;                                                                                        \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 3") for (int r = 0; r < rows; r++)                                                         \
            _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) vst1q_f32(out + r * PANEL + 4 * i, sum[r][i]);         \
    }
PRODUCT_BLOCK(single_block, float, float, 1, 4, float32x4_t weight = vld1q_f32(p),
             sum[r][i] = vfmaq_n_f32(sum[r][i], weight, *one))
PRODUCT_BLOCK(float16_block, uint16_t, float, 1, 4, float32x4_t weight = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))),
             sum[r][i] = vfmaq_n_f32(sum[r][i], weight, *one))
/* bfloat16 without its instructions: the two numbers of a pair are the halves of 32 bits. */
PRODUCT_BLOCK(split_block, uint16_t, float, 2, 8, uint32x4_t both = vreinterpretq_u32_u16(vld1q_u16(p)),
             sum[r][i] = vfmaq_n_f32(sum[r][i], vreinterpretq_f32_u32(vshlq_n_u32(both, 16)), one[0]);
             sum[r][i] = vfmaq_n_f32(sum[r][i], vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff0000))), one[1]))
#ifdef PAIRS
INLINE bfloat16x8_t four_times(const uint16_t *pair) {
    int32_t both;
    memcpy(&both, pair, 4);
    return vreinterpretq_bf16_s32(vdupq_n_s32(both));
}
PRODUCT_BLOCK(half_block, uint16_t, uint16_t, 2, 8, bfloat16x8_t weight = vreinterpretq_bf16_u16(vld1q_u16(p)),
             sum[r][i] = vbfdotq_f32(sum[r][i], weight, four_times(one)))
#endif
