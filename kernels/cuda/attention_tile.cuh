// What the two tensor-core kernels for chunks of prompts share: tiles of 64 queries by 64 keys, four warps of 16 queries each.
//
// Registers of a product have the layout of mma.m16n8k16 (a warpgroup's instructions have the same for each of its warps): a
// lane has rows l / 4 and l / 4 + 8 of its warp's 16, and in each block of eight columns the columns 2 (l % 4) and the next
// one: elements 0 and 1 of the upper row, 2 and 3 of the lower one.
#pragma once
#include "attention.cuh"
#include "ptx.cuh"

namespace attention {

constexpr unsigned QUERIES = 64, TILE = 64, TILE_THREADS = 128;

// Begins to copy the tile of keys at `begin`; what lies outside first..end becomes 0. `key_at(d, column)` is where element d of
// the key in a column goes, and `value_at(row, column)` an element of a value; eight columns from a multiple of eight on
// are neighbours there.
template <int DIM, class C, class KeyAt, class ValueAt>
RIDGE_INLINE void fetch(const Cache<C>& cache, const unsigned* table, unsigned begin, unsigned first, unsigned end,
                        KeyAt key_at, ValueAt value_at) {
    const unsigned block_size = cache.block_size;
    if (block_size % 8 == 0) {
        // A thread has eight neighbouring keys, in one page, of every sixteenth element.
        const unsigned column = threadIdx.x % (TILE / 8) * 8, key = begin + column;
        const bool used = key + 8 > first && key < end;
        const unsigned short* const from = used ? cache.key(table[key / block_size], key % block_size) : cache.key(0, 0);
#pragma unroll
        for (unsigned d = threadIdx.x / (TILE / 8); d < DIM; d += TILE_THREADS / (TILE / 8))
            cp_async_16(key_at(d, column), from + d * block_size, used);
    } else {
        for (unsigned at = threadIdx.x; at < TILE * DIM; at += TILE_THREADS) {
            const unsigned column = at % TILE, d = at / TILE, key = begin + column;
            const bool used = key >= first && key < end;
            *key_at(d, column) = used ? cache.key(table[key / block_size], key % block_size)[d * block_size] : 0;
        }
    }
    // Two threads per value.
    const unsigned row = threadIdx.x / 2, key = begin + row;
    const bool used = key >= first && key < end;
    const unsigned short* const from = used ? cache.value(table[key / block_size], key % block_size) : cache.value(0, 0);
#pragma unroll
    for (unsigned column = threadIdx.x % 2 * 8; column < DIM; column += 16)
        cp_async_16(value_at(row, column), from + column, used);
}

// The type that tensor cores multiply in: the cache's own, or bf16, which holds every element of 8 bits.
template <class C> struct Compute { using Type = BF16; };
template <> struct Compute<KvF16> { using Type = F16; };

// As `fetch`, of a cache of 8-bit elements: widened on their way, which is done when it returns. Scales stay apart.
template <int DIM, class C, class KeyAt, class ValueAt>
RIDGE_INLINE void fetch_widened(const Cache<C>& cache, const unsigned* table, unsigned begin, unsigned first, unsigned end,
                                KeyAt key_at, ValueAt value_at, float* key_scales, float* value_scales) {
    const unsigned block_size = cache.block_size;
    const auto widened = [](const Pack<C, 8>& pack) {
        return make_uint4(bf16_pair(pack[0], pack[1]), bf16_pair(pack[2], pack[3]), bf16_pair(pack[4], pack[5]),
                          bf16_pair(pack[6], pack[7]));
    };
    const auto put = [&](unsigned short* to, const typename C::Stored* from, bool used) {
        Pack<C, 8> pack;
        if (used) pack.load(from);
        *reinterpret_cast<uint4*>(to) = used ? widened(pack) : make_uint4(0, 0, 0, 0);
    };
    if (block_size % 8 == 0) {
        const unsigned column = threadIdx.x % (TILE / 8) * 8, key = begin + column;
        const bool used = key + 8 > first && key < end;
        const typename C::Stored* const from = used ? cache.key(table[key / block_size], key % block_size) : cache.key(0, 0);
#pragma unroll 4
        for (unsigned d = threadIdx.x / (TILE / 8); d < DIM; d += TILE_THREADS / (TILE / 8))
            put(key_at(d, column), from + d * block_size, used);
    } else {
        for (unsigned at = threadIdx.x; at < TILE * DIM; at += TILE_THREADS) {
            const unsigned column = at % TILE, d = at / TILE, key = begin + column;
            const bool used = key >= first && key < end;
            *key_at(d, column) =
                used ? f32_to_bf16(C::load(cache.key(table[key / block_size], key % block_size)[d * block_size])) : 0;
        }
    }
    const unsigned row = threadIdx.x / 2, key = begin + row;
    const bool used = key >= first && key < end;
    const unsigned block = used ? table[key / block_size] : 0, slot = used ? key % block_size : 0;
    const typename C::Stored* const from = cache.value(block, slot);
#pragma unroll 4
    for (unsigned column = threadIdx.x % 2 * 8; column < DIM; column += 16) put(value_at(row, column), from + column, used);
    if constexpr (C::SCALED)
        if (threadIdx.x % 2 == 0) {
            key_scales[row] = used ? cache.key_scale(block, slot) : 0.0f;
            value_scales[row] = used ? cache.value_scale(block, slot) : 0.0f;
        }
}

// A tile of queries of one head, and this thread's two rows of it.
struct Queries {
    Item item;
    unsigned rows, start, row, pair;

