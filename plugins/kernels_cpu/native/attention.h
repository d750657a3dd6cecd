// Attention within documents, exact and without an [S, S] tensor. Query i sees the keys j with j ≤ i < ends[j]; `ends`
// never falls from one key to the next, so the keys that a query sees follow each other.
//
// Scores are computed transposed, [keys, queries]: vectors run along the queries, so that softmax needs no sum across a
// vector, and neither keys nor values are copied. Queries come in blocks that end where a document ends.
#pragma once
#include "pieces.h"

#define QUERIES 64  // in a block, at most
#define KEYS 128    // at a time
#define TILE_ROWS (LANES == 16 ? 8 : 6)

// A block of queries of one row of the batch, the first key that any of them sees, and whether a document begins here.
typedef struct {
    int32_t batch, start, stop, first_key, begins;
} Block;

typedef struct {
    int64_t length, heads, kv_heads, size;  // S, H, K, D
    float scale, cap;                       // cap 0: none
} Shape;

// c [R rows, V vectors] (+)= a · b; a's values are `ar` apart from row to row and `ak` along the sum.
template <int R, int V>
static void tile(int64_t depth, const float *a, int64_t ar, int64_t ak, const float *b, int64_t bk, float *c,
                 int64_t cr, bool add) {
    vec total[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) total[r][v] = add ? load(c + r * cr + v * LANES) : all(0);
    for (int64_t k = 0; k < depth; k++, a += ak, b += bk) {
        vec right[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) right[v] = load(b + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) total[r][v] += a[r * ar] * right[v];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) store(c + r * cr + v * LANES, total[r][v]);
}

// From where to where a tile of rows needs the sum of a product: all of it.
struct All {
    int64_t depth;
    int64_t from(int64_t) const { return 0; }
    int64_t to(int64_t, int64_t) const { return depth; }
};

template <int V, class Along>
static void tiles(int64_t rows, Along along, const float *a, int64_t ar, int64_t ak, const float *b, int64_t bk,
                  float *c, int64_t cr, bool add) {
    for (int64_t row = 0, many; row < rows; row += many) {
        many = rows - row < TILE_ROWS ? rows - row : TILE_ROWS;
        const int64_t from = along.from(row), depth = along.to(row, many) - from;
        const float *left = a + row * ar + from * ak, *right = b + from * bk;
        float *to = c + row * cr;
        switch (many) {
        case 8: tile<8, V>(depth, left, ar, ak, right, bk, to, cr, add); break;
        case 7: tile<7, V>(depth, left, ar, ak, right, bk, to, cr, add); break;
        case 6: tile<6, V>(depth, left, ar, ak, right, bk, to, cr, add); break;
        case 5: tile<5, V>(depth, left, ar, ak, right, bk, to, cr, add); break;
        case 4: tile<4, V>(depth, left, ar, ak, right, bk, to, cr, add); break;
        case 3: tile<3, V>(depth, left, ar, ak, right, bk, to, cr, add); break;
        case 2: tile<2, V>(depth, left, ar, ak, right, bk, to, cr, add); break;
        case 1: tile<1, V>(depth, left, ar, ak, right, bk, to, cr, add); break;
        }
    }
}

// c [rows, columns] (+)= a [rows, depth] · b [depth, columns], of the depth what `along` says of each tile of rows;
// columns are whole vectors.
template <class Along>
static void product(int64_t rows, int64_t columns, Along along, const float *a, int64_t ar, int64_t ak, const float *b,
                    int64_t bk, float *c, int64_t cr, bool add) {
    int64_t column = 0;
    for (; column + 2 * LANES <= columns; column += 2 * LANES)
        tiles<2>(rows, along, a, ar, ak, b + column, bk, c + column, cr, add);
    if (column < columns) tiles<1>(rows, along, a, ar, ak, b + column, bk, c + column, cr, add);
}

// Keys of which a block computes scores at a time: `count` from `start` on. The block's first query is key `ahead`.
struct Chunk {
    int64_t start, count, ahead;
    // How many of these keys the block's queries before `query` can see.
    int64_t seen(int64_t query) const {
        const int64_t keys = ahead + query;
        return keys < 0 ? 0 : keys < count ? keys : count;
    }
    // The first query that can see `key`, and the vector in which it is: vectors before that are not computed.
    int64_t since(int64_t key) const { return key < ahead ? 0 : key - ahead; }
    int64_t vector(int64_t key) const { return since(key) / LANES * LANES; }
};

