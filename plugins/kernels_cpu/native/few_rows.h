// What one token more of an answer costs: products of few rows with a matrix, and attention of one token. Both read
// each weight, key and value once from memory, and that is nearly all of their time.
#pragma once
#include "attention.h"

extern "C" int omp_get_max_threads(void);  // not every compiler has omp.h beside it

#define DEPTH 8       // rows of a matrix [in, out] at a time
#define ROWS 8        // rows of x at a time, with a matrix [in, out]
#define PANEL 1024    // columns of it at a time, at most
#define DOTS (LANES == 16 ? 4 : 2)  // rows of x, and of a matrix [out, in], at a time

typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef uvec uanywhere __attribute__((aligned(2), may_alias));
typedef float quarter __attribute__((vector_size(16)));

// A matrix held in float32: vectors are vectors.
struct Wide {
    typedef float held;
    enum { PARTS = 1 };  // vectors of float32 that a step along its rows gives
    INLINE void widen(const held *from, vec *to) { to[0] = load(from); }
    INLINE float one(held value) { return value; }
};

// A matrix held in bfloat16, the upper halves of float32: first the values at even places, then those at odd ones.
struct Narrow {
    typedef uint16_t held;
    enum { PARTS = 2 };
    INLINE void widen(const held *from, vec *to) {
        const uvec both = *(const uanywhere *)from;
        to[0] = (vec)(both << 16);
        to[1] = (vec)(both & 0xffff0000u);
    }
    INLINE float one(held value) {
        const uint32_t bits = (uint32_t)value << 16;
        float x;
        memcpy(&x, &bits, sizeof x);
        return x;
    }
};

INLINE float folded(vec x) {
    quarter total = {};
    for (int i = 0; i < LANES / 4; i++) {
        quarter part;
        memcpy(&part, (const char *)&x + 16 * i, sizeof part);
        total += part;
    }
    return (total[0] + total[2]) + (total[1] + total[3]);
}

// R rows of y += x[:, :D] · w[:D, :], over `steps` steps of columns. y's rows are `stride` apart.
template <class W, int R, int D>
static void deep(const float *x, int64_t inner, const typename W::held *w, int64_t columns, float *y, int64_t stride,
                 int64_t steps, bool more) {
    enum { STEP = W::PARTS * LANES };
    for (int64_t s = 0; s < steps; s++) {
        const typename W::held *from = w + s * STEP;
        float *to = y + s * STEP;
        vec total[R][W::PARTS];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int p = 0; p < W::PARTS; p++) total[r][p] = load(to + r * stride + p * LANES);
#pragma GCC unroll 8
        for (int d = 0; d < D; d++) {
            vec right[W::PARTS];
            W::widen(from + d * columns, right);
            if (more) __builtin_prefetch(from + (D + d) * columns);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 2
                for (int p = 0; p < W::PARTS; p++) total[r][p] += x[r * inner + d] * right[p];
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int p = 0; p < W::PARTS; p++) store(to + r * stride + p * LANES, total[r][p]);
    }
}

template <class W, int D>
static void deep_rows(int64_t rows, const float *x, int64_t inner, const typename W::held *w, int64_t columns, float *y,
                      int64_t stride, int64_t steps, bool more) {
    for (; rows >= ROWS; rows -= ROWS, x += ROWS * inner, y += ROWS * stride, more = false)
        deep<W, ROWS, D>(x, inner, w, columns, y, stride, steps, more);
    if (rows >= 4) {
        deep<W, 4, D>(x, inner, w, columns, y, stride, steps, more);
        rows -= 4, x += 4 * inner, y += 4 * stride, more = false;
    }
    if (rows >= 2) {
        deep<W, 2, D>(x, inner, w, columns, y, stride, steps, more);
        rows -= 2, x += 2 * inner, y += 2 * stride, more = false;
    }
    if (rows) deep<W, 1, D>(x, inner, w, columns, y, stride, steps, more);
}

