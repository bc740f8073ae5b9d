// Attention of chunks of prompts on Hopper's warpgroup instructions, for caches of 16-bit floats. Experimental: off by default
// until a device has run it.
// Architectures: sm_90a
//
//   a block takes 128 queries of one head and goes along the keys in tiles of 64 at absolute positions
//       warpgroups 0, 1   64 queries each: both products, the softmax kept as it goes
//       one more warp     one thread: TMA brings pieces of pages, 16 keys and their values each, into the next free stage
//       a stage's `full` barrier counts its bytes; `empty` counts the warps that have read it
//
// Queries and weights are the first operand of products, in registers; keys [element][key] and values [key][element] the
// second, in shared memory as TMA lays them down, swizzled. Neither is ever turned over or loaded into registers. One
// warpgroup's softmax runs beside the other's products.
//
// A tile's pieces outside the keys that the block sees are copies of its nearest piece. What lies in a page beyond those keys
// may be anything: its scores are masked, and its values are cleared where they lie before they are multiplied by zero.
#include "attention_tile.cuh"
#include "wgmma_turned.cuh"

#ifdef RIDGE_HOPPER

using namespace attention;

constexpr unsigned GROUPS = 2, STAGES = 4, PIECE = 16, THREADS = GROUPS * 128 + 32;

// One tile's keys, a panel per 16 of them, and values, a panel per 64 elements.
template <int DIM>
struct Tile {
    unsigned short keys[TILE / PIECE][DIM * PIECE];
    unsigned short values[DIM / 64][TILE * 64];
};

template <int DIM>
struct Shared {
    Tile<DIM> tiles[STAGES];
    unsigned long long full[STAGES], empty[STAGES];
};

