// Attention of single queries over long caches: the keys of a sequence are cut into splits of 512 at absolute positions,
// each computed by a block of threads of its own, and combined in ascending order. A query's bits depend on its own
// vector, its position and the keys and values it sees; not on the batch, and not on the page size.
#include "attention.cuh"

using namespace attention;

constexpr unsigned SPLIT = 512, THREADS = 128, WARPS = THREADS / 32, KEYS = SPLIT / THREADS;
// Neighbouring elements of a value that a thread adds up.
constexpr unsigned PACK = 8;
// Loads under way at a time: elements of keys ahead of the ones in use, and values.
constexpr unsigned AHEAD = 8, BESIDE = 8;

// One split of one sequence for up to GROUP query heads of a key/value head, which share each read of the cache.
//
// Scores: each thread has 4 neighbouring keys (they are neighbours in memory too, for each element) and all elements, so a
// score is one chain of multiply-adds. Values: head_dim / 8 threads read a value together, several values at a time; the
// partial sums of those streams are added in order. The result is a maximum, a sum and an unscaled output per head.
//
// work[x] = {item, split}; grid.y = kv_heads * ceil(group / GROUP). With `direct` every item has one split, and the
// output is written at once, to the bits that combining would give.
template <class C, int GROUP>
__device__ void decode(const Item* items, const uint2* work, const unsigned* tables, const unsigned char* pages,
                       unsigned long long block_stride, unsigned kv_heads, unsigned group, unsigned head_dim,
                       unsigned block_size, float scale, const typename Query<C>::Type::Stored* q, float* parts,
                       unsigned direct, unsigned out_type, void* out) {
    typedef typename C::Stored Stored;
    RIDGE_DYNAMIC_SHARED(unsigned long long, offsets);              // [SPLIT]: from a page's values of slot 0, of block 0
    float* const value_scales = reinterpret_cast<float*>(offsets + SPLIT);  // [SPLIT]
    float* const queries = value_scales + SPLIT;                            // [head_dim][GROUP]
    float* const maxima = queries + head_dim * GROUP;                       // [WARPS][GROUP]
    float* const sums = maxima + WARPS * GROUP;                             // [WARPS][GROUP]
    float* const weights = sums + WARPS * GROUP;                            // [SPLIT][GROUP]
    float* const streamed = weights;                                        // later: [streams][GROUP][head_dim]

    const uint2 task = work[blockIdx.x];
    if (task.x == NO_ITEM) return;
    const Item item = items[task.x];
    const unsigned chunks = (group + GROUP - 1) / GROUP, kv_head = blockIdx.y / chunks;
    const unsigned first_head = kv_head * group + blockIdx.y % chunks * GROUP;
    const unsigned heads = kv_heads * group, count = min(GROUP, (kv_head + 1) * group - first_head);
    const unsigned warp = threadIdx.x / 32;
    const Cache<C> cache(pages, block_stride, kv_heads, head_dim, block_size, kv_head);
    const unsigned* const table = tables + item.table;

    q += (static_cast<unsigned long long>(item.first_row) * heads + first_head) * head_dim;
    for (unsigned at = threadIdx.x; at < GROUP * head_dim; at += THREADS) {
        const unsigned g = at / head_dim, d = at % head_dim;
        queries[d * GROUP + g] = g < count ? Query<C>::Type::load(q[at]) : 0.0f;
    }
    __syncthreads();

    // Keys low..high of the split are seen.
    const unsigned begin = task.y * SPLIT, first = item.first_key(item.start);
    const unsigned low = max(first, begin) - begin, high = min(item.start + 1 - begin, SPLIT);
    const unsigned mine = threadIdx.x * KEYS;
    float scores[KEYS][GROUP] = {};
    float of_values[KEYS] = {};
    if (mine < high && mine + KEYS > low) {
        if (block_size % KEYS == 0) {
            const unsigned block = table[(begin + mine) / block_size], slot = (begin + mine) % block_size;
            const Stored* const key = cache.key(block, slot);
            // The next elements are on their way while these are multiplied.
            Pack<C, KEYS> next[AHEAD];
#pragma unroll
            for (unsigned i = 0; i < AHEAD; ++i) next[i].load(key + i * block_size);
            for (unsigned d = 0; d < head_dim; d += AHEAD) {
                Pack<C, KEYS> packs[AHEAD];
#pragma unroll
                for (unsigned i = 0; i < AHEAD; ++i) {
                    packs[i] = next[i];
                    if (d + AHEAD < head_dim) next[i].load(key + (d + AHEAD + i) * block_size);
                }
#pragma unroll
                for (unsigned i = 0; i < AHEAD; ++i)
#pragma unroll
                    for (unsigned g = 0; g < GROUP; ++g) {
                        const float element = queries[(d + i) * GROUP + g];
#pragma unroll
                        for (unsigned k = 0; k < KEYS; ++k) scores[k][g] = fmaf(packs[i][k], element, scores[k][g]);
                    }
            }
        } else {
#pragma unroll
            for (unsigned i = 0; i < KEYS; ++i) {
                if (mine + i < low || mine + i >= high) continue;
                const unsigned position = begin + mine + i;
                const Stored* const key = cache.key(table[position / block_size], position % block_size);
                for (unsigned d = 0; d < head_dim; ++d) {
                    const float k = C::load(key[d * block_size]);
#pragma unroll
                    for (unsigned g = 0; g < GROUP; ++g) scores[i][g] = fmaf(k, queries[d * GROUP + g], scores[i][g]);
                }
            }
        }
#pragma unroll
        for (unsigned i = 0; i < KEYS; ++i) {
            if (mine + i < low || mine + i >= high) continue;
            const unsigned position = begin + mine + i, block = table[position / block_size], slot = position % block_size;
            offsets[mine + i] = block * block_stride + slot * head_dim * sizeof(Stored);
            of_values[i] = cache.value_scale(block, slot);
            const float factor = scale * cache.key_scale(block, slot);
#pragma unroll
            for (unsigned g = 0; g < GROUP; ++g) scores[i][g] *= factor;
        }
    }

#pragma unroll
    for (unsigned g = 0; g < GROUP; ++g) {
        float largest = negative_infinity();
#pragma unroll
        for (unsigned i = 0; i < KEYS; ++i)
            if (mine + i >= low && mine + i < high) largest = fmaxf(largest, scores[i][g]);
        largest = warp_max(largest);
        if (threadIdx.x % 32 == 0) maxima[warp * GROUP + g] = largest;
    }
    __syncthreads();
#pragma unroll
    for (unsigned g = 0; g < GROUP; ++g) {
        float largest = maxima[g], sum = 0.0f;
        for (unsigned w = 1; w < WARPS; ++w) largest = fmaxf(largest, maxima[w * GROUP + g]);
#pragma unroll
        for (unsigned i = 0; i < KEYS; ++i) {
            const bool seen = mine + i >= low && mine + i < high;
            const float weight = seen ? expf(scores[i][g] - largest) : 0.0f;
            sum += weight;
            weights[(mine + i) * GROUP + g] = weight * of_values[i];
        }
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) sums[warp * GROUP + g] = sum;
    }
    __syncthreads();

    const unsigned lanes = head_dim / PACK, streams = THREADS / lanes;
    const unsigned stream = threadIdx.x / lanes, lane = threadIdx.x % lanes;
    float output[GROUP][PACK] = {};
    if (stream < streams) {
        const unsigned char* const values = pages + cache.values;
        const unsigned skipped = low > stream ? (low - stream + streams - 1) / streams : 0;
        const auto value = [&](unsigned j) { return reinterpret_cast<const Stored*>(values + offsets[j]) + lane * PACK; };
        for (unsigned j = stream + skipped * streams; j < high; j += BESIDE * streams) {
            Pack<C, PACK> packs[BESIDE];
#pragma unroll
            for (unsigned i = 0; i < BESIDE; ++i)
                if (j + i * streams < high) packs[i].load(value(j + i * streams));
#pragma unroll
            for (unsigned i = 0; i < BESIDE; ++i) {
                if (j + i * streams >= high) continue;
#pragma unroll
                for (unsigned g = 0; g < GROUP; ++g) {
                    const float weight = weights[(j + i * streams) * GROUP + g];
#pragma unroll
                    for (unsigned e = 0; e < PACK; ++e) output[g][e] = fmaf(weight, packs[i][e], output[g][e]);
                }
            }
        }
    }
    // The weights have been read.
    __syncthreads();
    if (stream < streams) {
#pragma unroll
        for (unsigned g = 0; g < GROUP; ++g)
#pragma unroll
            for (unsigned e = 0; e < PACK; ++e)
                streamed[(stream * GROUP + g) * head_dim + lane * PACK + e] = output[g][e];
    }
    __syncthreads();
    const unsigned long long part = item.parts + task.y - first / SPLIT;
    for (unsigned at = threadIdx.x; at < count * head_dim; at += THREADS) {
        const unsigned g = at / head_dim, d = at % head_dim, head = first_head + g;
        float sum = 0.0f, total = 0.0f, largest = maxima[g];
        for (unsigned s = 0; s < streams; ++s) sum += streamed[(s * GROUP + g) * head_dim + d];
        for (unsigned w = 0; w < WARPS; ++w) total += sums[w * GROUP + g];
        for (unsigned w = 1; w < WARPS; ++w) largest = fmaxf(largest, maxima[w * GROUP + g]);
        if (direct) {
            const unsigned long long index = (static_cast<unsigned long long>(item.first_row) * heads + head) * head_dim + d;
            store_as(out_type, out, index, sum / total);
        } else {
            float* const result = parts + (part * heads + head) * (head_dim + 2);
            result[d] = sum;
            if (d == 0) result[head_dim] = largest, result[head_dim + 1] = total;
        }
    }
}