    __device__ Queries(const Item& item, unsigned first)
        : item(item), rows(min(QUERIES, item.rows - first)), start(item.start + first),
          row(threadIdx.x % TILE_THREADS / 32 * 16 + threadIdx.x % 32 / 4), pair(threadIdx.x % 4 * 2) {}

    // Keys that some row sees.
    __device__ unsigned first() const { return item.first_key(start); }
    __device__ unsigned end() const { return start + rows; }
    // Whether some row does not see some key of the tile at `begin`.
    __device__ bool masks(unsigned begin) const {
        return begin < item.first_key(start + QUERIES - 1) || begin + TILE > start + 1 || rows < QUERIES;
    }

    // The fragment of 16 elements from `column` on; rows that do not exist are 0.
    RIDGE_INLINE void load(unsigned (&a)[4], const unsigned short* q, unsigned long long stride, unsigned column) const {
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned r = row + i % 2 * 8, c = column + pair + i / 2 * 8;
            a[i] = r < rows ? *reinterpret_cast<const unsigned*>(q + r * stride + c) : 0u;
        }
    }
    // Of queries in f32, rounded to bf16.
    RIDGE_INLINE void load(unsigned (&a)[4], const float* q, unsigned long long stride, unsigned column) const {
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned r = row + i % 2 * 8, c = column + pair + i / 2 * 8;
            const float2 both = r < rows ? *reinterpret_cast<const float2*>(q + r * stride + c) : make_float2(0.0f, 0.0f);
            a[i] = bf16_pair(both.x, both.y);
        }
    }
};

// The softmax of this thread's two rows, kept as it goes.
struct Softmax {
    float largest[2] = {negative_infinity(), negative_infinity()}, total[2] = {0.0f, 0.0f};

    // Takes in the scores of the tile at `begin` (times `factor`, as powers of two) and rescales the outputs so far; leaves the
    // weights, each times the scale of its value (`of_value(column)`) and rounded, as the first operand of the product with the
    // values.
    template <class Weight, int OUTPUTS, class OfValue>
    RIDGE_INLINE void take(const Queries& queries, unsigned begin, float factor, float (&scores)[TILE / 2],
                           float (&output)[OUTPUTS], unsigned (&weights)[TILE / 8][2], OfValue of_value) {
        const bool masked = queries.masks(begin);
#pragma unroll
        for (unsigned half = 0; half < 2; ++half) {
            const unsigned row = queries.row + half * 8, position = queries.start + row;
            const unsigned low = queries.item.first_key(position);
            const bool exists = row < queries.rows;
            float newer = largest[half];
#pragma unroll
            for (unsigned block = 0; block < TILE / 8; ++block)
#pragma unroll
                for (unsigned i = 0; i < 2; ++i) {
                    const unsigned key = begin + block * 8 + queries.pair + i;
                    float& score = scores[block * 4 + half * 2 + i];
                    if (masked && !(exists && key >= low && key <= position)) score = negative_infinity();
                    newer = fmaxf(newer, score);
                }
            newer = fmaxf(newer, __shfl_xor_sync(FULL_WARP, newer, 1));
            newer = fmaxf(newer, __shfl_xor_sync(FULL_WARP, newer, 2));
            // A row that has seen nothing yet keeps its zeros: 2^-inf is 0.
            const float shift = newer == negative_infinity() ? 0.0f : newer * factor;
            const float rescale = newer == largest[half] ? 1.0f : exp2_approx(fmaf(largest[half], factor, -shift));
            float sum = 0.0f;
#pragma unroll
            for (unsigned block = 0; block < TILE / 8; ++block) {
                const float left = exp2_approx(fmaf(scores[block * 4 + half * 2], factor, -shift));
                const float right = exp2_approx(fmaf(scores[block * 4 + half * 2 + 1], factor, -shift));
                sum += left;
                sum += right;
                const unsigned column = block * 8 + queries.pair;
                weights[block][half] = Weight::pair(left * of_value(column), right * of_value(column + 1));
            }
            sum += __shfl_xor_sync(FULL_WARP, sum, 1);
            sum += __shfl_xor_sync(FULL_WARP, sum, 2);
            total[half] = fmaf(total[half], rescale, sum);
            largest[half] = newer;
#pragma unroll
            for (unsigned block = 0; block < OUTPUTS / 4; ++block) {
                output[block * 4 + half * 2] *= rescale;
                output[block * 4 + half * 2 + 1] *= rescale;
            }
        }
    }

    // Writes the rows that exist. `place` is that of the tile's first row and the head's first element.
    template <int OUTPUTS>
    RIDGE_INLINE void finish(const Queries& queries, const float (&output)[OUTPUTS], unsigned long long place,
                             unsigned long long stride, unsigned out_type, void* out) const {
#pragma unroll
        for (unsigned half = 0; half < 2; ++half) {
            const unsigned row = queries.row + half * 8;
            if (row >= queries.rows) continue;
            const float inverse = 1.0f / total[half];
#pragma unroll
            for (unsigned block = 0; block < OUTPUTS / 4; ++block)
                store_pair_as(out_type, out, place + row * stride + block * 8 + queries.pair,
                              output[block * 4 + half * 2] * inverse, output[block * 4 + half * 2 + 1] * inverse);
        }
    }
};

}  // namespace attention
