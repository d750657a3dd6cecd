// RMSNorm, rotary embedding, gated activations and softmax cross-entropy. All tensors are dense,
// rows one after the other. Each value is computed by one thread in one order: the number of threads changes no bit.
#pragma once
#include "vectors.h"

#define FEW 16384  // so few values are not worth waking the other threads
#define EXPORT extern "C" __attribute__((visibility("default")))

// Which sources this is built from.
EXPORT unsigned sources() { return SOURCES; }

// y = (offset + w) · x / √(mean(x²) + ε); inverse [rows], or NULL, keeps the quotient of each row for
// backward.
EXPORT void rms_norm(const float *x, const float *w, float *y, float *inverse, int64_t rows, int64_t n, float epsilon,
                     float offset) {
#pragma omp parallel for schedule(static) if (rows * n > FEW)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * n;
        float *to = y + row * n;
        const float quotient = (float)(1.0 / sqrt(dot(from, from, n) / n + epsilon));
        if (inverse) inverse[row] = quotient;
        for (int64_t i = 0; i < n; i += LANES)
            store(to + i, load(from + i, n - i) * quotient * (load(w + i, n - i) + offset), n - i);
    }
}

// dx = (g - x̂ · mean(g · x̂)) · inverse with g = dy · (offset + w) and x̂ = x · inverse.
EXPORT void rms_norm_slope(const float *x, const float *w, const float *inverse, const float *dy, float *dx,
                           int64_t rows, int64_t n, float offset) {
#pragma omp parallel for schedule(static) if (rows * n > FEW)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * n, *above = dy + row * n;
        float *to = dx + row * n;
        for (int64_t i = 0; i < n; i += LANES)
            store(to + i, load(above + i, n - i) * (load(w + i, n - i) + offset), n - i);
        const float quotient = inverse[row];
        const float along = (float)(dot(to, from, n) * quotient / n);
        for (int64_t i = 0; i < n; i += LANES)
            store(to + i, (load(to + i, n - i) - load(from + i, n - i) * quotient * along) * quotient, n - i);
    }
}

// dw = Σ over rows of dy · x̂; 64 columns at a time, 16 rows in float32 and the rest in double.
EXPORT void rms_norm_weight_slope(const float *x, const float *inverse, const float *dy, float *dw, int64_t rows,
                                  int64_t n) {
#pragma omp parallel for schedule(static) if (rows * n > FEW)
    for (int64_t column = 0; column < n; column += 64) {
        const int64_t width = n - column < 64 ? n - column : 64;
        double total[64] = {};
        for (int64_t start = 0; start < rows; start += 16) {
            float part[64] = {};
            for (int64_t row = start; row < rows && row < start + 16; row++) {
                const float *a = x + row * n + column, *b = dy + row * n + column;
                for (int64_t i = 0; i < width; i++) part[i] += b[i] * (a[i] * inverse[row]);
            }
            for (int64_t i = 0; i < width; i++) total[i] += part[i];
        }
        for (int64_t i = 0; i < width; i++) dw[column + i] = (float)total[i];
    }
}

// The first `size` dimensions of each head turn, the others stay. Of each token `cosines` and `sines` have `size`
// values, those of the first of two partners negative; there are `places` tokens of them, after which they begin again.
// sign -1 turns back.
EXPORT void rotate(const float *x, const float *cosines, const float *sines, float *y, int64_t tokens, int64_t places,
                   int64_t heads, int64_t width, int64_t size, int64_t interleaved, float sign) {
    const int64_t half = size / 2;
#pragma omp parallel for schedule(static) if (tokens * heads * width > FEW)
    for (int64_t token = 0; token < tokens; token++) {
        const float *c = cosines + token % places * size, *s = sines + token % places * size;
        for (int64_t head = 0; head < heads; head++) {
            const float *__restrict__ from = x + (token * heads + head) * width;
            float *__restrict__ to = y + (token * heads + head) * width;
            if (interleaved) {
                for (int64_t i = 0; i < size; i += 2) {
                    to[i] = from[i] * c[i] + from[i + 1] * (s[i] * sign);
                    to[i + 1] = from[i + 1] * c[i + 1] + from[i] * (s[i + 1] * sign);
                }
            } else {
                for (int64_t i = 0; i < half; i += LANES) {
                    const int64_t left = half - i;
                    const vec first = load(from + i, left), second = load(from + half + i, left);
                    store(to + i, first * load(c + i, left) + second * (load(s + i, left) * sign), left);
                    store(to + half + i,
                          second * load(c + half + i, left) + first * (load(s + half + i, left) * sign), left);
                }
            }
            for (int64_t i = size; i < width; i++) to[i] = from[i];
        }
    }
}

