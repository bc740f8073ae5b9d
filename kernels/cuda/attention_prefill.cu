// Attention of chunks of prompts on tensor cores (mma.sync), for caches of 16-bit floats.
//
// A block of four warps takes 64 queries of one head, 16 a warp, and goes along the keys in tiles of 64 at absolute
// positions, with the softmax kept as it goes (see attention_simt.cu). Scores are q·K with K as pages have it,
// [element][key], and outputs are p·V with V [key][element]: both are the second operand with its rows along the sum, which
// ldmatrix turns over on its way into registers. Weights are rounded to the cache's type for the second product; sums stay
// f32. A tile that a row sees nothing of leaves the row as it is, to the bit: rows do not depend on their tile of queries.
#include "attention.cuh"
#include "ptx.cuh"

using namespace attention;

constexpr unsigned QUERIES = 64, TILE = 64, THREADS = 128;
// Rows in shared memory are 16 bytes longer, so that eight of them lie in different banks.
constexpr unsigned PAD = 8;

RIDGE_INLINE void multiply(F16, float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    mma_m16n8k16_f16(sum, a, b);
}
RIDGE_INLINE void multiply(BF16, float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    mma_m16n8k16_bf16(sum, a, b);
}

// The keys and values of one tile in shared memory.
template <int DIM>
struct Tile {
    unsigned short keys[DIM][TILE + PAD];
    unsigned short values[TILE][DIM + PAD];
};

// Begins to copy the tile of keys at `begin`; what lies outside first..end becomes 0.
template <class C, int DIM>
RIDGE_INLINE void fetch(Tile<DIM>& tile, const Cache<C>& cache, const unsigned* table, unsigned begin,
                                      unsigned first, unsigned end) {
    const unsigned block_size = cache.block_size;
    if (block_size % 8 == 0) {
        // A thread has eight neighbouring keys, in one page, of every sixteenth element.
        const unsigned column = threadIdx.x % (TILE / 8) * 8, key = begin + column;
        const bool used = key + 8 > first && key < end;
        const unsigned short* const from = used ? cache.key(table[key / block_size], key % block_size) : nullptr;
#pragma unroll
        for (unsigned d = threadIdx.x / (TILE / 8); d < DIM; d += THREADS / (TILE / 8))
            cp_async_16(&tile.keys[d][column], used ? from + d * block_size : cache.key(0, 0), used);
    } else {
        for (unsigned at = threadIdx.x; at < TILE * DIM; at += THREADS) {
            const unsigned j = at % TILE, d = at / TILE, key = begin + j;
            const bool used = key >= first && key < end;
            tile.keys[d][j] = used ? cache.key(table[key / block_size], key % block_size)[d * block_size] : 0;
        }
    }
    // Two threads per value.
    const unsigned row = threadIdx.x / 2, key = begin + row;
    const bool used = key >= first && key < end;
    const unsigned short* const from = used ? cache.value(table[key / block_size], key % block_size) : nullptr;
#pragma unroll
    for (unsigned column = threadIdx.x % 2 * 8; column < DIM; column += 16)
        cp_async_16(&tile.values[row][column], used ? from + column : cache.key(0, 0), used);
}

// A fragment of 16 queries and 16 elements, of rows that exist; the others are 0.
RIDGE_INLINE void load_queries(unsigned (&a)[4], const unsigned short* q, unsigned long long stride,
                                             unsigned row, unsigned rows, unsigned column) {
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned r = row + i % 2 * 8, c = column + i / 2 * 8;
        a[i] = r < rows ? *reinterpret_cast<const unsigned*>(q + r * stride + c) : 0u;
    }
}

