// Attention of chunks of prompts on tensor cores (mma.sync), for caches of 16-bit floats, and of 8 bits, whose tiles are widened to
// bf16 on their way to shared memory.
//
// A block of four warps takes 64 queries of one head, 16 a warp, and goes along the keys in tiles of 64 at absolute
// positions, with the softmax kept as it goes (see attention_simt.cu). Scores are q·K with K as pages have it,
// [element][key], and outputs are p·V with V [key][element]: both are the second operand with its rows along the sum, which
// ldmatrix turns over on its way into registers. Weights are rounded to the cache's type for the second product; sums stay
// f32. A tile that a row sees nothing of leaves the row as it is, to the bit: rows do not depend on their tile of queries.
//
// Scales of keys are applied to scores, those of values to weights: bf16 holds 8-bit elements exactly, and only queries and
// weights are rounded.
#include "attention_tile.cuh"

using namespace attention;

// Rows in shared memory are 16 bytes longer, so that eight of them lie in different banks.
constexpr unsigned PAD = 8;

RIDGE_INLINE void multiply(F16, float* sum, const unsigned (&a)[4], const unsigned (&b)[2]) {
    mma_m16n8k16_f16(*reinterpret_cast<float(*)[4]>(sum), a, b);
}
RIDGE_INLINE void multiply(BF16, float* sum, const unsigned (&a)[4], const unsigned (&b)[2]) {
    mma_m16n8k16_bf16(*reinterpret_cast<float(*)[4]>(sum), a, b);
}

// sums += a · b, 16 columns of b; `b` is this lane's row of them (of lane l's matrix: row l % 16, column l / 16 * 8).
template <class Element>
RIDGE_INLINE void multiply_16(float* sums, const unsigned (&a)[4], const unsigned short* b) {
    unsigned fragments[4];
    ldmatrix_x4_trans(fragments, b);
    const unsigned left[2] = {fragments[0], fragments[1]}, right[2] = {fragments[2], fragments[3]};
    multiply(Element(), sums, a, left);
    multiply(Element(), sums + 4, a, right);
}

// The keys and values of one tile in shared memory.
template <int DIM>
struct Tile {
    unsigned short keys[DIM][TILE + PAD];
    unsigned short values[TILE][DIM + PAD];
};

// The scales of one tile, behind the tiles, where keys and values have any.
struct Scales {
    float keys[TILE], values[TILE];
};