// An activation of x and its derivative: x · σ(x), or GELU by its tanh form, 0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 x³))).
template <bool silu> INLINE void activation(vec x, vec &y, vec &slope) {
    if (silu) {
        const vec share = 1.0f / (1.0f + exponential(-x));
        y = x * share;
        slope = share + y * (1.0f - share);
    } else {
        const float root = 0.7978845608028654f;
        const vec bent = tangent(root * (x + 0.044715f * x * x * x));
        y = 0.5f * x * (1.0f + bent);
        slope = 0.5f * (1.0f + bent) + 0.5f * x * (1.0f - bent * bent) * (root * (1.0f + 0.134145f * x * x));
    }
}

template <bool silu> static void gated_of(const float *gate, const float *up, float *y, int64_t n) {
#pragma omp parallel for schedule(static) if (n > FEW)
    for (int64_t i = 0; i < n; i += LANES) {
        vec active, slope;
        activation<silu>(load(gate + i, n - i), active, slope);
        store(y + i, active * load(up + i, n - i), n - i);
    }
}

template <bool silu>
static void gated_slope_of(const float *gate, const float *up, const float *dy, float *dgate, float *dup, int64_t n) {
#pragma omp parallel for schedule(static) if (n > FEW)
    for (int64_t i = 0; i < n; i += LANES) {
        vec active, slope;
        activation<silu>(load(gate + i, n - i), active, slope);
        const vec above = load(dy + i, n - i);
        store(dgate + i, above * load(up + i, n - i) * slope, n - i);
        store(dup + i, above * active, n - i);
    }
}

// y = activation(gate) · up.
EXPORT void gated(const float *gate, const float *up, float *y, int64_t n, int64_t silu) {
    if (silu) gated_of<true>(gate, up, y, n);
    else gated_of<false>(gate, up, y, n);
}
EXPORT void gated_slope(const float *gate, const float *up, const float *dy, float *dgate, float *dup, int64_t n,
                        int64_t silu) {
    if (silu) gated_slope_of<true>(gate, up, dy, dgate, dup, n);
    else gated_slope_of<false>(gate, up, dy, dgate, dup, n);
}

// -log softmax(x)[label] of each row, and softmax(x) in the place of x.
EXPORT void cross_entropy(float *x, const int64_t *labels, double *losses, int64_t rows, int64_t n) {
#pragma omp parallel for schedule(monotonic : dynamic)
    for (int64_t row = 0; row < rows; row++) {
        float *values = x + row * n;
        vec above = all(-INFINITY);
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) above = greater(load(values + i), above);
        float top = most(above);
        for (; i < n; i++) top = values[i] > top ? values[i] : top;
        const double chosen = values[labels[row]];
        double total = 0;
        for (int64_t start = 0; start < n; start += RUN) {
            const int64_t stop = start + RUN < n ? start + RUN : n;
            vec part = {};
            for (i = start; i < stop; i += LANES) {
                store(values + i, exponential(load(values + i, stop - i) - top), stop - i);
                part += load(values + i, stop - i);  // of a vector that is not whole the rest is 0
            }
            total += sum(part);
        }
        losses[row] = log(total) + top - chosen;
        const float share = (float)(1.0 / total);
        for (i = 0; i < n; i += LANES) store(values + i, load(values + i, n - i) * share, n - i);
    }
}

// Of 16 values, those at the places `at`.
INLINE vec of_sixteen(const float *values, ivec at) {
#if LANES == 4
    const vec low = chosen(load(values), load(values + 4), at & 7), high = chosen(load(values + 8), load(values + 12), at & 7);
    return at > 7 ? high : low;
#else
    return chosen(load(values), load(values + 16 - LANES), at);
#endif
}

// y = values[code] · scale: codes of 4 bits, two a byte, the first in its high half; a scale for each block of `size`
// values, which are whole pairs of vectors.
EXPORT void four_bits(const uint8_t *codes, const float *values, const float *scales, float *y, int64_t blocks,
                      int64_t size) {
    typedef uint8_t bytes __attribute__((vector_size(LANES)));
    ivec front, back;  // where the values of two vectors lie when they take turns
    for (int lane = 0; lane < LANES; lane++) {
        front[lane] = lane / 2 + lane % 2 * LANES;
        back[lane] = front[lane] + LANES / 2;
    }
#pragma omp parallel for schedule(static) if (blocks * size > FEW)
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t i = block * size; i < (block + 1) * size; i += 2 * LANES) {
            bytes pairs;
            memcpy(&pairs, codes + i / 2, LANES);
            const ivec pair = __builtin_convertvector(pairs, ivec);
            const vec first = of_sixteen(values, pair >> 4) * scales[block];
            const vec second = of_sixteen(values, pair & 15) * scales[block];
            store(y + i, chosen(first, second, front));
            store(y + i + LANES, chosen(first, second, back));
        }
}

// Every row of y is x.
EXPORT void repeated(const float *x, float *y, int64_t rows, int64_t n) {
#pragma omp parallel for schedule(static) if (rows * n > FEW)
    for (int64_t row = 0; row < rows; row++) memcpy(y + row * n, x, n * sizeof(float));
}
