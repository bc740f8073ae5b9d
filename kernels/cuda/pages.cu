// Keys and values into pages, and pages to and from other memory. The layout is kernels/src/kv/mod.rs:
//   keys [kv_heads][head_dim][block_size], values [kv_heads][block_size][head_dim], and with int8 the scales of the
//   keys [kv_heads][block_size], then of the values.
#include "elements.cuh"

// Tokens whose keys are turned over in shared memory at a time.
constexpr unsigned TOKENS = 16;

// One head of one page.
template <class C>
struct Head {
    typename C::Stored *keys, *values;
    float *key_scales, *value_scales;

    __device__ Head(unsigned char* page, unsigned kv_heads, unsigned head_dim, unsigned block_size, unsigned head) {
        const unsigned long long side = static_cast<unsigned long long>(kv_heads) * head_dim * block_size;
        const unsigned long long mine = static_cast<unsigned long long>(head) * head_dim * block_size;
        typename C::Stored* const elements = reinterpret_cast<typename C::Stored*>(page);
        keys = elements + mine;
        values = elements + side + mine;
        float* const scales = reinterpret_cast<float*>(elements + 2 * side);
        key_scales = scales + head * block_size;
        value_scales = scales + (kv_heads + head) * block_size;
    }
};

// The scale of a vector whose elements a warp's lanes hold, and what its elements are multiplied by.
template <class C, class Element>
__device__ float2 scale_of(unsigned head_dim, Element element) {
    if constexpr (C::SCALED) {
        unsigned largest = 0;
        for (unsigned d = threadIdx.x % 32; d < head_dim; d += 32)
            largest = max(largest, __float_as_uint(element(d)) & 0x7fffffffu);
        const float scale = C::scale(warp_max(largest));
        return make_float2(scale, C::factor(scale));
    } else {
        return make_float2(1.0f, 1.0f);
    }
}

// Writes rows of k and v [rows, kv_heads, head_dim] into pages; keys are normed (if `weight` is given) and rotated (if
// `pairs` is not 0) on the way. writes[x] = {block, first slot, first row, rows}; a block that is written from its first
// slot on is zeroed after the last row. A block of threads per write and head; shared memory: TOKENS * (head_dim + 1)
// and TOKENS floats. Nobody else writes the slots.
template <class C>
__device__ void write_kv(const uint4* writes, unsigned kv_heads, unsigned head_dim, unsigned block_size, unsigned pairs,
                         float eps, const float* k, const float* v, const float* weight, const float* cos,
                         const float* sin, unsigned char* pages, unsigned long long block_stride) {
    typedef typename C::Stored Stored;
    RIDGE_DYNAMIC_SHARED(float, tile);
    float* const factors = tile + TOKENS * (head_dim + 1);
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, head = blockIdx.y;
    const uint4 write = writes[blockIdx.x];
    const unsigned slot = write.y, rows = write.w;
    const Head<C> to(pages + write.x * block_stride, kv_heads, head_dim, block_size, head);

    for (unsigned first = 0; first < rows; first += TOKENS) {
        const unsigned count = min(TOKENS, rows - first);
        for (unsigned i = warp; i < count; i += warps) {
            const unsigned long long row = write.z + first + i;
            const float* const key = k + (row * kv_heads + head) * head_dim;
            const float* const value = v + (row * kv_heads + head) * head_dim;
            const float* const c = cos + row * pairs;
            const float* const s = sin + row * pairs;
            float* const turned = tile + i * (head_dim + 1);
            float inverse = 1.0f;
            if (weight) {
                float sum = 0.0f;
                for (unsigned d = lane; d < head_dim; d += 32) sum = fmaf(key[d], key[d], sum);
                inverse = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(head_dim) + eps);
            }
            const auto normed = [&](unsigned d) { return weight ? key[d] * inverse * weight[d] : key[d]; };
            for (unsigned p = lane; p < pairs; p += 32) {
                const float a = normed(p), b = normed(p + pairs);
                turned[p] = __fsub_rn(__fmul_rn(a, c[p]), __fmul_rn(b, s[p]));
                turned[p + pairs] = __fadd_rn(__fmul_rn(b, c[p]), __fmul_rn(a, s[p]));
            }
            for (unsigned d = 2 * pairs + lane; d < head_dim; d += 32) turned[d] = normed(d);
            __syncwarp();
            const float2 of_key = scale_of<C>(head_dim, [&](unsigned d) { return turned[d]; });
            const float2 of_value = scale_of<C>(head_dim, [&](unsigned d) { return value[d]; });
            if (lane == 0) {
                factors[i] = of_key.y;
                if (C::SCALED) {
                    to.key_scales[slot + first + i] = of_key.x;
                    to.value_scales[slot + first + i] = of_value.x;
                }
            }
            Stored* const out = to.values + static_cast<unsigned long long>(slot + first + i) * head_dim;
            for (unsigned d = lane; d < head_dim; d += 32) out[d] = C::store(value[d], of_value.y);
        }
        __syncthreads();
        // Neighbouring threads have neighbouring slots.
        for (unsigned at = threadIdx.x; at < count * head_dim; at += blockDim.x) {
            const unsigned d = at / count, i = at % count;
            to.keys[d * block_size + slot + first + i] = C::store(tile[i * (head_dim + 1) + d], factors[i]);
        }
        __syncthreads();
    }
    if (slot != 0) return;
    const unsigned rest = block_size - rows;
    for (unsigned at = threadIdx.x; at < rest * head_dim; at += blockDim.x) {
        to.keys[at / rest * block_size + rows + at % rest] = Stored(0);
        to.values[rows * head_dim + at] = Stored(0);
    }
    for (unsigned at = rows + threadIdx.x; C::SCALED && at < block_size; at += blockDim.x)
        to.key_scales[at] = to.value_scales[at] = 0.0f;
}