// work[x] = {item, first row of the tile}; grid.y is the query head.
template <class C, int DIM, int STAGES>
__device__ void prefill(const Item* items, const uint2* work, const unsigned* tables, const unsigned char* pages,
                        unsigned long long block_stride, unsigned kv_heads, unsigned group, unsigned block_size,
                        float scale, const typename Query<C>::Type::Stored* q, unsigned out_type, void* out) {
    RIDGE_DYNAMIC_SHARED(unsigned char, shared);
    Tile<DIM>* const tiles = reinterpret_cast<Tile<DIM>*>(shared);
    Scales* const scales = reinterpret_cast<Scales*>(tiles + STAGES);
    using Element = typename Compute<C>::Type;
    constexpr bool WIDENED = sizeof(typename C::Stored) == 1;
    static_assert(!WIDENED || STAGES == 1, "widening waits for what it reads");
    // Queries of large heads do not fit into registers beside the outputs, and are read again for each tile.
    constexpr bool KEEP = DIM <= 128;

    const uint2 task = work[blockIdx.x];
    if (task.x == NO_ITEM) return;
    const Item item = items[task.x];
    const Queries queries(item, task.y);
    const unsigned head = blockIdx.y, heads = kv_heads * group;
    const Cache<C> cache(pages, block_stride, kv_heads, DIM, block_size, head / group);
    const unsigned* const table = tables + item.table;
    const unsigned long long stride = static_cast<unsigned long long>(heads) * DIM;
    const unsigned long long place = (item.first_row + task.y) * stride + head * DIM;
    q += place;
    unsigned kept[KEEP ? DIM / 16 : 1][4];
    if constexpr (KEEP)
#pragma unroll
        for (unsigned step = 0; step < DIM / 16; ++step) queries.load(kept[step], q, stride, step * 16);

    const auto begin_copies = [&](Tile<DIM>& tile, unsigned begin) {
        const auto key_at = [&](unsigned d, unsigned column) { return &tile.keys[d][column]; };
        const auto value_at = [&](unsigned row, unsigned column) { return &tile.values[row][column]; };
        if constexpr (WIDENED)
            fetch_widened<DIM>(cache, table, begin, queries.first(), queries.end(), key_at, value_at, scales->keys, scales->values);
        else
            fetch<DIM>(cache, table, begin, queries.first(), queries.end(), key_at, value_at);
    };
    const unsigned matrix_row = threadIdx.x % 16, matrix_column = threadIdx.x % 32 / 16 * 8;
    const float factor = scale * 1.44269504f;
    Softmax softmax;
    float output[DIM / 2] = {};
    unsigned stage = 0;
    const unsigned from = queries.first() / TILE * TILE;
    if (STAGES == 2) {
        begin_copies(tiles[0], from);
        cp_async_commit();
    }
    for (unsigned begin = from; begin < queries.end(); begin += TILE) {
        if (STAGES == 1) begin_copies(tiles[0], begin);
        else if (begin + TILE < queries.end()) begin_copies(tiles[stage ^ 1], begin + TILE);
        cp_async_commit();
        cp_async_wait<STAGES - 1>();
        __syncthreads();
        const Tile<DIM>& tile = tiles[stage];

        float scores[TILE / 2] = {};
#pragma unroll
        for (unsigned step = 0; step < DIM / 16; ++step) {
            unsigned a[4];
            if constexpr (!KEEP) queries.load(a, q, stride, step * 16);
#pragma unroll
            for (unsigned i = 0; KEEP && i < 4; ++i) a[i] = kept[KEEP ? step : 0][i];
#pragma unroll
            for (unsigned block = 0; block < TILE / 8; block += 2)
                multiply_16<Element>(&scores[block * 4], a, &tile.keys[step * 16 + matrix_row][block * 8 + matrix_column]);
        }
        if constexpr (C::SCALED)
#pragma unroll
            for (unsigned i = 0; i < TILE / 2; ++i) scores[i] *= scales->keys[i / 4 * 8 + queries.pair + i % 2];
        unsigned weights[TILE / 8][2];
        softmax.take<Element>(queries, begin, factor, scores, output, weights, [&](unsigned column) {
            if constexpr (C::SCALED) return scales->values[column];
            else return 1.0f;
        });
#pragma unroll
        for (unsigned step = 0; step < TILE / 16; ++step) {
            const unsigned a[4] = {weights[2 * step][0], weights[2 * step][1], weights[2 * step + 1][0],
                                   weights[2 * step + 1][1]};
#pragma unroll
            for (unsigned block = 0; block < DIM / 8; block += 2)
                multiply_16<Element>(&output[block * 4], a,
                                     &tile.values[step * 16 + matrix_row][block * 8 + matrix_column]);
        }
        // The stage is read before it is filled anew.
        __syncthreads();
        stage ^= STAGES - 1;
    }
    softmax.finish(queries, output, place, stride, out_type, out);
}

#define RIDGE_PREFILL(name, C, dim, stages)                                                                           \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS) attention_prefill_##name##_##dim##_##stages(           \
        const Item* items, const uint2* work, const unsigned* tables, const unsigned char* pages,                     \
        unsigned long long block_stride, unsigned kv_heads, unsigned group, unsigned head_dim, unsigned block_size,   \
        float scale, const Query<C>::Type::Stored* q, unsigned out_type, void* out) {                                 \
        prefill<C, dim, stages>(items, work, tables, pages, block_stride, kv_heads, group, block_size, scale, q,      \
                                out_type, out);                                                                       \
    }
#define RIDGE_PREFILLS(dim)                                                                                           \
    RIDGE_PREFILL(f16, KvF16, dim, 1)                                                                                 \
    RIDGE_PREFILL(f16, KvF16, dim, 2)                                                                                 \
    RIDGE_PREFILL(bf16, KvBF16, dim, 1)                                                                               \
    RIDGE_PREFILL(bf16, KvBF16, dim, 2)                                                                               \
    RIDGE_PREFILL(fp8, KvFp8, dim, 1)                                                                                 \
    RIDGE_PREFILL(int8, KvInt8, dim, 1)
RIDGE_PREFILLS(64)
RIDGE_PREFILLS(80)
RIDGE_PREFILLS(96)
RIDGE_PREFILLS(128)
RIDGE_PREFILLS(256)
