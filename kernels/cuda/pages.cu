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

// What a key and a value are multiplied by in a slot; 1 without scales.
template <class C>
RIDGE_INLINE float scale_at(const float* scales, unsigned slot) {
    if constexpr (C::SCALED) return scales[slot];
    else return 1.0f;
}

// Reads pages of one type and writes them in another. A block of threads per page and head; shared memory: two floats per
// slot.
template <class From, class To>
__device__ void convert_head(const Head<From>& from, const Head<To>& to, unsigned head_dim, unsigned block_size) {
    RIDGE_DYNAMIC_SHARED(float, factors);
    const auto key = [&](unsigned d, unsigned slot) {
        return From::load(from.keys[d * block_size + slot]) * scale_at<From>(from.key_scales, slot);
    };
    const auto value = [&](unsigned d, unsigned slot) {
        return From::load(from.values[slot * head_dim + d]) * scale_at<From>(from.value_scales, slot);
    };
    if constexpr (To::SCALED) {
        for (unsigned slot = threadIdx.x; slot < block_size; slot += blockDim.x) {
            unsigned largest_key = 0, largest_value = 0;
            for (unsigned d = 0; d < head_dim; ++d) {
                largest_key = max(largest_key, __float_as_uint(key(d, slot)) & 0x7fffffffu);
                largest_value = max(largest_value, __float_as_uint(value(d, slot)) & 0x7fffffffu);
            }
            const float of_key = To::scale(largest_key), of_value = To::scale(largest_value);
            to.key_scales[slot] = of_key;
            to.value_scales[slot] = of_value;
            factors[2 * slot] = To::factor(of_key);
            factors[2 * slot + 1] = To::factor(of_value);
        }
        __syncthreads();
    }
    for (unsigned at = threadIdx.x; at < head_dim * block_size; at += blockDim.x) {
        const unsigned key_slot = at % block_size, value_slot = at / head_dim;
        const float key_factor = To::SCALED ? factors[2 * key_slot] : 1.0f;
        const float value_factor = To::SCALED ? factors[2 * value_slot + 1] : 1.0f;
        to.keys[at] = To::store(key(at / block_size, key_slot), key_factor);
        to.values[at] = To::store(value(at % head_dim, value_slot), value_factor);
    }
}

template <class From>
__device__ void convert_from(unsigned to_type, unsigned char* from, unsigned char* to, unsigned kv_heads,
                             unsigned head_dim, unsigned block_size) {
    const Head<From> source(from, kv_heads, head_dim, block_size, blockIdx.y);
    const auto into = [&](auto type) {
        typedef decltype(type) To;
        convert_head<From, To>(source, Head<To>(to, kv_heads, head_dim, block_size, blockIdx.y), head_dim, block_size);
    };
    if (to_type == 0) into(KvF32());
    else if (to_type == 1) into(KvF16());
    else if (to_type == 2) into(KvBF16());
    else if (to_type == 3) into(KvFp8());
    else into(KvInt8());
}

#define RIDGE_CONVERT(name, Type)                                                                                     \
    extern "C" __global__ void convert_pages_##name(                                                                  \
        unsigned kv_heads, unsigned head_dim, unsigned block_size, unsigned char* from,                               \
        unsigned long long from_stride, const unsigned* from_index, unsigned to_type, unsigned char* to,              \
        unsigned long long to_stride, const unsigned* to_index) {                                                     \
        convert_from<Type>(to_type, listed(from, from_stride, from_index), listed(to, to_stride, to_index), kv_heads, \
                           head_dim, block_size);                                                                     \
    }
RIDGE_CONVERT(f32, KvF32)
RIDGE_CONVERT(f16, KvF16)
RIDGE_CONVERT(bf16, KvBF16)
RIDGE_CONVERT(fp8, KvFp8)
RIDGE_CONVERT(int8, KvInt8)