static Chunk chunk_of(const Block &block, int64_t start) {
    return {start, block.stop - start < KEYS ? block.stop - start : KEYS, block.start - start};
}

// Of sums along keys, what a tile of queries needs; of sums along queries, what a tile of keys needs.
struct Seen {
    const Chunk &chunk;
    int64_t from(int64_t) const { return 0; }
    int64_t to(int64_t row, int64_t many) const { return chunk.seen(row + many); }
};
struct Seeing {
    const Chunk &chunk;
    int64_t queries;
    int64_t from(int64_t row) const { return chunk.since(row); }
    int64_t to(int64_t, int64_t) const { return queries; }
};

// c [keys, QUERIES] = a [keys, depth] · b [depth, QUERIES], where a vector of queries can see the key.
static void products(const Chunk &chunk, int64_t whole, int64_t depth, const float *a, int64_t ar, const float *b,
                     float *c) {
    for (int64_t column = 0; column < whole; column += 2 * LANES) {
        const int64_t width = whole - column < 2 * LANES ? LANES : 2 * LANES;
        product(chunk.seen(column + width), width, All{depth}, a, ar, 1, b + column, QUERIES, c + column, QUERIES,
                false);
    }
}

// x [count, D], `stride` apart, times scale → [D, QUERIES]; whole vectors of queries, the missing ones 0.
static void transposed(const float *x, int64_t stride, int64_t count, int64_t size, float scale, float *to) {
    for (int64_t i = 0; i < count; i += LANES)
        for (int64_t d = 0; d < size; d += LANES) {
            vec rows[LANES];
#pragma GCC unroll 16
            for (int64_t row = 0; row < LANES; row++)
                rows[row] = i + row < count ? load(x + (i + row) * stride + d) * scale : all(0);
            transpose(rows);
#pragma GCC unroll 16
            for (int64_t row = 0; row < LANES; row++) store(to + (d + row) * QUERIES + i, rows[row]);
        }
}

// Scores [keys, QUERIES] of a chunk; -∞ where a query does not see the key.
static void scores_of(const Shape &shape, const Block &block, const Chunk &chunk, const int32_t *ends,
                      const float *key, const float *turned, float *scores) {
    const int64_t stride = shape.kv_heads * shape.size, queries = block.stop - block.start;
    const int64_t whole = (queries + LANES - 1) / LANES * LANES;
    products(chunk, whole, shape.size, key + chunk.start * stride, stride, turned, scores);
    for (int64_t k = 0; k < chunk.count; k++) {
        float *row = scores + k * QUERIES;
        const int64_t begin = chunk.vector(k), from = chunk.since(k);
        if (shape.cap)
            for (int64_t i = begin; i < whole; i += LANES)
                store(row + i, tangent(load(row + i) / shape.cap) * shape.cap);
        const int64_t to = (int64_t)ends[chunk.start + k] - block.start;
        for (int64_t i = begin; i < from; i++) row[i] = -INFINITY;
        for (int64_t i = to < begin ? begin : to; i < whole; i++) row[i] = -INFINITY;
    }
}

