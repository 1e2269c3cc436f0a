/* Sixteen numbers in two registers of AVX2. */
#include <immintrin.h>

typedef struct {
    __m256 low, high;
} V;
#define INLINE static inline __attribute__((always_inline))

INLINE V load(const float *p) { return (V){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float *p, V x) {
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
}
INLINE V all(float x) { return (V){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE V add(V a, V b) { return (V){_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
INLINE V sub(V a, V b) { return (V){_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
INLINE V mul(V a, V b) { return (V){_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
INLINE V over(V a, V b) { return (V){_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
INLINE V fused(V a, V b, V c) { /* a * b + c */
    return (V){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE V unfused(V a, V b, V c) { /* c - a * b */
    return (V){_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
INLINE V larger(V a, V b) { return (V){_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
INLINE V smaller(V a, V b) { return (V){_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
INLINE V rounded(V x) { return (V){_mm256_round_ps(x.low, 8), _mm256_round_ps(x.high, 8)}; }

INLINE __m256 scaled_half(__m256 x, __m256 n) {
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(power));
}

INLINE V scaled(V x, V n) { return (V){scaled_half(x.low, n.low), scaled_half(x.high, n.high)}; } /* x * 2^n */

INLINE float total(V x) {
    __m256 sum = _mm256_add_ps(x.low, x.high);
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

INLINE float largest(V x) {
    __m256 most = _mm256_max_ps(x.low, x.high);
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

/* The lanes from `from` up to `to`, and less than every number in the others. */
INLINE V between(V x, int from, int to) {
    __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), more = _mm256_add_epi32(lanes, _mm256_set1_epi32(8));
    __m256i first = _mm256_set1_epi32(from - 1), end = _mm256_set1_epi32(to);
    __m256i low = _mm256_and_si256(_mm256_cmpgt_epi32(lanes, first), _mm256_cmpgt_epi32(end, lanes));
    __m256i high = _mm256_and_si256(_mm256_cmpgt_epi32(more, first), _mm256_cmpgt_epi32(end, more));
    __m256 nothing = _mm256_set1_ps(-INFINITY);
    return (V){_mm256_blendv_ps(nothing, x.low, _mm256_castsi256_ps(low)),
               _mm256_blendv_ps(nothing, x.high, _mm256_castsi256_ps(high))};
}

#include "some.h"

/* Zero in the lanes where `of` is less than every number. */
INLINE V where_some(V x, V of) {
    __m256 nothing = _mm256_set1_ps(-INFINITY);
    return (V){_mm256_and_ps(x.low, _mm256_cmp_ps(of.low, nothing, _CMP_NEQ_OQ)),
               _mm256_and_ps(x.high, _mm256_cmp_ps(of.high, nothing, _CMP_NEQ_OQ))};
}

/* A bit per lane that is above a number. */
INLINE uint32_t above(V x, float least) {
    __m256 bound = _mm256_set1_ps(least);
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(x.low, bound, _CMP_GT_OQ)) |
           (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(x.high, bound, _CMP_GT_OQ)) << 8;
}

INLINE __m256 wide_half(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}

INLINE V wide(const void *from, int64_t at, int dtype) {
    if (dtype == FLOAT32) return load((const float *)from + at);
    if (dtype == FLOAT16) {
        const __m128i *p = (const __m128i *)((const uint16_t *)from + at);
        return (V){_mm256_cvtph_ps(_mm_loadu_si128(p)), _mm256_cvtph_ps(_mm_loadu_si128(p + 1))};
    }
    return (V){wide_half((const uint16_t *)from + at), wide_half((const uint16_t *)from + at + 8)};
}

INLINE void narrow_half(uint16_t *to, __m256 x) {
    __m256i bits = _mm256_castps_si256(x); /* to the nearest, and of two the even one */
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    bits = _mm256_srli_epi32(bits, 16);
    __m128i both = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128((__m128i *)to, both);
}

INLINE void narrow(void *to, int64_t at, V x, int dtype) {
    if (dtype == FLOAT32) {
        store((float *)to + at, x);
        return;
    }
    if (dtype == FLOAT16) {
        __m128i *p = (__m128i *)((uint16_t *)to + at);
        _mm_storeu_si128(p, _mm256_cvtps_ph(x.low, 0));
        _mm_storeu_si128(p + 1, _mm256_cvtps_ph(x.high, 0));
        return;
    }
    narrow_half((uint16_t *)to + at, x.low);
    narrow_half((uint16_t *)to + at + 8, x.high);
}

INLINE void eight_transposed(__m256 *v) {
    __m256 a[8];
    for (int i = 0; i < 8; i += 4) {
        __m256 x = _mm256_unpacklo_ps(v[i], v[i + 1]), y = _mm256_unpackhi_ps(v[i], v[i + 1]);
        __m256 z = _mm256_unpacklo_ps(v[i + 2], v[i + 3]), w = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
        a[i] = _mm256_shuffle_ps(x, z, 0x44), a[i + 1] = _mm256_shuffle_ps(x, z, 0xee);
        a[i + 2] = _mm256_shuffle_ps(y, w, 0x44), a[i + 3] = _mm256_shuffle_ps(y, w, 0xee);
    }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
    }
}

/* Sixteen vectors, so that the first has the first lanes of all. */
INLINE void transposed(V *v) {
    __m256 parts[4][8];
    for (int i = 0; i < 8; i++) {
        parts[0][i] = v[i].low, parts[1][i] = v[i].high, parts[2][i] = v[i + 8].low, parts[3][i] = v[i + 8].high;
    }
    for (int i = 0; i < 4; i++) eight_transposed(parts[i]);
    for (int i = 0; i < 8; i++) {
        v[i] = (V){parts[0][i], parts[2][i]};
        v[i + 8] = (V){parts[1][i], parts[3][i]};
    }
}

/* ---- products: a panel for some rows, out[row][32] ---- */

enum { BLOCK = 12, ASKED = 4, MIXED = 1 };

INLINE void split_block(const uint16_t *w, const float *x, int64_t by, int inputs, float *out, const int rows) {
    __m256 sum[3][4];
    __m256i upper = _mm256_set1_epi32((int)0xffff0000);
#pragma GCC unroll 3
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum[r][i] = _mm256_setzero_ps();
    for (int k = 0; k < inputs; k += 2) {
        const uint16_t *at = w + k * PANEL;
        _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)at + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __m256i both = _mm256_loadu_si256((const __m256i *)(at + 16 * i));
            __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
            __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(both, upper));
#pragma GCC unroll 3
            for (int r = 0; r < rows; r++) {
                sum[r][i] = _mm256_fmadd_ps(even, _mm256_broadcast_ss(x + r * by + k), sum[r][i]);
                sum[r][i] = _mm256_fmadd_ps(odd, _mm256_broadcast_ss(x + r * by + k + 1), sum[r][i]);
            }
        }
    }
#pragma GCC unroll 3
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) _mm256_storeu_ps(out + r * PANEL + 8 * i, sum[r][i]);
}

#define PRODUCT_BLOCK(name, weight_type, ready)                                                                        \
    INLINE void name(const weight_type *w, const float *x, int64_t by, int inputs, float *out, const int rows) {       \
        __m256 sum[3][4];                                                                                              \
        _Pragma("GCC unroll 3") for (int r = 0; r < rows; r++)                                                         \
            _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) sum[r][i] = _mm256_setzero_ps();                       \
        for (int k = 0; k < inputs; k++) {                                                                             \
            const weight_type *at = w + k * PANEL;                                                                     \
            for (size_t line = 0; line < PANEL * sizeof(weight_type); line += 64)                                      \
                _mm_prefetch((const char *)at + AHEAD + line, _MM_HINT_T0);                                            \
            _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {                                                      \
                __m256 one = ready(at + 8 * i);                                                                        \
                _Pragma("GCC unroll 3") for (int r = 0; r < rows; r++)                                                 \
                    sum[r][i] = _mm256_fmadd_ps(one, _mm256_broadcast_ss(x + r * by + k), sum[r][i]);                  \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 3") for (int r = 0; r < rows; r++)                                                         \
            _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) _mm256_storeu_ps(out + r * PANEL + 8 * i, sum[r][i]);  \
    }
#define OF_FLOAT32(p) _mm256_loadu_ps(p)
#define OF_FLOAT16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
PRODUCT_BLOCK(single_block, float, OF_FLOAT32)
PRODUCT_BLOCK(float16_block, uint16_t, OF_FLOAT16)
