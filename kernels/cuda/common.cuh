// Small floats and what else every kernel needs. No CUDA header is included anywhere: a machine with a driver and NVRTC
// has none. bf16 and f16 are kept as `unsigned short`, fp8 (e4m3) as `unsigned char`; pairs of 16-bit values as `unsigned`,
// the first in the low half.
#pragma once

#ifndef RIDGE_EMULATED
#define RIDGE_DYNAMIC_SHARED(type, name) extern __shared__ __align__(1024) type name[]
#endif

#define RIDGE_INLINE __device__ __forceinline__

constexpr unsigned FULL_WARP = 0xffffffffu;

// ---- bf16 and f16, rounded to nearest even

RIDGE_INLINE float bf16_to_f32(unsigned short value) {
    return __uint_as_float(static_cast<unsigned>(value) << 16);
}

RIDGE_INLINE unsigned short f32_to_bf16(float value) {
#ifdef RIDGE_EMULATED
    return emulate::bf16_from_f32(value);
#else
    unsigned short out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
    return out;
#endif
}

RIDGE_INLINE float f16_to_f32(unsigned short value) {
#ifdef RIDGE_EMULATED
    return emulate::f32_from_f16(value);
#else
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value));
    return out;
#endif
}

RIDGE_INLINE unsigned short f32_to_f16(float value) {
#ifdef RIDGE_EMULATED
    return emulate::f16_from_f32(value);
#else
    unsigned short out;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
    return out;
#endif
}

RIDGE_INLINE unsigned bf16_pair(float low, float high) {
#ifdef RIDGE_EMULATED
    return emulate::bf16_from_f32(low) | static_cast<unsigned>(emulate::bf16_from_f32(high)) << 16;
#else
    unsigned out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
#endif
}

RIDGE_INLINE unsigned f16_pair(float low, float high) {
#ifdef RIDGE_EMULATED
    return emulate::f16_from_f32(low) | static_cast<unsigned>(emulate::f16_from_f32(high)) << 16;
#else
    unsigned out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
#endif
}

// a * b + c of two bf16 values at once, each rounded once.
RIDGE_INLINE unsigned bf16_pair_fma(unsigned a, unsigned b, unsigned c) {
#ifdef RIDGE_EMULATED
    unsigned out = 0;
    for (int half = 0; half < 2; ++half) {
        const auto at = [half](unsigned pair) { return bf16_to_f32(static_cast<unsigned short>(pair >> (16 * half))); };
        out |= static_cast<unsigned>(emulate::bf16_from_f32(fmaf(at(a), at(b), at(c)))) << (16 * half);
    }
    return out;
#else
    unsigned out;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
#endif
}

// ---- fp8 e4m3 without an instruction for it, which devices before 8.9 do not have

// Sign, four bits of exponent, three of mantissa; all ones below the sign is NaN. As a binary16 shifted into place it is
// 2^8 too small, its subnormals included.
RIDGE_INLINE float e4m3_to_f32(unsigned char value) {
    const unsigned short half = static_cast<unsigned short>((value & 0x80) << 8 | (value & 0x7f) << 7);
    return (value & 0x7f) == 0x7f ? __uint_as_float(0x7fc00000) : f16_to_f32(half) * 256.0f;
}

// To nearest even; larger magnitudes, infinity too, become 448; NaN stays NaN.
RIDGE_INLINE unsigned char f32_to_e4m3(float value) {
    const unsigned bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu, sign = bits >> 24 & 0x80u;
    unsigned code;
    if (magnitude > 0x7f800000u) return 0x7f;
    if (magnitude >= 0x43e00000u) {
        code = 0x7e;  // 448
    } else if (magnitude < 0x3c800000u) {
        // Below 2^-6: a multiple of 2^-9. Adding 2^14, whose last bit is 2^-9, rounds; 8 of them are the least normal number.
        code = __float_as_uint(__fadd_rn(__uint_as_float(magnitude), 16384.0f)) - 0x46800000u;
    } else {
        const unsigned rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1);
        code = (rounded >> 20) - (120u << 3);
        if (code > 0x7e) code = 0x7e;
    }
    return static_cast<unsigned char>(sign | code);
}

// ---- element types as template arguments

struct F32 {
    using Stored = float;
    static RIDGE_INLINE float load(float value) { return value; }
    static RIDGE_INLINE float store(float value) { return value; }
};
struct F16 {
    using Stored = unsigned short;
    static constexpr bool IS_BF16 = false;
    static RIDGE_INLINE float load(unsigned short value) { return f16_to_f32(value); }
    static RIDGE_INLINE unsigned short store(float value) { return f32_to_f16(value); }
    static RIDGE_INLINE unsigned pair(float low, float high) { return f16_pair(low, high); }
};
struct BF16 {
    using Stored = unsigned short;
    static constexpr bool IS_BF16 = true;
    static RIDGE_INLINE float load(unsigned short value) { return bf16_to_f32(value); }
    static RIDGE_INLINE unsigned short store(float value) { return f32_to_bf16(value); }
    static RIDGE_INLINE unsigned pair(float low, float high) { return bf16_pair(low, high); }
};
struct E4M3 {
    using Stored = unsigned char;
    static RIDGE_INLINE float load(unsigned char value) { return e4m3_to_f32(value); }
    static RIDGE_INLINE unsigned char store(float value) { return f32_to_e4m3(value); }
};
