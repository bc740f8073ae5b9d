// Attention of chunks of prompts with multiply-adds in f32: for every cache and head size, and simple enough to be believed.
// What tensor cores can multiply takes attention_prefill.cu.
#include "attention.cuh"

using namespace attention;

// Queries and keys of a tile; keys are cut at absolute positions. A row of queries has 8 threads.
constexpr unsigned QUERIES = 16, TILE = 32, LANES = 8, THREADS = QUERIES * LANES;
// Elements of a head per thread, at most.
constexpr unsigned ELEMENTS = 256 / LANES;

// work[x] = {item, first row of the tile}; grid.y is the query head. Each row keeps a maximum m, a sum l and an output o,
// and takes in one tile of keys after the other:
//     m' = max(m, scores); p = e^(score - m'), 0 where masked
//     l = l e^(m - m') + sum p;  o = o e^(m - m') + sum p v;  m = m'
// A tile that a row sees nothing of leaves it as it is, to the bit: so rows do not depend on their tile of queries.
template <class C>
__device__ void prefill(const Item* items, const uint2* work, const unsigned* tables, const unsigned char* pages,
                        unsigned long long block_stride, unsigned kv_heads, unsigned group, unsigned head_dim,
                        unsigned block_size, float scale, const typename Query<C>::Type::Stored* q, unsigned out_type,
                        void* out) {
    RIDGE_DYNAMIC_SHARED(float, queries);                          // [QUERIES][head_dim + 1]
    const unsigned width = head_dim + 1;
    float* const keys = queries + QUERIES * width;                 // [TILE][head_dim + 1]
    float* const values = keys + TILE * width;                     // [TILE][head_dim + 1]
    float* const weights = values + TILE * width;                  // [QUERIES][TILE + 1]
    float* const key_scales = weights + QUERIES * (TILE + 1);      // [TILE]
    float* const value_scales = key_scales + TILE;                 // [TILE]

    const uint2 task = work[blockIdx.x];
    if (task.x == NO_ITEM) return;
    const Item item = items[task.x];
    const unsigned head = blockIdx.y, heads = kv_heads * group;
    const unsigned rows = min(QUERIES, item.rows - task.y), row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const Cache<C> cache(pages, block_stride, kv_heads, head_dim, block_size, head / group);
    const unsigned* const table = tables + item.table;
    const unsigned long long first_row = item.first_row + task.y;

    for (unsigned at = threadIdx.x; at < rows * head_dim; at += THREADS) {
        const unsigned r = at / head_dim, d = at % head_dim;
        queries[r * width + d] = Query<C>::Type::load(q[((first_row + r) * heads + head) * head_dim + d]);
    }

    const unsigned start = item.start + task.y, position = start + row;
    // Keys that the tile's rows see, and those that this row sees.
    const unsigned first = item.first_key(start), end = start + rows, from = item.first_key(position);
    float largest = negative_infinity(), total = 0.0f, output[ELEMENTS] = {};

    for (unsigned begin = first / TILE * TILE; begin < end; begin += TILE) {
        __syncthreads();
        for (unsigned at = threadIdx.x; at < TILE * head_dim; at += THREADS) {
            const unsigned j = at % TILE, d = at / TILE, key = begin + j;
            const bool used = key >= first && key < end;
            keys[j * width + d] =
                used ? C::load(cache.key(table[key / block_size], key % block_size)[d * block_size]) : 0.0f;
        }
        for (unsigned at = threadIdx.x; at < TILE * head_dim; at += THREADS) {
            const unsigned j = at / head_dim, d = at % head_dim, key = begin + j;
            const bool used = key >= first && key < end;
            values[j * width + d] = used ? C::load(cache.value(table[key / block_size], key % block_size)[d]) : 0.0f;
        }
        if (threadIdx.x < TILE) {
            const unsigned key = begin + threadIdx.x;
            const bool used = key >= first && key < end;
            key_scales[threadIdx.x] = used ? cache.key_scale(table[key / block_size], key % block_size) : 0.0f;
            value_scales[threadIdx.x] = used ? cache.value_scale(table[key / block_size], key % block_size) : 0.0f;
        }
        __syncthreads();

        float scores[TILE / LANES], newer = largest;
#pragma unroll
        for (unsigned i = 0; i < TILE / LANES; ++i) {
            const unsigned j = lane + i * LANES;
            const bool seen = row < rows && begin + j >= from && begin + j <= position;
            float sum = 0.0f;
#pragma unroll 4
            for (unsigned d = 0; seen && d < head_dim; ++d)
                sum = fmaf(queries[row * width + d], keys[j * width + d], sum);
            scores[i] = seen ? sum * (scale * key_scales[j]) : negative_infinity();
            newer = fmaxf(newer, scores[i]);
        }
        for (int bits = LANES / 2; bits > 0; bits /= 2) newer = fmaxf(newer, __shfl_xor_sync(FULL_WARP, newer, bits));
        const bool nothing = newer == negative_infinity();
        const float rescale = nothing ? 1.0f : expf(largest - newer);
        float sum = 0.0f;
#pragma unroll
        for (unsigned i = 0; i < TILE / LANES; ++i) {
            const unsigned j = lane + i * LANES;
            const bool seen = row < rows && begin + j >= from && begin + j <= position;
            const float weight = seen ? expf(scores[i] - newer) : 0.0f;
            sum += weight;
            weights[row * (TILE + 1) + j] = seen ? weight * value_scales[j] : 0.0f;
        }
        for (int bits = LANES / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, bits);
        total = fmaf(total, rescale, sum);
        largest = newer;
        __syncwarp();
#pragma unroll
        for (unsigned i = 0; i < ELEMENTS; ++i) output[i] *= rescale;
#pragma unroll 1
        for (unsigned j = 0; j < TILE; ++j) {
            const float weight = weights[row * (TILE + 1) + j];
#pragma unroll
            for (unsigned i = 0; i < ELEMENTS; ++i)
                if (i * LANES < head_dim) output[i] = fmaf(weight, values[j * width + i * LANES + lane], output[i]);
        }
    }
    if (row >= rows) return;
#pragma unroll
    for (unsigned i = 0; i < ELEMENTS; ++i) {
        if (i * LANES >= head_dim) continue;
        store_as(out_type, out, ((first_row + row) * heads + head) * head_dim + i * LANES + lane, output[i] / total);
    }
}

#define RIDGE_SIMT(name, C)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_simt_##name(                                      \
        const Item* items, const uint2* work, const unsigned* tables, const unsigned char* pages,                     \
        unsigned long long block_stride, unsigned kv_heads, unsigned group, unsigned head_dim, unsigned block_size,   \
        float scale, const Query<C>::Type::Stored* q, unsigned out_type, void* out) {                              \
        prefill<C>(items, work, tables, pages, block_stride, kv_heads, group, head_dim, block_size, scale, q,      \
                      out_type, out);                                                                                 \
    }
RIDGE_SIMT(f32, KvF32)
RIDGE_SIMT(f16, KvF16)
RIDGE_SIMT(bf16, KvBF16)
RIDGE_SIMT(fp8, KvFp8)
RIDGE_SIMT(int8, KvInt8)