// Columns [first, first + width) of y = x · w + bias, or y += x · w where `onto`; w [inner, columns].
template <class W>
static void panel(const float *x, const typename W::held *w, const float *bias, float *y, int64_t rows, int64_t inner,
                  int64_t columns, int64_t first, int64_t width, bool onto) {
    enum { STEP = W::PARTS * LANES };
    const int64_t steps = width / STEP, rest = width - steps * STEP;  // only the last panel has a rest
    w += first, y += first;
    for (int64_t row = 0; !onto && row < rows; row++) memset(y + row * columns, 0, width * sizeof(float));
    int64_t k = 0;
    for (; k + DEPTH <= inner; k += DEPTH)
        deep_rows<W, DEPTH>(rows, x + k, inner, w + k * columns, columns, y, columns, steps, k + 2 * DEPTH <= inner);
    for (; k < inner; k++)
        deep_rows<W, 1>(rows, x + k, inner, w + k * columns, columns, y, columns, steps, false);
    for (int64_t row = 0; row < rows; row++) {
        float *to = y + row * columns;
        for (int64_t s = 0; W::PARTS == 2 && s < steps; s++, to += STEP) {  // even and odd places lie apart
            float apart[2 * LANES];
            memcpy(apart, to, sizeof apart);
            for (int i = 0; i < LANES; i++) to[2 * i] = apart[i], to[2 * i + 1] = apart[LANES + i];
        }
        to = y + row * columns;
        if (rest) {
            float part[2 * LANES] = {};
            for (k = 0; k < inner; k++)
                for (int64_t i = 0; i < rest; i++)
                    part[i] += x[row * inner + k] * W::one(w[k * columns + steps * STEP + i]);
            for (int64_t i = 0; i < rest; i++) to[steps * STEP + i] += part[i];
        }
        for (int64_t i = 0; bias && i < width; i++) to[i] += bias[first + i];
    }
}

// R · C values of y = x · wᵀ. Of a narrow matrix x lies as its vectors do: even places, then odd ones.
template <class W, int R, int C>
static void dots(const float *x, int64_t xr, const typename W::held *w, int64_t inner, float *y, int64_t columns) {
    enum { STEP = W::PARTS * LANES };
    vec total[R][C] = {};
    const int64_t whole = inner / STEP * STEP;
    // Of short rows those of the next call are the ones that nobody has begun to fetch.
    const int64_t ahead = C * inner * (int64_t)sizeof *w <= 16384 ? C * inner : 2048 / (int64_t)sizeof *w;
    for (int64_t k = 0; k < whole; k += STEP) {
        vec right[C][W::PARTS];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            W::widen(w + c * inner + k, right[c]);
            __builtin_prefetch(w + c * inner + k + ahead);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int p = 0; p < W::PARTS; p++) {
                const vec left = load(x + r * xr + k + p * LANES);
#pragma GCC unroll 4
                for (int c = 0; c < C; c++) total[r][c] += left * right[c][p];
            }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) {
            float one = folded(total[r][c]);
            for (int64_t k = whole; k < inner; k++) one += x[r * xr + k] * W::one(w[c * inner + k]);
            y[r * columns + c] = one;
        }
}

template <class W, int C>
static void dots_of(int64_t rows, const float *x, int64_t xr, const typename W::held *w, int64_t inner, float *y,
                    int64_t columns) {
    for (; rows >= DOTS; rows -= DOTS, x += DOTS * xr, y += DOTS * columns)
        dots<W, DOTS, C>(x, xr, w, inner, y, columns);
    for (; rows; rows--, x += xr, y += columns) dots<W, 1, C>(x, xr, w, inner, y, columns);
}

template <class W>
static bool transposed_of(const float *x, const typename W::held *w, const float *bias, float *y, int64_t rows,
                          int64_t inner, int64_t columns, bool many) {
    enum { STEP = W::PARTS * LANES };
    float *apart = NULL;
    if (W::PARTS == 2) {
        apart = (float *)malloc(rows * inner * sizeof(float) + 1);
        if (!apart) return false;
        for (int64_t row = 0; row < rows; row++) {
            const float *from = x + row * inner;
            float *to = apart + row * inner;
            int64_t k = 0;
            for (; k + STEP <= inner; k += STEP)
                for (int i = 0; i < LANES; i++) to[k + i] = from[k + 2 * i], to[k + LANES + i] = from[k + 2 * i + 1];
            for (; k < inner; k++) to[k] = from[k];
        }
        x = apart;
    }
    const int64_t groups = (columns + DOTS - 1) / DOTS;
#pragma omp parallel for schedule(static) if (many)
    for (int64_t group = 0; group < groups; group++) {
        const int64_t c = group * DOTS;
        if (c + DOTS <= columns) dots_of<W, DOTS>(rows, x, inner, w + c * inner, inner, y + c, columns);
        else
            for (int64_t one = c; one < columns; one++)
                dots_of<W, 1>(rows, x, inner, w + one * inner, inner, y + one, columns);
        for (int64_t row = 0; bias && row < rows; row++)
            for (int64_t one = c; one < columns && one < c + DOTS; one++) y[row * columns + one] += bias[one];
    }
    free(apart);
    return true;
}

