// Elements as pages hold them, to the same bits as on the CPU (kernels/src/kv/codec.rs), NaN included; and what kernels over
// rows, pages and caches share.
#pragma once
#include "common.cuh"

// Whether a number is NaN, whatever the compiler thinks of comparisons.
RIDGE_INLINE bool is_nan(float v) {
    return (__float_as_uint(v) & 0x7fffffffu) > 0x7f800000u;
}

RIDGE_INLINE float negative_infinity() {
    return __uint_as_float(0xff800000u);
}

// ---- elements of pages. `store` multiplies by a factor where there is a scale, `load` leaves the scale out.

struct KvF32 {
    using Stored = float;
    static constexpr bool SCALED = false;
    static RIDGE_INLINE float load(float v) { return v; }
    static RIDGE_INLINE float store(float v, float) { return v; }
};

struct KvF16 {
    using Stored = unsigned short;
    static constexpr bool SCALED = false;
    static RIDGE_INLINE float load(unsigned short h) { return f16_to_f32(h); }
    static RIDGE_INLINE unsigned short store(float v, float) {
        // The conversion has one NaN, pages keep the sign.
        return is_nan(v) ? static_cast<unsigned short>((__float_as_uint(v) >> 16 & 0x8000u) | 0x7e00u) : f32_to_f16(v);
    }
};

struct KvBF16 {
    using Stored = unsigned short;
    static constexpr bool SCALED = false;
    static RIDGE_INLINE float load(unsigned short h) { return bf16_to_f32(h); }
    static RIDGE_INLINE unsigned short store(float v, float) {
        // Pages keep what fits of a NaN.
        return is_nan(v) ? static_cast<unsigned short>(__float_as_uint(v) >> 16 | 64) : f32_to_bf16(v);
    }
};

struct KvFp8 {
    using Stored = unsigned char;
    static constexpr bool SCALED = false;
    static RIDGE_INLINE float load(unsigned char code) {
        const float magnitude = e4m3_to_f32(code & 0x7fu);
        return code & 0x80u ? -magnitude : magnitude;
    }
    static RIDGE_INLINE unsigned char store(float v, float) {
        return is_nan(v) ? static_cast<unsigned char>((__float_as_uint(v) >> 24 & 0x80u) | 0x7fu) : f32_to_e4m3(v);
    }
};

// 8-bit integers times a scale that is stored apart, one per token and head.
struct KvInt8 {
    using Stored = signed char;
    static constexpr bool SCALED = true;
    static RIDGE_INLINE float load(signed char code) { return static_cast<float>(code); }
    static RIDGE_INLINE signed char store(float v, float factor) {
        // A factor of 0 stands for a scale of 0 or NaN. Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
        const float scaled = factor > 0.0f ? __fmul_rn(v, factor) : 0.0f;
        return static_cast<signed char>(__float_as_uint(__fadd_rn(scaled, 12582912.0f)) & 0xffu);
    }
    // The scale for a vector whose largest magnitude has these bits (as integers, magnitudes sort as numbers do, infinity
    // above all and NaN above infinity).
    static RIDGE_INLINE float scale(unsigned largest_bits) {
        const float largest = __uint_as_float(largest_bits);
        if (largest_bits >= 0x7f800000u) return __uint_as_float(0x7fc00000u);
        return largest < 128.0f * 1.17549435e-38f ? 0.0f : __fdiv_rn(largest, 127.0f);
    }
    // What `store` multiplies by, given the scale.
    static RIDGE_INLINE float factor(float scale) { return scale > 0.0f ? __fdiv_rn(1.0f, scale) : 0.0f; }
};

// ---- sums and maxima over the lanes of a warp: every lane gets the same bits, in an order that is always the same

RIDGE_INLINE float warp_sum(float v) {
    for (int bits = 16; bits > 0; bits /= 2) v += __shfl_xor_sync(FULL_WARP, v, bits);
    return v;
}
RIDGE_INLINE float warp_max(float v) {
    for (int bits = 16; bits > 0; bits /= 2) v = fmaxf(v, __shfl_xor_sync(FULL_WARP, v, bits));
    return v;
}
RIDGE_INLINE unsigned warp_max(unsigned v) {
    for (int bits = 16; bits > 0; bits /= 2) v = max(v, __shfl_xor_sync(FULL_WARP, v, bits));
    return v;
}

// 1 / sqrt(mean(x^2) + eps) of one row, by all threads of a block of at most 1024. `partial` holds a float per warp.
RIDGE_INLINE float inverse_rms(unsigned width, float eps, const float* x, float* partial) {
    const unsigned warps = blockDim.x / 32;
    float sum = 0.0f;
    for (unsigned i = threadIdx.x; i < width; i += blockDim.x) sum = fmaf(x[i], x[i], sum);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.0f;
    for (unsigned warp = 0; warp < warps; ++warp) sum += partial[warp];
    return 1.0f / sqrtf(sum / static_cast<float>(width) + eps);
}

// ---- outputs whose type is known when the kernel runs: the numbers that ops/mod.rs gives the types

constexpr unsigned AS_F32 = 0, AS_F16 = 1;

RIDGE_INLINE void store_as(unsigned type, void* out, unsigned long long index, float v) {
    if (type == AS_F32) static_cast<float*>(out)[index] = v;
    else static_cast<unsigned short*>(out)[index] = type == AS_F16 ? f32_to_f16(v) : f32_to_bf16(v);
}

// Two neighbours, from an even index on.
RIDGE_INLINE void store_pair_as(unsigned type, void* out, unsigned long long index, float a, float b) {
    if (type == AS_F32) *reinterpret_cast<float2*>(static_cast<float*>(out) + index) = make_float2(a, b);
    else static_cast<unsigned*>(out)[index / 2] = type == AS_F16 ? f16_pair(a, b) : bf16_pair(a, b);
}
