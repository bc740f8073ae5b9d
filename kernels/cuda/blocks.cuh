// GGML's quantised blocks as files have them, for the kernel that takes them apart into planes (planes.cuh). Byte layouts are
// those of `ggml-quants.h`.
//
// A type has
//   BYTES          of a block
//   HEAD, TAIL     where a block's scales lie: first byte and number of bytes
//   codes(block, sixteen, t)   elements 16 sixteen + 4 t ... + 3 as they are coded, a byte each, the first lowest
#pragma once
#include "common.cuh"

namespace blocks {

struct Bytes {
    unsigned first, count;
};

// Four bytes, wherever they lie.
RIDGE_INLINE unsigned word(const unsigned char* at) {
    return at[0] | at[1] << 8 | at[2] << 16 | static_cast<unsigned>(at[3]) << 24;
}
RIDGE_INLINE unsigned nibbles(unsigned bytes, unsigned high) {
    return bytes >> (4 * high) & 0x0f0f0f0fu;
}
// Four bits as the fifth bits of four bytes.
RIDGE_INLINE unsigned fifth_bits(unsigned bits) {
    return ((bits & 15u) * 0x00204081u & 0x01010101u) << 4;
}

// ---- blocks of 32 elements: scales, perhaps fifth bits, four bits per element

template <unsigned SCALES, unsigned FIFTHS>
struct Nibbles32 {
    static constexpr unsigned BYTES = SCALES + FIFTHS + 16;
    static constexpr Bytes HEAD = {0, SCALES}, TAIL = {0, 0};
    static RIDGE_INLINE unsigned codes(const unsigned char* b, unsigned sixteen, unsigned t) {
        const unsigned low = nibbles(word(b + SCALES + FIFTHS + 4 * t), sixteen);
        if constexpr (FIFTHS == 0) return low;
        else return low | fifth_bits(word(b + SCALES) >> (16 * sixteen + 4 * t));
    }
};
struct Q4_0 : Nibbles32<2, 0> {};
struct Q4_1 : Nibbles32<4, 0> {};
struct Q5_0 : Nibbles32<2, 4> {};
struct Q5_1 : Nibbles32<4, 4> {};
struct IQ4_NL : Nibbles32<2, 0> {};
struct MXFP4 : Nibbles32<1, 0> {};

struct Q8_0 {
    static constexpr unsigned BYTES = 34;
    static constexpr Bytes HEAD = {0, 2}, TAIL = {0, 0};
    // Plus 128.
    static RIDGE_INLINE unsigned codes(const unsigned char* b, unsigned sixteen, unsigned t) {
        return word(b + 2 + 16 * sixteen + 4 * t) ^ 0x80808080u;
    }
};

// ---- 64 elements in fp4 (e2m1) with an fp8 (e4m3) scale for each 16: four scales, then two elements per byte, the first in its
// low half. NVIDIA's NVFP4, its scales beside its elements.

struct NVFP4 {
    static constexpr unsigned BYTES = 36;
    static constexpr Bytes HEAD = {0, 4}, TAIL = {0, 0};
    static RIDGE_INLINE unsigned codes(const unsigned char* b, unsigned sixteen, unsigned t) {
        const unsigned char* at = b + 4 + 8 * sixteen + 2 * t;
        return (at[0] & 15u) | (at[0] & 0xf0u) << 4 | (at[1] & 15u) << 16 | (at[1] & 0xf0u) << 20;
    }
};

// ---- blocks of 256 elements

struct Q2_K {
    static constexpr unsigned BYTES = 84;
    static constexpr Bytes HEAD = {0, 16}, TAIL = {80, 4};
    static RIDGE_INLINE unsigned codes(const unsigned char* b, unsigned sixteen, unsigned t) {
        const unsigned half = sixteen / 8, shift = sixteen % 8 / 2, part = sixteen % 2;
        return word(b + 16 + 32 * half + 16 * part + 4 * t) >> (2 * shift) & 0x03030303u;
    }
};

struct Q3_K {
    static constexpr unsigned BYTES = 110;
    static constexpr Bytes HEAD = {96, 14}, TAIL = {0, 0};
    static RIDGE_INLINE unsigned codes(const unsigned char* b, unsigned sixteen, unsigned t) {
        const unsigned half = sixteen / 8, shift = sixteen % 8 / 2, part = sixteen % 2;
        const unsigned low = word(b + 32 + 32 * half + 16 * part + 4 * t) >> (2 * shift) & 0x03030303u;
        const unsigned high = word(b + 16 * part + 4 * t) >> (4 * half + shift) & 0x01010101u;
        return low | high << 2;
    }
};

template <unsigned QUANTS>
struct SixBitScales {
    static constexpr Bytes HEAD = {0, 16}, TAIL = {0, 0};
    static RIDGE_INLINE unsigned low(const unsigned char* b, unsigned sixteen, unsigned t) {
        const unsigned group = sixteen / 2, part = sixteen % 2;
        return nibbles(word(b + QUANTS + 32 * (group / 2) + 16 * part + 4 * t), group % 2);
    }
};
struct Q4_K : SixBitScales<16> {
    static constexpr unsigned BYTES = 144;
    static RIDGE_INLINE unsigned codes(const unsigned char* b, unsigned sixteen, unsigned t) { return low(b, sixteen, t); }
};
struct Q5_K : SixBitScales<48> {
    static constexpr unsigned BYTES = 176;
    static RIDGE_INLINE unsigned codes(const unsigned char* b, unsigned sixteen, unsigned t) {
        const unsigned high = word(b + 16 + 16 * (sixteen % 2) + 4 * t) >> (sixteen / 2) & 0x01010101u;
        return low(b, sixteen, t) | high << 4;
    }
};

struct Q6_K {
    static constexpr unsigned BYTES = 210;
    static constexpr Bytes HEAD = {192, 16}, TAIL = {208, 2};
    static RIDGE_INLINE unsigned codes(const unsigned char* b, unsigned sixteen, unsigned t) {
        const unsigned half = sixteen / 8, quarter = sixteen / 2 % 4, part = sixteen % 2;
        const unsigned low = nibbles(word(b + 64 * half + 32 * (quarter % 2) + 16 * part + 4 * t), quarter / 2);
        const unsigned high = word(b + 128 + 32 * half + 16 * part + 4 * t) >> (2 * quarter) & 0x03030303u;
        return low | high << 4;
    }
};

}  // namespace blocks