template <class C, int DIM, int STAGES>
__device__ void prefill(const Item* items, const uint2* work, const unsigned* tables, const unsigned char* pages,
                        unsigned long long block_stride, unsigned kv_heads, unsigned group, unsigned block_size,
                        float scale, const unsigned short* q, unsigned out_type, void* out) {
    RIDGE_DYNAMIC_SHARED(unsigned char, shared);
    Tile<DIM>* const tiles = reinterpret_cast<Tile<DIM>*>(shared);
    using Weight = typename Query<C>::Type;
    constexpr unsigned STEPS = DIM / 16, BLOCKS = TILE / 8;
    // Queries of large heads do not fit into registers beside the outputs, and are read again for each tile.
    constexpr bool KEEP = DIM <= 128;

    const uint2 task = work[blockIdx.x];
    if (task.x == NO_ITEM) return;
    const Item item = items[task.x];
    const unsigned head = blockIdx.y, heads = kv_heads * group;
    const unsigned rows = min(QUERIES, item.rows - task.y), start = item.start + task.y;
    const Cache<C> cache(pages, block_stride, kv_heads, DIM, block_size, head / group);
    const unsigned* const table = tables + item.table;

    // A lane has rows `row` and `row + 8` of the tile, and in each block of eight keys or elements the columns `pair`, `pair` + 1.
    const unsigned lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, pair = lane % 4 * 2;
    // What it passes to ldmatrix: its row and column among 16 x 16.
    const unsigned matrix_row = lane % 16, matrix_column = lane / 16 * 8;

    const unsigned long long stride = static_cast<unsigned long long>(heads) * DIM;
    q += (item.first_row + task.y) * stride + head * DIM;
    unsigned kept[KEEP ? STEPS : 1][4];
    if constexpr (KEEP)
#pragma unroll
        for (unsigned step = 0; step < STEPS; ++step) load_queries(kept[step], q, stride, row, rows, step * 16 + pair);

    // Keys that some row sees, and whether a tile needs no mask.
    const unsigned first = item.first_key(start), end = start + rows;
    const unsigned seen_by_all = item.first_key(start + QUERIES - 1);
    const float factor = scale * 1.44269504f;
    float largest[2] = {negative_infinity(), negative_infinity()}, total[2] = {0.0f, 0.0f};
    float output[DIM / 8][4] = {};

    unsigned stage = 0;
    const unsigned from = first / TILE * TILE;
    if (STAGES == 2) {
        fetch<C, DIM>(tiles[0], cache, table, from, first, end);
        cp_async_commit();
    }
    for (unsigned begin = from; begin < end; begin += TILE) {
        if (STAGES == 2) {
            if (begin + TILE < end) fetch<C, DIM>(tiles[stage ^ 1], cache, table, begin + TILE, first, end);
            cp_async_commit();
            cp_async_wait<1>();
        } else {
            fetch<C, DIM>(tiles[0], cache, table, begin, first, end);
            cp_async_commit();
            cp_async_wait<0>();
        }
        __syncthreads();
        const Tile<DIM>& tile = tiles[stage];

        float scores[BLOCKS][4] = {};
#pragma unroll
        for (unsigned step = 0; step < STEPS; ++step) {
            unsigned a[4];
            if constexpr (KEEP) {
#pragma unroll
                for (unsigned i = 0; i < 4; ++i) a[i] = kept[step][i];
            } else {
                load_queries(a, q, stride, row, rows, step * 16 + pair);
            }
#pragma unroll
            for (unsigned block = 0; block < BLOCKS; block += 2) {
                unsigned b[4];
                ldmatrix_x4_trans(b, &tile.keys[step * 16 + matrix_row][block * 8 + matrix_column]);
                const unsigned left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
                multiply(Weight(), scores[block], a, left);
                multiply(Weight(), scores[block + 1], a, right);
            }
        }

        const bool masked = begin < seen_by_all || begin + TILE > start + 1 || rows < QUERIES;
        unsigned weights[BLOCKS][2];
#pragma unroll
        for (unsigned half = 0; half < 2; ++half) {
            const unsigned position = start + row + half * 8;
            const unsigned low = item.first_key(position);
            const bool exists = row + half * 8 < rows;
            float newer = largest[half];
#pragma unroll
            for (unsigned block = 0; block < BLOCKS; ++block)
#pragma unroll
                for (unsigned i = 0; i < 2; ++i) {
                    const unsigned key = begin + block * 8 + pair + i;
                    float& score = scores[block][half * 2 + i];
                    if (masked && !(exists && key >= low && key <= position)) score = negative_infinity();
                    newer = fmaxf(newer, score);
                }
            newer = fmaxf(newer, __shfl_xor_sync(FULL_WARP, newer, 1));
            newer = fmaxf(newer, __shfl_xor_sync(FULL_WARP, newer, 2));
            // A row that has seen nothing yet keeps its zeros: e^(-inf - 0) is 0.
            const float shift = newer == negative_infinity() ? 0.0f : newer * factor;
            const float rescale = newer == largest[half] ? 1.0f : exp2_approx(fmaf(largest[half], factor, -shift));
            float sum = 0.0f;
#pragma unroll
            for (unsigned block = 0; block < BLOCKS; ++block) {
                const float p = exp2_approx(fmaf(scores[block][half * 2], factor, -shift));
                const float r = exp2_approx(fmaf(scores[block][half * 2 + 1], factor, -shift));
                sum += p;
                sum += r;
                weights[block][half] = Weight::pair(p, r);
            }
            sum += __shfl_xor_sync(FULL_WARP, sum, 1);
            sum += __shfl_xor_sync(FULL_WARP, sum, 2);
            total[half] = fmaf(total[half], rescale, sum);
            largest[half] = newer;
#pragma unroll
            for (unsigned block = 0; block < DIM / 8; ++block) {
                output[block][half * 2] *= rescale;
                output[block][half * 2 + 1] *= rescale;
            }
        }

#pragma unroll
        for (unsigned step = 0; step < TILE / 16; ++step) {
            const unsigned a[4] = {weights[2 * step][0], weights[2 * step][1], weights[2 * step + 1][0],
                                   weights[2 * step + 1][1]};
#pragma unroll
            for (unsigned block = 0; block < DIM / 8; block += 2) {
                unsigned b[4];
                ldmatrix_x4_trans(b, &tile.values[step * 16 + matrix_row][block * 8 + matrix_column]);
                const unsigned left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
                multiply(Weight(), output[block], a, left);
                multiply(Weight(), output[block + 1], a, right);
            }
        }
        // The stage is read before it is filled anew.
        __syncthreads();
        stage ^= STAGES - 1;
    }

#pragma unroll
    for (unsigned half = 0; half < 2; ++half) {
        const unsigned r = row + half * 8;
        if (r >= rows) continue;
        const unsigned long long place = (item.first_row + task.y + r) * stride + head * DIM + pair;
        const float inverse = 1.0f / total[half];
#pragma unroll
        for (unsigned block = 0; block < DIM / 8; ++block)
            store_pair_as(out_type, out, place + block * 8, output[block][half * 2] * inverse,
                          output[block][half * 2 + 1] * inverse);
    }
}

#define RIDGE_PREFILL(name, C, dim, stages)                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_prefill_##name##_##dim##_##stages(                \
        const Item* items, const uint2* work, const unsigned* tables, const unsigned char* pages,                     \
        unsigned long long block_stride, unsigned kv_heads, unsigned group, unsigned head_dim, unsigned block_size,   \
        float scale, const unsigned short* q, unsigned out_type, void* out) {                                         \
        prefill<C, dim, stages>(items, work, tables, pages, block_stride, kv_heads, group, block_size, scale, q,      \
                                out_type, out);                                                                       \
    }
#define RIDGE_PREFILLS(dim)                                                                                           \
    RIDGE_PREFILL(f16, KvF16, dim, 1)                                                                                   \
    RIDGE_PREFILL(f16, KvF16, dim, 2)                                                                                   \
    RIDGE_PREFILL(bf16, KvBF16, dim, 1)                                                                                 \
    RIDGE_PREFILL(bf16, KvBF16, dim, 2)
RIDGE_PREFILLS(64)
RIDGE_PREFILLS(80)
RIDGE_PREFILLS(96)
RIDGE_PREFILLS(128)
RIDGE_PREFILLS(256)