// Combines the splits of each item in ascending order. Grid: {items, heads}; threads: head_dim or more.
extern "C" __global__ void attention_combine(const Item* items, unsigned head_dim, const float* parts, unsigned out_type,
                                             void* out) {
    const Item item = items[blockIdx.x];
    const unsigned d = threadIdx.x, heads = gridDim.y, head = blockIdx.y;
    if (item.rows == 0 || d >= head_dim) return;
    const unsigned splits = item.start / SPLIT + 1 - item.first_key(item.start) / SPLIT;
    float largest = negative_infinity(), total = 0.0f, output = 0.0f;
    for (unsigned split = 0; split < splits; ++split) {
        const float* const part = parts + ((item.parts + split) * static_cast<unsigned long long>(heads) + head) * (head_dim + 2);
        const float newer = fmaxf(largest, part[head_dim]);
        const float before = expf(largest - newer), added = expf(part[head_dim] - newer);
        total = fmaf(total, before, part[head_dim + 1] * added);
        output = fmaf(output, before, part[d] * added);
        largest = newer;
    }
    const unsigned long long index = (static_cast<unsigned long long>(item.first_row) * heads + head) * head_dim + d;
    store_as(out_type, out, index, output / total);
}

#define RIDGE_DECODE(name, C, groups)                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_decode_##name##_##groups(                         \
        const Item* items, const uint2* work, const unsigned* tables, const unsigned char* pages,                     \
        unsigned long long block_stride, unsigned kv_heads, unsigned group, unsigned head_dim, unsigned block_size,   \
        float scale, const Query<C>::Type::Stored* q, float* parts, unsigned direct, unsigned out_type,            \
        void* out) {                                                                                                  \
        decode<C, groups>(items, work, tables, pages, block_stride, kv_heads, group, head_dim, block_size, scale,  \
                             q, parts, direct, out_type, out);                                                        \
    }
#define RIDGE_DECODES(name, C)                                                                                     \
    RIDGE_DECODE(name, C, 1)                                                                                       \
    RIDGE_DECODE(name, C, 2)                                                                                       \
    RIDGE_DECODE(name, C, 4)                                                                                       \
    RIDGE_DECODE(name, C, 8)
RIDGE_DECODES(f32, KvF32)
RIDGE_DECODES(f16, KvF16)
RIDGE_DECODES(bf16, KvBF16)
RIDGE_DECODES(fp8, KvFp8)
RIDGE_DECODES(int8, KvInt8)