// y = x · w + bias + low · b; w [inner, columns], low [rows, rank], b [rank, columns].
template <class W>
static void straight_of(const float *x, const typename W::held *w, const float *bias, float *y, int64_t rows,
                        int64_t inner, int64_t columns, const float *low, const float *b, int64_t rank, bool many) {
    enum { STEP = W::PARTS * LANES };
    // Of few rows the sums of a long stretch stay in the first cache.
    const int64_t most = rows > 4 ? PANEL / 2 : PANEL, threads = many ? omp_get_max_threads() : 1;
    const int64_t shares = threads * ((columns + threads * most - 1) / (threads * most));
    const int64_t width = ((columns + shares - 1) / shares + STEP - 1) / STEP * STEP;
#pragma omp parallel for schedule(static) if (many)
    for (int64_t share = 0; share < shares; share++) {
        const int64_t first = share * width, left = columns - first, own = left < width ? left : width;
        if (own <= 0) continue;
        panel<W>(x, w, bias, y, rows, inner, columns, first, own, false);
        if (low) panel<Wide>(low, b, NULL, y, rows, rank, columns, first, own, true);
    }
}

// y [rows, columns] = x [rows, inner] · w + bias + scale · (x · a) · b: w [inner, columns], or [columns, inner] where
// `transposed`, held in bfloat16 where `narrow`, else in float32; a [inner, rank] and b [rank, columns], or NULL, and
// not beside `transposed`; bias [columns] or NULL. Sums are float32. Returns 0 where there is no memory for it.
EXPORT int few_rows(const float *x, const void *w, const float *bias, float *y, int64_t rows, int64_t inner,
                    int64_t columns, int64_t narrow, int64_t transposed, const float *a, const float *b, int64_t rank,
                    float scale) {
    const bool many = inner * columns > FEW;
    if (!columns) return 1;
    if (transposed)
        return narrow ? transposed_of<Narrow>(x, (const uint16_t *)w, bias, y, rows, inner, columns, many)
                      : transposed_of<Wide>(x, (const float *)w, bias, y, rows, inner, columns, many);
    float *low = NULL;
    if (a) {
        low = (float *)malloc(rows * rank * sizeof(float) + 1);
        if (!low) return 0;
        straight_of<Wide>(x, a, NULL, low, rows, inner, rank, NULL, NULL, 0, inner * rank > FEW);
        for (int64_t i = 0; i < rows * rank; i++) low[i] *= scale;
    }
    if (narrow) straight_of<Narrow>(x, (const uint16_t *)w, bias, y, rows, inner, columns, low, b, rank, many);
    else straight_of<Wide>(x, (const float *)w, bias, y, rows, inner, columns, low, b, rank, many);
    free(low);
    return 1;
}

// One token more of each row: softmax(q · Kᵀ · scale) · V over the keys from first[row] to the new one, which is put at
// place `seen` beside the kept ones. q, out [rows, heads, size]; key, value [rows, kv_heads, size]; keys, values
// [rows, kv_heads, room, size]. cap 0: none. Returns 0 where there is no memory for the scores.
EXPORT int attention_of_one(const float *q, const float *key, const float *value, float *keys, float *values,
                            const int32_t *first, float *out, int64_t rows, int64_t heads, int64_t kv_heads,
                            int64_t size, int64_t room, int64_t seen, float scale, float cap) {
    const int64_t group = heads / kv_heads, all_keys = seen + 1;
    float *scores = (float *)malloc(rows * heads * all_keys * sizeof(float));
    if (!scores) return 0;
#pragma omp parallel for schedule(static) if (rows * heads * all_keys * size > FEW)
    for (int64_t task = 0; task < rows * kv_heads; task++) {
        float *k = keys + task * room * size, *v = values + task * room * size;
        memcpy(k + seen * size, key + task * size, size * sizeof(float));
        memcpy(v + seen * size, value + task * size, size * sizeof(float));
        const int64_t begin = first[task / kv_heads], count = all_keys - begin;
        for (int64_t g = 0; g < group; g++) {
            const int64_t head = task * group + g;  // rows' heads lie one after the other
            const float *query = q + head * size;
            float *score = scores + head * all_keys, *to = out + head * size;
            float top = -INFINITY;
            for (int64_t j = 0; j < count; j++) {
                const float *one = k + (begin + j) * size;
                vec part = {};
                for (int64_t i = 0; i < size; i += LANES) part += load(query + i, size - i) * load(one + i, size - i);
                float s = folded(part) * scale;
                if (cap != 0) s = tanhf(s / cap) * cap;
                score[j] = s;
                top = s > top ? s : top;
            }
            vec total = {};
            for (int64_t j = 0; j < count; j += LANES) {
                vec share = exponential(load(score + j, count - j) - top);
                store(score + j, share, count - j);
                total += load(score + j, count - j);
            }
            const float whole = 1.0f / folded(total);
            for (int64_t i = 0; i < size; i += LANES) {
                vec part = {};
                for (int64_t j = 0; j < count; j++) part += score[j] * load(v + (begin + j) * size + i, size - i);
                store(to + i, part * whole, size - i);
            }
        }
    }
    free(scores);
    return 1;
}
