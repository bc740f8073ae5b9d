// Attention of chunks of prompts on Hopper's warpgroup instructions, for caches of 16-bit floats. Experimental: off by default
// until a device has run it.
// Architectures: sm_90a
//
// As attention_prefill.cu, with the products of all four warps in one instruction each: queries and weights are its first
// operand, in registers; keys [element][key] and values [key][element] the second, in shared memory as cp.async lays them
// down, swizzled. Neither is ever turned over or loaded into registers. A multiprocessor holds three such blocks, so that
// one's softmax runs beside another's products.
#include "attention_tile.cuh"
#include "wgmma_turned.cuh"

using namespace attention;

// One tile's keys, a panel, and values, a panel per 64 elements.
template <int DIM>
struct Tile {
    unsigned short keys[DIM * TILE];
    unsigned short values[DIM / 64][TILE * 64];
};

// work[x] = {item, first row of the tile}; grid.y is the query head.
template <class C, int DIM>
__device__ void prefill(const Item* items, const uint2* work, const unsigned* tables, const unsigned char* pages,
                        unsigned long long block_stride, unsigned kv_heads, unsigned group, unsigned block_size,
                        float scale, const unsigned short* q, unsigned out_type, void* out) {
    RIDGE_DYNAMIC_SHARED(unsigned char, shared);
    Tile<DIM>* const tiles = reinterpret_cast<Tile<DIM>*>(shared);
    using Element = typename Query<C>::Type;

    const uint2 task = work[blockIdx.x];
    if (task.x == NO_ITEM) return;
    const Item item = items[task.x];
    const Queries queries(item, task.y);
    const unsigned head = blockIdx.y, heads = kv_heads * group;
    const Cache<C> cache(pages, block_stride, kv_heads, DIM, block_size, head / group);
    const unsigned* const table = tables + item.table;
    const unsigned long long stride = static_cast<unsigned long long>(heads) * DIM;
    const unsigned long long place = (item.first_row + task.y) * stride + head * DIM;
    unsigned kept[DIM / 16][4];
#pragma unroll
    for (unsigned step = 0; step < DIM / 16; ++step) queries.load(kept[step], q + place, stride, step * 16);

    const auto begin_copies = [&](Tile<DIM>& tile, unsigned begin) {
        fetch<DIM>(
            cache, table, begin, queries.first(), queries.end(),
            [&](unsigned d, unsigned column) { return &tile.keys[swizzled(d, column / 8) + column % 8]; },
            [&](unsigned row, unsigned column) { return &tile.values[column / 64][swizzled(row, column % 64 / 8)]; });
        cp_async_commit();
    };
    const float factor = scale * 1.44269504f;
    Softmax softmax;
    float output[DIM / 2] = {};
    unsigned stage = 0;
    const unsigned from = queries.first() / TILE * TILE;
    begin_copies(tiles[0], from);
    for (unsigned begin = from; begin < queries.end(); begin += TILE) {
        if (begin + TILE < queries.end()) {
            begin_copies(tiles[stage ^ 1], begin + TILE);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        fence_shared_for_async();
        __syncthreads();
        const Tile<DIM>& tile = tiles[stage];

        float scores[TILE / 2] = {};
        wgmma_settle(scores);
        wgmma_fence();
#pragma unroll
        for (unsigned step = 0; step < DIM / 16; ++step)
            wgmma_m64k16(Element(), scores, kept[step], wgmma_turned_operand(tile.keys + step * 16 * TILE, 0), step > 0);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_settle(scores);

        unsigned weights[TILE / 8][2];
        softmax.take<Element>(queries, begin, factor, scores, output, weights);
        unsigned a[TILE / 16][4];
#pragma unroll
        for (unsigned i = 0; i < TILE / 4; ++i) a[i / 4][i % 4] = weights[i / 4 * 2 + i % 4 / 2][i % 2];
        wgmma_settle(output);
        wgmma_fence();
#pragma unroll
        for (unsigned step = 0; step < TILE / 16; ++step)
            wgmma_m64k16(Element(), output, a[step], wgmma_turned_operand(tile.values[0] + step * 16 * 64, sizeof(tile.values[0])),
                         true);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_settle(output);
        // The stage is read before it is filled anew.
        __syncthreads();
        stage ^= 1;
    }
    softmax.finish(queries, output, place, stride, out_type, out);
}

#define RIDGE_PREFILL(name, C, dim)                                                                                   \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS, dim == 64 ? 4 : 3) attention_wgmma_##name##_##dim(     \
        const Item* items, const uint2* work, const unsigned* tables, const unsigned char* pages,                     \
        unsigned long long block_stride, unsigned kv_heads, unsigned group, unsigned head_dim, unsigned block_size,   \
        float scale, const unsigned short* q, unsigned out_type, void* out) {                                         \
        prefill<C, dim>(items, work, tables, pages, block_stride, kv_heads, group, block_size, scale, q, out_type,    \
                        out);                                                                                         \
    }
RIDGE_PREFILL(f16, KvF16, 64)
RIDGE_PREFILL(f16, KvF16, 128)
RIDGE_PREFILL(bf16, KvBF16, 64)
RIDGE_PREFILL(bf16, KvBF16, 128)
