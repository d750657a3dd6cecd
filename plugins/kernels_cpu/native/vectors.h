// Vectors of LANES floats in the compiler's own notation, so that one source serves every level of processor, and the
// few functions of them that the pieces need. Nothing here assumes finite values: NaN stays NaN, and ∞ what it was.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef vec anywhere __attribute__((aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vec all(float x) { return x - (vec){}; }
INLINE vec load(const float *from) { return *(const anywhere *)from; }
INLINE void store(float *to, vec x) { *(anywhere *)to = x; }

// The first `count` values, or all; what is missing is 0.
INLINE vec load(const float *from, int64_t count) {
    if (count >= LANES) return load(from);
    vec x = {};
    memcpy(&x, from, count * sizeof(float));
    return x;
}
INLINE void store(float *to, vec x, int64_t count) {
    if (count >= LANES) store(to, x);
    else memcpy(to, &x, count * sizeof(float));
}

// Values of `a` and `b` by their places: those of `b` follow those of `a`.
INLINE vec chosen(vec a, vec b, ivec at) {
#if defined(__clang__)
    vec y;
    for (int lane = 0; lane < LANES; lane++) y[lane] = at[lane] < LANES ? a[at[lane]] : b[at[lane] - LANES];
    return y;
#else
    return __builtin_shuffle(a, b, at);
#endif
}

// LANES vectors, as a matrix of LANES × LANES, become its transpose: blocks of STEP values change places across the
// diagonal, the largest first.
template <int STEP = LANES / 2>
INLINE void transpose(vec *rows) {
    ivec upper, lower;
    for (int lane = 0; lane < LANES; lane++) {
        upper[lane] = lane & STEP ? LANES + lane - STEP : lane;
        lower[lane] = lane & STEP ? LANES + lane : lane + STEP;
    }
#pragma GCC unroll 16
    for (int row = 0; row < LANES; row++)
        if (!(row & STEP)) {
            const vec above = rows[row], below = rows[row + STEP];
            rows[row] = chosen(above, below, upper);
            rows[row + STEP] = chosen(above, below, lower);
        }
    if constexpr (STEP > 1) transpose<STEP / 2>(rows);
}

// The greater one; `b` where either is NaN.
INLINE vec greater(vec a, vec b) { return a > b ? a : b; }

INLINE float sum(vec x) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += x[lane];
    return total;
}
INLINE float most(vec x) {
    float top = x[0];
    for (int lane = 1; lane < LANES; lane++) top = x[lane] > top ? x[lane] : top;
    return top;
}

// eˣ to 1e-7 of itself (Cephes' expf): x = k·ln 2 + r, a polynomial of r, and 2ᵏ in two factors so that it may overflow
// to ∞. Below e^-87 it is 0.
INLINE vec exponential(vec x) {
    const vec low = all(-87.33f), high = all(89.0f), magic = all(12582912.0f);  // 1.5 · 2²³ rounds to whole numbers
    vec within = x < low ? low : x;
    within = within > high ? high : within;
    vec rounded = within * 1.44269504088896341f + magic;
    const ivec k = (ivec)rounded - (ivec)magic;
    rounded -= magic;
    const vec r = within - rounded * 0.693359375f + rounded * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const ivec half = k >> 1;
    p = p * (vec)((half + 127) << 23) * (vec)((k - half + 127) << 23);
    p = x < low ? all(0) : p;
    return x == x ? p : x;
}

// tanh x to 2e-7 of itself (Cephes' tanhf): near 0 by a polynomial, where the quotient would cancel.
INLINE vec tangent(vec x) {
    const vec size = x < 0 ? -x : x, square = x * x;
    vec p = square * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    p = p * square * x + x;
    const vec far = 1.0f - 2.0f / (exponential(size + size) + 1.0f);
    return size < 0.625f ? p : (x < 0 ? -far : far);
}

// So many values are added in float32, lane by lane, and the sums of these runs in double: long rows lose nothing.
#define RUN (16 * LANES)

// Σ xᵢ·yᵢ.
INLINE double dot(const float *x, const float *y, int64_t n) {
    double total = 0;
    for (int64_t start = 0; start < n; start += RUN) {
        const int64_t stop = start + RUN < n ? start + RUN : n;
        vec a = {}, b = {};
        int64_t i = start;
        for (; i + 2 * LANES <= stop; i += 2 * LANES) {
            a += load(x + i) * load(y + i);
            b += load(x + i + LANES) * load(y + i + LANES);
        }
        for (; i < stop; i += LANES) a += load(x + i, stop - i) * load(y + i, stop - i);
        total += sum(a + b);
    }
    return total;
}