// Brings the tiles of keys from `from` to `end`, as they become free. `first` is the first key that is seen.
template <int DIM>
RIDGE_INLINE void produce(Shared<DIM>& shared, const TensorMap& keys, const TensorMap& values, const unsigned* table,
                          unsigned head, unsigned block_size, unsigned from, unsigned first, unsigned end) {
    unsigned stage = 0, phase = 0;
    for (unsigned begin = from; begin < end; begin += TILE) {
        // The first time round, the phase before the first counts as ended.
        mbarrier_wait(&shared.empty[stage], phase ^ 1);
        mbarrier_arrive_expect(&shared.full[stage], sizeof(Tile<DIM>));
        Tile<DIM>& tile = shared.tiles[stage];
        for (unsigned piece = 0; piece < TILE / PIECE; ++piece) {
            const unsigned key = min(max(begin + piece * PIECE, first / PIECE * PIECE), (end - 1) / PIECE * PIECE);
            const unsigned block = table[key / block_size], slot = key % block_size;
            tma_load(tile.keys[piece], keys, &shared.full[stage], slot, head * DIM, block);
            for (unsigned panel = 0; panel < DIM / 64; ++panel)
                tma_load(tile.values[panel] + piece * PIECE * 64, values, &shared.full[stage], panel * 64,
                         head * block_size + slot, block);
        }
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
}

// work[x] = {item, first row of the tile}; grid.y is the query head.
template <class C, int DIM>
RIDGE_INLINE void prefill(const Item* items, const uint2* work, const unsigned* tables, const TensorMap& keys,
                          const TensorMap& values, unsigned kv_heads, unsigned group, unsigned block_size, float scale,
                          const unsigned short* q, unsigned out_type, void* out) {
    RIDGE_DYNAMIC_SHARED(unsigned char, bytes);
    Shared<DIM>& shared = *reinterpret_cast<Shared<DIM>*>(bytes);
    using Element = typename Query<C>::Type;

    const uint2 task = work[blockIdx.x];
    if (task.x == NO_ITEM) return;
    const Item item = items[task.x];
    const unsigned head = blockIdx.y, heads = kv_heads * group, warpgroup = threadIdx.x / 128;
    // Queries, and warpgroups that have any.
    const unsigned rows = min(GROUPS * QUERIES, item.rows - task.y), groups = (rows + QUERIES - 1) / QUERIES;
    const unsigned first = item.first_key(item.start + task.y), from = first / TILE * TILE, end = item.start + task.y + rows;

    if (threadIdx.x == 0) {
        for (unsigned stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(&shared.full[stage], 1);
            mbarrier_init(&shared.empty[stage], groups * 4);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (warpgroup == GROUPS) {
        if (threadIdx.x % 32 == 0)
            produce<DIM>(shared, keys, values, tables + item.table, head / group, block_size, from, first, end);
        return;
    }
    if (warpgroup >= groups) return;

    const Queries queries(item, task.y + warpgroup * QUERIES);
    const unsigned long long stride = static_cast<unsigned long long>(heads) * DIM;
    const unsigned long long place = (item.first_row + task.y + warpgroup * QUERIES) * stride + head * DIM;
    unsigned kept[DIM / 16][4];
#pragma unroll
    for (unsigned step = 0; step < DIM / 16; ++step) queries.load(kept[step], q + place, stride, step * 16);

    const float factor = scale * 1.44269504f;
    Softmax softmax;
    float output[DIM / 2] = {};
    unsigned stage = 0, phase = 0;
    for (unsigned begin = from; begin < end; begin += TILE) {
        mbarrier_wait(&shared.full[stage], phase);
        Tile<DIM>& tile = shared.tiles[stage];
        if (begin < first || begin + TILE > end) {
            // Nothing may reach a sum from beside the keys that are seen, were it NaN times zero. Both warpgroups write the same.
            for (unsigned i = threadIdx.x % 128; i < TILE * DIM / 8; i += 128) {
                const unsigned row = i / (DIM / 8), chunk = i % (DIM / 8);
                if (begin + row < first || begin + row >= end)
                    *reinterpret_cast<uint4*>(&tile.values[chunk / 8][swizzled(row, chunk % 8)]) = make_uint4(0, 0, 0, 0);
            }
            fence_shared_for_async();
            warpgroup_barrier(1 + warpgroup);
        }
        // Of a tile that none of these queries sees nothing would be left.
        if (begin < queries.end() && begin + TILE > queries.first()) {
            float scores[TILE / 2] = {};
            wgmma_settle(scores);
            wgmma_fence();
#pragma unroll
            for (unsigned step = 0; step < DIM / 16; ++step)
                wgmma_m64k16(Element(), scores, kept[step],
                             wgmma_turned_operand<PIECE>(tile.keys[0] + step * 16 * PIECE, sizeof(tile.keys[0])), step > 0);
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_settle(scores);

            unsigned weights[TILE / 8][2];
            softmax.take<Element>(queries, begin, factor, scores, output, weights, [](unsigned) { return 1.0f; });
            unsigned a[TILE / 16][4];
#pragma unroll
            for (unsigned i = 0; i < TILE / 4; ++i) a[i / 4][i % 4] = weights[i / 4 * 2 + i % 4 / 2][i % 2];
            wgmma_settle(output);
            wgmma_fence();
#pragma unroll
            for (unsigned step = 0; step < TILE / 16; ++step)
                wgmma_m64k16(Element(), output, a[step],
                             wgmma_turned_operand<64>(tile.values[0] + step * 16 * 64, sizeof(tile.values[0])), true);
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_settle(output);
        }
        if (threadIdx.x % 32 == 0) mbarrier_arrive(&shared.empty[stage]);
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    softmax.finish(queries, output, place, stride, out_type, out);
}

#define RIDGE_PREFILL(name, C, dim)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_wgmma_##name##_##dim(                          \
        const Item* items, const uint2* work, const unsigned* tables, const __grid_constant__ TensorMap keys,         \
        const __grid_constant__ TensorMap values, unsigned kv_heads, unsigned group, unsigned head_dim,               \
        unsigned block_size, float scale, const unsigned short* q, unsigned out_type, void* out) {                    \
        prefill<C, dim>(items, work, tables, keys, values, kv_heads, group, block_size, scale, q, out_type, out);     \
    }
RIDGE_PREFILL(f16, KvF16, 64)
RIDGE_PREFILL(f16, KvF16, 128)
RIDGE_PREFILL(bf16, KvBF16, 64)
RIDGE_PREFILL(bf16, KvBF16, 128)

#endif