#define RIDGE_WRITE_KV(name, Type)                                                                                     \
    extern "C" __global__ void write_kv_##name(                                                                        \
        const uint4* writes, unsigned kv_heads, unsigned head_dim, unsigned block_size, unsigned pairs, float eps,     \
        const float* k, const float* v, const float* weight, const float* cos, const float* sin, unsigned char* pages, \
        unsigned long long block_stride) {                                                                             \
        write_kv<Type>(writes, kv_heads, head_dim, block_size, pairs, eps, k, v, weight, cos, sin, pages,              \
                       block_stride);                                                                                  \
    }
RIDGE_WRITE_KV(f32, KvF32)
RIDGE_WRITE_KV(f16, KvF16)
RIDGE_WRITE_KV(bf16, KvBF16)
RIDGE_WRITE_KV(fp8, KvFp8)
RIDGE_WRITE_KV(int8, KvInt8)

// Page `x` of a list: at base + index[x] * stride, or without an index the xth.
RIDGE_INLINE unsigned char* listed(unsigned char* base, unsigned long long stride, const unsigned* index) {
    return base + (index ? index[blockIdx.x] : blockIdx.x) * stride;
}

// Copies pages. Addresses and strides are multiples of 16. Grid: {pages, blocks along a page}.
extern "C" __global__ void copy_pages(unsigned long long bytes, unsigned char* from, unsigned long long from_stride,
                                      const unsigned* from_index, unsigned char* to, unsigned long long to_stride,
                                      const unsigned* to_index) {
    from = listed(from, from_stride, from_index);
    to = listed(to, to_stride, to_index);
    const unsigned long long words = bytes / 16, step = static_cast<unsigned long long>(gridDim.y) * blockDim.x;
    const unsigned long long mine = static_cast<unsigned long long>(blockIdx.y) * blockDim.x + threadIdx.x;
    for (unsigned long long i = mine; i < words; i += step)
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    if (mine < bytes % 16) to[words * 16 + mine] = from[words * 16 + mine];
}

// Consecutive tokens on their way from a page into a page of another shape, as ops/pages.rs writes them.
struct Move {
    unsigned from_block, from_slot, to_block, to_slot, tokens, unused[3];
};

template <class A, class B> struct Same { static constexpr bool VALUE = false; };
template <class A> struct Same<A, A> { static constexpr bool VALUE = true; };

