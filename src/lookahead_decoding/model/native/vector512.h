/* Sixteen numbers in one register of AVX-512. */
#include <immintrin.h>

typedef __m512 V;
#define INLINE static inline __attribute__((always_inline))

INLINE V load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, V x) { _mm512_storeu_ps(p, x); }
INLINE V all(float x) { return _mm512_set1_ps(x); }
INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
INLINE V over(V a, V b) { return _mm512_div_ps(a, b); }
INLINE V fused(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }    /* a * b + c */
INLINE V unfused(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); } /* c - a * b */
INLINE V larger(V a, V b) { return _mm512_max_ps(a, b); }
INLINE V smaller(V a, V b) { return _mm512_min_ps(a, b); }
INLINE V rounded(V x) { return _mm512_roundscale_ps(x, 0); }
INLINE V scaled(V x, V n) { return _mm512_scalef_ps(x, n); } /* x * 2^n */
INLINE float total(V x) { return _mm512_reduce_add_ps(x); }
INLINE float largest(V x) { return _mm512_reduce_max_ps(x); }

/* The first lanes, and less than every number in the others. */
INLINE V load_some(const float *p, int lanes) {
    return _mm512_mask_loadu_ps(all(-INFINITY), (__mmask16)((1u << lanes) - 1), p);
}

INLINE void store_some(float *p, V x, int lanes) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << lanes) - 1), x); }

/* The lanes from `from` up to `to`, and less than every number in the others. */
INLINE V between(V x, int from, int to) {
    __mmask16 inside = (__mmask16)((to >= 16 ? 0xffffu : (1u << to) - 1) & (from > 0 ? 0xffffu << from : 0xffffu));
    return _mm512_mask_blend_ps(inside, all(-INFINITY), x);
}

/* Zero in the lanes where `of` is less than every number. */
INLINE V where_some(V x, V of) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(of, all(-INFINITY), _CMP_NEQ_OQ), x); }

/* A bit per lane that is above a number. */
INLINE uint32_t above(V x, float least) { return _mm512_cmp_ps_mask(x, all(least), _CMP_GT_OQ); }

INLINE V wide(const void *from, int64_t at, int dtype) {
    if (dtype == FLOAT32) return load((const float *)from + at);
    __m256i half = _mm256_loadu_si256((const __m256i *)((const uint16_t *)from + at));
    if (dtype == FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE void narrow(void *to, int64_t at, V x, int dtype) {
    if (dtype == FLOAT32) {
        store((float *)to + at, x);
        return;
    }
    if (dtype == FLOAT16) {
        _mm256_storeu_si256((__m256i *)((uint16_t *)to + at), _mm512_cvtps_ph(x, 0));
        return;
    }
    __m512i bits = _mm512_castps_si512(x); /* to the nearest, and of two the even one */
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_storeu_si256((__m256i *)((uint16_t *)to + at), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}

/* Sixteen vectors, so that the first has the first lanes of all. Numbers are moved and not computed with. */
INLINE void transposed(V *v) {
    V a[16];
    for (int i = 0; i < 16; i += 4) {
        __m512d x = _mm512_castps_pd(_mm512_unpacklo_ps(v[i], v[i + 1])), y = _mm512_castps_pd(_mm512_unpackhi_ps(v[i], v[i + 1]));
        __m512d z = _mm512_castps_pd(_mm512_unpacklo_ps(v[i + 2], v[i + 3]));
        __m512d w = _mm512_castps_pd(_mm512_unpackhi_ps(v[i + 2], v[i + 3]));
        a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, z)), a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, z));
        a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(y, w)), a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(y, w));
    }
    for (int i = 0; i < 4; i++) {
        V x = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), y = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        V z = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88), w = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
        v[i] = _mm512_shuffle_f32x4(x, z, 0x88), v[i + 4] = _mm512_shuffle_f32x4(y, w, 0x88);
        v[i + 8] = _mm512_shuffle_f32x4(x, z, 0xdd), v[i + 12] = _mm512_shuffle_f32x4(y, w, 0xdd);
    }
}

