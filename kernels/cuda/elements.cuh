// The types that numbers are stored in, between device memory and f32 registers: to the same bits as the CPU's pages
// (kernels/src/kv/codec.rs), NaN included. No header of CUDA's is needed.
#pragma once

#ifndef RIDGE_EMULATED
#ifndef RIDGE_DYNAMIC_SHARED
#define RIDGE_DYNAMIC_SHARED(type, name) extern __shared__ __align__(128) type name[]
#endif
#endif

namespace elements {

constexpr unsigned ALL_LANES = 0xffffffffu;

// Whether a number is NaN, whatever the compiler thinks of comparisons.
__device__ __forceinline__ bool is_nan(float v) {
    return (__float_as_uint(v) & 0x7fffffffu) > 0x7f800000u;
}

__device__ __forceinline__ float negative_infinity() {
    return __uint_as_float(0xff800000u);
}

struct F32 {
    typedef float Stored;
    static constexpr bool SCALED = false;
    static __device__ __forceinline__ float load(float v) { return v; }
    static __device__ __forceinline__ float store(float v, float = 1.0f) { return v; }
};

struct F16 {
    typedef unsigned short Stored;
    static constexpr bool SCALED = false;
    static __device__ __forceinline__ float load(unsigned short h) {
#ifdef RIDGE_EMULATED
        return emulate::f32_from_f16(h);
#else
        float v;
        asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(h));
        return v;
#endif
    }
    // To nearest even; too large becomes infinity.
    static __device__ __forceinline__ unsigned short store(float v, float = 1.0f) {
        // The conversion has one NaN, pages keep the sign.
        if (is_nan(v)) return static_cast<unsigned short>((__float_as_uint(v) >> 16 & 0x8000u) | 0x7e00u);
#ifdef RIDGE_EMULATED
        return emulate::f16_from_f32(v);
#else
        unsigned short h;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
        return h;
#endif
    }
    // Two numbers in one word, the first in its lower half; NaN becomes another NaN.
    static __device__ __forceinline__ unsigned pack(float low, float high) {
#ifdef RIDGE_EMULATED
        return emulate::f16_from_f32(low) | static_cast<unsigned>(emulate::f16_from_f32(high)) << 16;
#else
        unsigned both;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
        return both;
#endif
    }
};

struct BF16 {
    typedef unsigned short Stored;
    static constexpr bool SCALED = false;
    static __device__ __forceinline__ float load(unsigned short h) {
        return __uint_as_float(static_cast<unsigned>(h) << 16);
    }
    // To nearest even.
    static __device__ __forceinline__ unsigned short store(float v, float = 1.0f) {
        const unsigned bits = __float_as_uint(v);
        const unsigned rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
        return static_cast<unsigned short>(is_nan(v) ? bits >> 16 | 64 : rounded);
    }
    // Two numbers in one word, the first in its lower half; NaN becomes another NaN.
    static __device__ __forceinline__ unsigned pack(float low, float high) {
#ifdef RIDGE_EMULATED
        return emulate::bf16_from_f32(low) | static_cast<unsigned>(emulate::bf16_from_f32(high)) << 16;
#else
        unsigned both;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
        return both;
#endif
    }
};

// OCP E4M3 without a scale; too large becomes 448, NaN stays NaN.
struct Fp8 {
    typedef unsigned char Stored;
    static constexpr bool SCALED = false;
    static __device__ __forceinline__ float load(unsigned char code) {
        // As an f32 the fields mean the same with another bias; its subnormals are E4M3's.
        const float magnitude = __uint_as_float((code & 0x7fu) << 20) * __uint_as_float((127u + 120u) << 23);
        const unsigned sign = (code & 0x80u) << 24;
        const unsigned bits = (code & 0x7fu) == 0x7fu ? 0x7fc00000u : __float_as_uint(magnitude);
        return __uint_as_float(sign | bits);
    }
    static __device__ __forceinline__ unsigned char store(float v, float = 1.0f) {
        const unsigned bits = __float_as_uint(v), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
        const unsigned rounded = (magnitude + 0x7ffffu + (magnitude >> 20 & 1)) >> 20;
        const unsigned normal = min(rounded - ((127u - 7u) << 3), 0x7eu);
        // Below 2^-6 the codes are multiples of 2^-9, which adding 1.5 * 2^23 rounds to.
        const float shifted = __fadd_rn(__fmul_rn(__uint_as_float(magnitude), 512.0f), 12582912.0f);
        const unsigned subnormal = __float_as_uint(shifted) & 0xffu;
        const unsigned code = magnitude < (127u - 6u) << 23 ? subnormal : normal;
        return static_cast<unsigned char>(sign | (magnitude > 0x7f800000u ? 0x7fu : code));
    }
};

// 8-bit integers times a scale that is stored apart, one per token and head. `load` leaves the scale out.
struct Int8 {
    typedef signed char Stored;
    static constexpr bool SCALED = true;
    static __device__ __forceinline__ float load(signed char code) { return static_cast<float>(code); }
    static __device__ __forceinline__ signed char store(float v, float factor) {
        // A factor of 0 stands for a scale of 0 or NaN. Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
        const float scaled = factor > 0.0f ? __fmul_rn(v, factor) : 0.0f;
        return static_cast<signed char>(__float_as_uint(__fadd_rn(scaled, 12582912.0f)) & 0xffu);
    }
    // The scale for a vector whose largest magnitude has these bits (as integers, magnitudes sort as numbers do, infinity
    // above all and NaN above infinity).
    static __device__ __forceinline__ float scale(unsigned largest_bits) {
        const float largest = __uint_as_float(largest_bits);
        if (largest_bits >= 0x7f800000u) return __uint_as_float(0x7fc00000u);
        return largest < 128.0f * 1.17549435e-38f ? 0.0f : __fdiv_rn(largest, 127.0f);
    }
    // What `store` multiplies by, given the scale.
    static __device__ __forceinline__ float factor(float scale) {
        return scale > 0.0f ? __fdiv_rn(1.0f, scale) : 0.0f;
    }
};

// Sums and maxima over the lanes of a warp; every lane gets the same bits, in an order that is always the same.
__device__ __forceinline__ float warp_sum(float v) {
    for (int bits = 16; bits > 0; bits /= 2) v += __shfl_xor_sync(ALL_LANES, v, bits);
    return v;
}
__device__ __forceinline__ float warp_max(float v) {
    for (int bits = 16; bits > 0; bits /= 2) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, bits));
    return v;
}
__device__ __forceinline__ unsigned warp_max(unsigned v) {
    for (int bits = 16; bits > 0; bits /= 2) v = max(v, __shfl_xor_sync(ALL_LANES, v, bits));
    return v;
}

// The types that an output may have at run time: the numbers that ops/mod.rs gives them.
constexpr unsigned AS_F32 = 0, AS_F16 = 1, AS_BF16 = 2;

__device__ __forceinline__ void store_as(unsigned type, void* out, unsigned long long index, float v) {
    if (type == AS_F32) static_cast<float*>(out)[index] = v;
    else if (type == AS_F16) static_cast<unsigned short*>(out)[index] = F16::store(v);
    else static_cast<unsigned short*>(out)[index] = BF16::store(v);
}

// Two neighbours, from an even index on.
__device__ __forceinline__ void store_pair_as(unsigned type, void* out, unsigned long long index, float a, float b) {
    if (type == AS_F32) *reinterpret_cast<float2*>(static_cast<float*>(out) + index) = make_float2(a, b);
    else static_cast<unsigned*>(out)[index / 2] = type == AS_F16 ? F16::pack(a, b) : BF16::pack(a, b);
}

}  // namespace elements