// Moves the tokens of one head: as they are, or read in one type and written in another. Shared memory: two floats per token.
template <class From, class To>
__device__ void move_head(const Head<From>& from, const Head<To>& to, const Move& move, unsigned head_dim,
                          unsigned from_size, unsigned to_size) {
    RIDGE_DYNAMIC_SHARED(float, factors);
    const auto key_at = [&](unsigned d, unsigned i) { return from.keys + d * from_size + move.from_slot + i; };
    const auto value_at = [&](unsigned d, unsigned i) { return from.values + (move.from_slot + i) * head_dim + d; };
    if constexpr (To::SCALED) {
        for (unsigned i = threadIdx.x; i < move.tokens; i += blockDim.x) {
            if constexpr (From::SCALED) {
                to.key_scales[move.to_slot + i] = from.key_scales[move.from_slot + i];
                to.value_scales[move.to_slot + i] = from.value_scales[move.from_slot + i];
            } else {
                unsigned largest_key = 0, largest_value = 0;
                for (unsigned d = 0; d < head_dim; ++d) {
                    largest_key = max(largest_key, __float_as_uint(From::load(*key_at(d, i))) & 0x7fffffffu);
                    largest_value = max(largest_value, __float_as_uint(From::load(*value_at(d, i))) & 0x7fffffffu);
                }
                const float of_key = To::scale(largest_key), of_value = To::scale(largest_value);
                to.key_scales[move.to_slot + i] = of_key;
                to.value_scales[move.to_slot + i] = of_value;
                factors[2 * i] = To::factor(of_key);
                factors[2 * i + 1] = To::factor(of_value);
            }
        }
        __syncthreads();
    }
    const auto moved = [&](const typename From::Stored* element, unsigned i, unsigned side) {
        if constexpr (Same<From, To>::VALUE) return *element;
        else return To::store(From::load(*element), To::SCALED ? factors[2 * i + side] : 1.0f);
    };
    // Neighbouring threads have neighbouring tokens of a key, and neighbouring elements of a value.
    for (unsigned at = threadIdx.x; at < head_dim * move.tokens; at += blockDim.x) {
        const unsigned i = at % move.tokens, d = at / move.tokens;
        to.keys[d * to_size + move.to_slot + i] = moved(key_at(d, i), i, 0);
    }
    for (unsigned at = threadIdx.x; at < head_dim * move.tokens; at += blockDim.x) {
        const unsigned d = at % head_dim, i = at / head_dim;
        to.values[(move.to_slot + i) * head_dim + d] = moved(value_at(d, i), i, 1);
    }
}

// A block of threads per move and head. 8-bit types stay what they are.
template <class From>
__device__ void move_tokens(const Move* moves, unsigned kv_heads, unsigned head_dim, unsigned char* from,
                            unsigned long long from_stride, unsigned from_size, unsigned to_type, unsigned char* to,
                            unsigned long long to_stride, unsigned to_size) {
    const Move move = moves[blockIdx.x];
    const Head<From> source(from + move.from_block * from_stride, kv_heads, head_dim, from_size, blockIdx.y);
    const auto into = [&](auto type) {
        typedef decltype(type) To;
        const Head<To> target(to + move.to_block * to_stride, kv_heads, head_dim, to_size, blockIdx.y);
        move_head<From, To>(source, target, move, head_dim, from_size, to_size);
    };
    if constexpr (sizeof(typename From::Stored) == 1) into(From());
    else if (to_type == 0) into(KvF32());
    else if (to_type == 1) into(KvF16());
    else if (to_type == 2) into(KvBF16());
    else if (to_type == 3) into(KvFp8());
    else into(KvInt8());
}

#define RIDGE_MOVE(name, Type)                                                                                        \
    extern "C" __global__ void move_tokens_##name(const Move* moves, unsigned kv_heads, unsigned head_dim,            \
                                                  unsigned char* from, unsigned long long from_stride,                \
                                                  unsigned from_size, unsigned to_type, unsigned char* to,            \
                                                  unsigned long long to_stride, unsigned to_size) {                   \
        move_tokens<Type>(moves, kv_heads, head_dim, from, from_stride, from_size, to_type, to, to_stride, to_size);  \
    }
RIDGE_MOVE(f32, KvF32)
RIDGE_MOVE(f16, KvF16)
RIDGE_MOVE(bf16, KvBF16)
RIDGE_MOVE(fp8, KvFp8)
RIDGE_MOVE(int8, KvInt8)