static void attend_block(const Shape &shape, const Block &block, const int32_t *ends, const float *query,
                         const float *key, const float *value, float *out, float *sizes, float *memory) {
    const int64_t size = shape.size, queries = block.stop - block.start;
    const int64_t whole = (queries + LANES - 1) / LANES * LANES;
    const int64_t across = shape.heads * size, stride = shape.kv_heads * size;
    float *turned = memory, *scores = turned + size * QUERIES, *sums = scores + KEYS * QUERIES;
    float top[QUERIES], shrink[QUERIES];
    double total[QUERIES] = {};
    transposed(query + block.start * across, across, queries, size, shape.scale, turned);
    for (int64_t i = 0; i < QUERIES; i++) top[i] = -INFINITY;
    for (int64_t start = block.first_key; start < block.stop; start += KEYS) {
        const Chunk chunk = chunk_of(block, start);
        scores_of(shape, block, chunk, ends, key, turned, scores);
        for (int64_t i = 0; i < whole; i += LANES) {
            const int64_t seen = chunk.seen(i + LANES);
            vec above = load(top + i), part = {};
            for (int64_t k = 0; k < seen; k++) above = greater(load(scores + k * QUERIES + i), above);
            const vec base = above == -INFINITY ? all(0) : above;  // a query that has seen no key yet
            const vec less = exponential(load(top + i) - base);
            for (int64_t k = 0; k < seen; k++) {
                const vec power = exponential(load(scores + k * QUERIES + i) - base);
                store(scores + k * QUERIES + i, power);
                part += power;
            }
            for (int64_t k = seen; k < chunk.count; k++) store(scores + k * QUERIES + i, all(0));
            store(top + i, above);
            store(shrink + i, less);
            for (int64_t lane = 0; lane < LANES; lane++) total[i + lane] = total[i + lane] * less[lane] + part[lane];
        }
        const bool first = start == block.first_key;
        if (!first)
            for (int64_t i = 0; i < queries; i++)
                for (int64_t d = 0; d < size; d += LANES)
                    store(sums + i * size + d, load(sums + i * size + d) * shrink[i]);
        product(queries, size, Seen{chunk}, scores, 1, QUERIES, value + start * stride, stride, sums, size, !first);
    }
    for (int64_t i = 0; i < queries; i++) {
        const float share = total[i] == 0 ? 0 : (float)(1.0 / total[i]);
        for (int64_t d = 0; d < size; d += LANES)
            store(out + (block.start + i) * across + d, load(sums + i * size + d) * share);
        sizes[block.start + i] = total[i] == 0 ? 0 : top[i];
        sizes[shape.length + block.start + i] = share;
    }
}

// softmax(cap(Q Kᵀ · scale)) V for query, out [B, S, H, D], key, value [B, S, K, D]; ends [B, S];
// sizes [B, H, 2, S] gets of each query the greatest score m, and 1 / Σ exp(score - m). (Their logarithm in one number
// would round all weights of a query in one direction, and the gradients of keys are what is left of that.) False: no
// memory.
EXPORT int attention(const float *query, const float *key, const float *value, const int32_t *ends,
                     const Block *blocks, int64_t count, int64_t length, int64_t heads, int64_t kv_heads, int64_t size,
                     float scale, float cap, float *out, float *sizes) {
    const Shape shape = {length, heads, kv_heads, size, scale, cap};
    int done = 1;
#pragma omp parallel if (count > 1)
    {
        float *memory = (float *)aligned_alloc(64, (KEYS + 2 * size) * QUERIES * sizeof(float));
        if (!memory) {
#pragma omp atomic write
            done = 0;
        }
#pragma omp for schedule(monotonic : dynamic)
        for (int64_t task = 0; task < count * heads; task++) {
            if (!memory) continue;
            const Block &block = blocks[count - 1 - task / heads];  // late blocks see most keys: they come first
            const int64_t head = task % heads, group = head / (heads / kv_heads);
            const int64_t token = block.batch * length;
            const float *k = key + (token * kv_heads + group) * size, *v = value + (token * kv_heads + group) * size;
            attend_block(shape, block, ends + token, query + (token * heads + head) * size, k, v,
                         out + (token * heads + head) * size, sizes + (block.batch * heads + head) * 2 * length,
                         memory);
        }
        free(memory);
    }
    return done;
}