#ifdef PAIRS
/* A pair of bfloat16, multiplied with sixteen pairs. */
INLINE V pairs_fused(V many, const uint16_t *pair, V sum) {
    int32_t both;
    memcpy(&both, pair, 4);
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(many), (__m512bh)_mm512_set1_epi32(both));
}
#endif

/* ---- products: a panel for some rows, out[row][32] ---- */

enum { BLOCK = 12, ASKED = 8, MIXED = 4 };

#ifdef PAIRS
INLINE void half_block(const uint16_t *w, const uint16_t *x, int64_t by, int inputs, float *out, const int rows) {
    V low[BLOCK], high[BLOCK];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) low[r] = high[r] = all(0.0f);
    for (int k = 0; k < inputs; k += 2) {
        __m512bh w0 = (__m512bh)_mm512_loadu_si512(w + k * PANEL);
        __m512bh w1 = (__m512bh)_mm512_loadu_si512(w + k * PANEL + PANEL);
        _mm_prefetch((const char *)(w + k * PANEL) + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)(w + k * PANEL) + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, x + r * by + k, 4);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            low[r] = _mm512_dpbf16_ps(low[r], w0, both);
            high[r] = _mm512_dpbf16_ps(high[r], w1, both);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        store(out + r * PANEL, low[r]);
        store(out + r * PANEL + 16, high[r]);
    }
}
#endif

/* bfloat16 without its instructions: the two numbers of a pair are the halves of 32 bits. */
INLINE void split_block(const uint16_t *w, const float *x, int64_t by, int inputs, float *out, const int rows) {
    V low[BLOCK], high[BLOCK];
    __m512i upper = _mm512_set1_epi32((int)0xffff0000);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) low[r] = high[r] = all(0.0f);
    for (int k = 0; k < inputs; k += 2) {
        __m512i w0 = _mm512_loadu_si512(w + k * PANEL), w1 = _mm512_loadu_si512(w + k * PANEL + PANEL);
        V even0 = _mm512_castsi512_ps(_mm512_slli_epi32(w0, 16)), odd0 = _mm512_castsi512_ps(_mm512_and_si512(w0, upper));
        V even1 = _mm512_castsi512_ps(_mm512_slli_epi32(w1, 16)), odd1 = _mm512_castsi512_ps(_mm512_and_si512(w1, upper));
        _mm_prefetch((const char *)(w + k * PANEL) + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)(w + k * PANEL) + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            V even = all(x[r * by + k]), odd = all(x[r * by + k + 1]);
            low[r] = fused(odd0, odd, fused(even0, even, low[r]));
            high[r] = fused(odd1, odd, fused(even1, even, high[r]));
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        store(out + r * PANEL, low[r]);
        store(out + r * PANEL + 16, high[r]);
    }
}

#define PRODUCT_BLOCK(name, weight_type, ready)                                                                        \
    INLINE void name(const weight_type *w, const float *x, int64_t by, int inputs, float *out, const int rows) {       \
        V low[BLOCK], high[BLOCK];                                                                                     \
        _Pragma("GCC unroll 12") for (int r = 0; r < rows; r++) low[r] = high[r] = all(0.0f);                          \
        for (int k = 0; k < inputs; k++) {                                                                             \
            V w0 = ready(w, k * PANEL), w1 = ready(w, k * PANEL + 16);                                                 \
            for (size_t line = 0; line < PANEL * sizeof(weight_type); line += 64)                                      \
                _mm_prefetch((const char *)(w + k * PANEL) + AHEAD + line, _MM_HINT_T0);                               \
            _Pragma("GCC unroll 12") for (int r = 0; r < rows; r++) {                                                  \
                V one = all(x[r * by + k]);                                                                            \
                low[r] = fused(w0, one, low[r]);                                                                       \
                high[r] = fused(w1, one, high[r]);                                                                     \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 12") for (int r = 0; r < rows; r++) {                                                      \
            store(out + r * PANEL, low[r]);                                                                            \
            store(out + r * PANEL + 16, high[r]);                                                                      \
        }                                                                                                              \
    }
#define OF_FLOAT32(w, at) load(w + at)
#define OF_FLOAT16(w, at) wide(w, at, FLOAT16)
PRODUCT_BLOCK(single_block, float, OF_FLOAT32)
PRODUCT_BLOCK(float16_block, uint16_t, OF_FLOAT16)