// What one block of queries adds to the gradients of its keys and values, and the gradient of its queries.
static void attend_block_back(const Shape &shape, const Block &block, const int32_t *ends, const float *query,
                              const float *key, const float *value, const float *out, const float *above,
                              const float *sizes, float *dquery, float *dkey, float *dvalue, float *memory) {
    const int64_t size = shape.size, queries = block.stop - block.start;
    const int64_t whole = (queries + LANES - 1) / LANES * LANES;
    const int64_t across = shape.heads * size, stride = shape.kv_heads * size;
    float *turned = memory, *above_turned = turned + size * QUERIES, *sums = above_turned + size * QUERIES;
    float *weights = sums + size * QUERIES, *slopes = weights + KEYS * QUERIES;
    float along[QUERIES] = {}, top[QUERIES] = {}, share[QUERIES] = {};  // of the missing queries: no weight
    query += block.start * across, out += block.start * across, above += block.start * across;
    transposed(query, across, queries, size, shape.scale, turned);
    transposed(above, across, queries, size, 1.0f, above_turned);
    for (int64_t i = 0; i < queries; i++) {
        along[i] = (float)dot(above + i * across, out + i * across, size);
        top[i] = sizes[block.start + i];
        share[i] = sizes[shape.length + block.start + i];
    }
    for (int64_t start = block.first_key; start < block.stop; start += KEYS) {
        const Chunk chunk = chunk_of(block, start);
        scores_of(shape, block, chunk, ends, key, turned, weights);
        products(chunk, whole, size, value + start * stride, stride, above_turned, slopes);
        for (int64_t k = 0; k < chunk.count; k++) {
            memset(slopes + k * QUERIES, 0, chunk.vector(k) * sizeof(float));
            memset(weights + k * QUERIES, 0, chunk.vector(k) * sizeof(float));
            for (int64_t i = chunk.vector(k); i < whole; i += LANES) {
                float *weight = weights + k * QUERIES + i, *slope = slopes + k * QUERIES + i;
                const vec score = load(weight), power = exponential(score - load(top + i)) * load(share + i);
                vec down = power * (load(slope) - load(along + i)) * shape.scale;
                if (shape.cap) {
                    const vec bend = score / shape.cap;
                    down = score == -INFINITY ? all(0) : down * (1.0f - bend * bend);
                }
                store(weight, power);
                store(slope, down);
            }
        }
        const Seeing seeing = {chunk, queries};
        product(chunk.count, size, seeing, weights, QUERIES, 1, above, across, dvalue + start * across, across, true);
        product(chunk.count, size, seeing, slopes, QUERIES, 1, query, across, dkey + start * across, across, true);
        const bool first = start == block.first_key;
        product(queries, size, Seen{chunk}, slopes, 1, QUERIES, key + start * stride, stride, sums, size, !first);
    }
    for (int64_t i = 0; i < queries; i++)
        memcpy(dquery + (block.start + i) * across, sums + i * size, size * sizeof(float));
}

// Gradients of all three. dkey and dvalue are [B, S, K, D]; each document of each query head is one task, which has its
// keys for itself in `parts`, 2 · [B, S, H, D], and the heads of a group are added afterwards. False: no memory.
EXPORT int attention_slope(const float *query, const float *key, const float *value, const float *out,
                           const float *above, const float *sizes, const int32_t *ends, const Block *blocks,
                           int64_t count, int64_t batch, int64_t length, int64_t heads, int64_t kv_heads, int64_t size,
                           float scale, float cap, float *dquery, float *dkey, float *dvalue, float *parts) {
    const Shape shape = {length, heads, kv_heads, size, scale, cap};
    const int64_t all_keys = batch * length * heads * size;
    float *dkeys = parts, *dvalues = parts + all_keys;
    int done = 1;
#pragma omp parallel
    {
        float *memory = (float *)aligned_alloc(64, (2 * KEYS + 3 * size) * QUERIES * sizeof(float));
        if (!memory) {
#pragma omp atomic write
            done = 0;
        }
#pragma omp for schedule(monotonic : dynamic)
        for (int64_t task = 0; task < count * heads; task++) {
            const Block *block = blocks + task / heads;
            if (!memory || !block->begins) continue;
            const int64_t head = task % heads, group = head / (heads / kv_heads), token = block->batch * length;
            const int64_t mine = (token * heads + head) * size, theirs = (token * kv_heads + group) * size;
            const Block *end = block + 1;
            while (end < blocks + count && !end->begins) end++;
            for (int64_t key_row = block->start; key_row < end[-1].stop; key_row++) {
                memset(dkeys + mine + key_row * heads * size, 0, size * sizeof(float));
                memset(dvalues + mine + key_row * heads * size, 0, size * sizeof(float));
            }
            for (; block < end; block++)
                attend_block_back(shape, *block, ends + token, query + mine, key + theirs, value + theirs, out + mine,
                                  above + mine, sizes + (block->batch * heads + head) * 2 * length, dquery + mine,
                                  dkeys + mine, dvalues + mine, memory);
        }
        free(memory);
        const int64_t group = heads / kv_heads;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < batch * length * kv_heads; row++)
            for (int64_t d = 0; d < size; d += LANES) {
                vec k = {}, v = {};
                for (int64_t one = 0; one < group; one++) {
                    k += load(dkeys + (row * group + one) * size + d);
                    v += load(dvalues + (row * group + one) * size + d);
                }
                store(dkey + row * size + d, k);
                store(dvalue + row * size + d, v);
            }
    }
    return done;
}
