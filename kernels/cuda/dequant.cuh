// GGML's quantised blocks, read four elements at a time. Every block is integers and, for each group of elements, a scale and
// for some types a minimum: value = scale * (quant - ZERO) - minimum, where a quant is 0..127, or 0..255 if WIDE. Byte
// layouts are those of `ggml-quants.h`; the values are bit for bit those of `dequantize_row` in `src/quant/`.
//
// A format has
//   BLOCK, BYTES   elements and bytes of a block      GROUP     elements of a scale, 16 or 32
//   ZERO, WIDE     see above                          MINIMA    whether groups have a minimum
//   quad(block, sixteen, t)   quants of elements 16 sixteen + 4 t ... + 3, a byte each, the first lowest
//   scale(block, group), minimum(block, group)
#pragma once
#include "common.cuh"

namespace quant {

// Loads at the alignment that a block's length leaves.
RIDGE_INLINE unsigned load_1(const unsigned char* at) {
    return at[0] | at[1] << 8 | at[2] << 16 | static_cast<unsigned>(at[3]) << 24;
}
RIDGE_INLINE unsigned load_2(const unsigned char* at) {
    const unsigned short* halves = reinterpret_cast<const unsigned short*>(at);
    return halves[0] | static_cast<unsigned>(halves[1]) << 16;
}
RIDGE_INLINE unsigned load_4(const unsigned char* at) {
    return *reinterpret_cast<const unsigned*>(at);
}
RIDGE_INLINE float f16_at(const unsigned char* at) {
    return f16_to_f32(*reinterpret_cast<const unsigned short*>(at));
}

RIDGE_INLINE unsigned nibbles(unsigned bytes, unsigned high) {
    return bytes >> (4 * high) & 0x0f0f0f0fu;
}
// Four bits as the fifth bits of four bytes.
RIDGE_INLINE unsigned fifth_bits(unsigned bits) {
    return ((bits & 15u) * 0x00204081u & 0x01010101u) << 4;
}
// For each of four nibbles (a byte each) the byte of a table of 16.
RIDGE_INLINE unsigned look_up(unsigned nibbles, uint4 table) {
    const unsigned selector = (nibbles & 7u) | (nibbles >> 4 & 0x70u) | (nibbles >> 8 & 0x700u) | (nibbles >> 12 & 0x7000u);
    const unsigned low = __byte_perm(table.x, table.y, selector), high = __byte_perm(table.z, table.w, selector);
    // Bit 3 of a nibble chooses the half, spread over its byte.
    const unsigned upper = (nibbles >> 3 & 0x01010101u) * 255u;
    return (low & ~upper) | (high & upper);
}

struct NoMinimum {
    static constexpr bool MINIMA = false;
    static RIDGE_INLINE float minimum(const unsigned char*, unsigned) { return 0.0f; }
};
template <unsigned B>
struct Block32 {
    static constexpr unsigned BLOCK = 32, BYTES = B, GROUP = 32;
};
template <unsigned B, unsigned G>
struct Block256 {
    static constexpr unsigned BLOCK = 256, BYTES = B, GROUP = G;
};

// ---- blocks of 32 elements

struct Q4_0 : Block32<18>, NoMinimum {
    static constexpr unsigned ZERO = 8;
    static constexpr bool WIDE = false;
    static RIDGE_INLINE unsigned quad(const unsigned char* b, unsigned sixteen, unsigned t) {
        return nibbles(load_2(b + 2 + 4 * t), sixteen);
    }
    static RIDGE_INLINE float scale(const unsigned char* b, unsigned) { return f16_at(b); }
};

struct Q4_1 : Block32<20> {
    static constexpr unsigned ZERO = 0;
    static constexpr bool WIDE = false, MINIMA = true;
    static RIDGE_INLINE unsigned quad(const unsigned char* b, unsigned sixteen, unsigned t) {
        return nibbles(load_4(b + 4 + 4 * t), sixteen);
    }
    static RIDGE_INLINE float scale(const unsigned char* b, unsigned) { return f16_at(b); }
    static RIDGE_INLINE float minimum(const unsigned char* b, unsigned) { return -f16_at(b + 2); }
};

struct Q5_0 : Block32<22>, NoMinimum {
    static constexpr unsigned ZERO = 16;
    static constexpr bool WIDE = false;
    static RIDGE_INLINE unsigned quad(const unsigned char* b, unsigned sixteen, unsigned t) {
        return nibbles(load_2(b + 6 + 4 * t), sixteen) | fifth_bits(load_2(b + 2) >> (16 * sixteen + 4 * t));
    }
    static RIDGE_INLINE float scale(const unsigned char* b, unsigned) { return f16_at(b); }
};

struct Q5_1 : Block32<24> {
    static constexpr unsigned ZERO = 0;
    static constexpr bool WIDE = false, MINIMA = true;
    static RIDGE_INLINE unsigned quad(const unsigned char* b, unsigned sixteen, unsigned t) {
        return nibbles(load_4(b + 8 + 4 * t), sixteen) | fifth_bits(load_4(b + 4) >> (16 * sixteen + 4 * t));
    }
    static RIDGE_INLINE float scale(const unsigned char* b, unsigned) { return f16_at(b); }
    static RIDGE_INLINE float minimum(const unsigned char* b, unsigned) { return -f16_at(b + 2); }
};

struct Q8_0 : Block32<34>, NoMinimum {
    static constexpr unsigned ZERO = 128;
    static constexpr bool WIDE = true;
    static RIDGE_INLINE unsigned quad(const unsigned char* b, unsigned sixteen, unsigned t) {
        return load_2(b + 2 + 16 * sixteen + 4 * t) ^ 0x80808080u;
    }
    static RIDGE_INLINE float scale(const unsigned char* b, unsigned) { return f16_at(b); }
};

struct IQ4_NL : Block32<18>, NoMinimum {
    static constexpr unsigned ZERO = 128;
    static constexpr bool WIDE = true;
    static RIDGE_INLINE unsigned quad(const unsigned char* b, unsigned sixteen, unsigned t) {
        // `kvalues_iq4nl` plus 128: 1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241.
        const uint4 table = make_uint4(0x3f2d1801u, 0x766a5d4fu, 0xa6998d81u, 0xf1d9c5b5u);
        return look_up(nibbles(load_2(b + 2 + 4 * t), sixteen), table);
    }
    static RIDGE_INLINE float scale(const unsigned char* b, unsigned) { return f16_at(b); }
};

struct MXFP4 : Block32<17>, NoMinimum {
    static constexpr unsigned ZERO = 12;
    static constexpr bool WIDE = false;
    static RIDGE_INLINE unsigned quad(const unsigned char* b, unsigned sixteen, unsigned t) {
        // The e2m1 values, doubled, plus 12: 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0.
        const uint4 table = make_uint4(0x0f0e0d0cu, 0x18141210u, 0x090a0b0cu, 0x00040608u);
        return look_up(nibbles(load_1(b + 1 + 4 * t), sixteen), table);
    }
    // Half of 2^(e - 127), because the values are doubled; the two least are subnormal.
    static RIDGE_INLINE float scale(const unsigned char* b, unsigned) {
        const unsigned e = b[0];
        return __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    }
};

// ---- 64 elements in fp4 (e2m1) with an fp8 (e4m3) scale for each 16: four scales, then two elements per byte, the first in
// its low half. The values of NVIDIA's NVFP4, its scales beside its elements; a factor per row goes with them.

struct NVFP4 : NoMinimum {
    static constexpr unsigned BLOCK = 64, BYTES = 36, GROUP = 16, ZERO = 12;
    static constexpr bool WIDE = false;
    static RIDGE_INLINE unsigned quad(const unsigned char* b, unsigned sixteen, unsigned t) {
        const unsigned v = *reinterpret_cast<const unsigned short*>(b + 4 + 8 * sixteen + 2 * t);
        const unsigned spread = (v & 0x0fu) | (v & 0xf0u) << 4 | (v & 0xf00u) << 8 | (v & 0xf000u) << 12;
        return look_up(spread, make_uint4(0x0f0e0d0cu, 0x18141210u, 0x090a0b0cu, 0x00040608u));  // as MXFP4's
    }
    // Half, because the values are doubled.
    static RIDGE_INLINE float scale(const unsigned char* b, unsigned group) { return 0.5f * e4m3_to_f32(b[group]); }
};

// ---- blocks of 256 elements

struct Q2_K : Block256<84, 16> {
    static constexpr unsigned ZERO = 0;
    static constexpr bool WIDE = false, MINIMA = true;
    static RIDGE_INLINE unsigned quad(const unsigned char* b, unsigned sixteen, unsigned t) {
        const unsigned half = sixteen / 8, shift = sixteen % 8 / 2, part = sixteen % 2;
        return load_4(b + 16 + 32 * half + 16 * part + 4 * t) >> (2 * shift) & 0x03030303u;
    }
    static RIDGE_INLINE float scale(const unsigned char* b, unsigned group) {
        return __fmul_rn(f16_at(b + 80), static_cast<float>(b[group] & 15));
    }
    static RIDGE_INLINE float minimum(const unsigned char* b, unsigned group) {
        return __fmul_rn(f16_at(b + 82), static_cast<float>(b[group] >> 4));
    }
};

struct Q3_K : Block256<110, 16>, NoMinimum {
    static constexpr unsigned ZERO = 4;
    static constexpr bool WIDE = false;
    static RIDGE_INLINE unsigned quad(const unsigned char* b, unsigned sixteen, unsigned t) {
        const unsigned half = sixteen / 8, shift = sixteen % 8 / 2, part = sixteen % 2;
        const unsigned low = load_2(b + 32 + 32 * half + 16 * part + 4 * t) >> (2 * shift) & 0x03030303u;
        const unsigned high = load_2(b + 16 * part + 4 * t) >> (4 * half + shift) & 0x01010101u;
        return low | high << 2;
    }
    static RIDGE_INLINE float scale(const unsigned char* b, unsigned group) {
        const unsigned char* s = b + 96;
        const unsigned low = s[group % 8] >> (4 * (group / 8)) & 15, high = s[8 + group % 4] >> (2 * (group / 4)) & 3;
        return __fmul_rn(f16_at(b + 108), static_cast<float>(static_cast<int>(low | high << 4) - 32));
    }
};

// Six-bit scales (`which` 0) and minima (4) of the 8 groups of Q4_K and Q5_K, packed in 12 bytes.
RIDGE_INLINE unsigned six_bits(const unsigned char* s, unsigned group, unsigned which) {
    if (group < 4) return s[which + group] & 63;
    return (s[4 + group] >> which & 15) | (s[which + group - 4] >> 2 & 0x30);
}

template <unsigned B, unsigned QUANTS>
struct SixBitScales : Block256<B, 32> {
    static constexpr unsigned ZERO = 0;
    static constexpr bool WIDE = false, MINIMA = true;
    static RIDGE_INLINE unsigned low(const unsigned char* b, unsigned sixteen, unsigned t) {
        const unsigned group = sixteen / 2, part = sixteen % 2;
        return nibbles(load_4(b + QUANTS + 32 * (group / 2) + 16 * part + 4 * t), group % 2);
    }
    static RIDGE_INLINE float scale(const unsigned char* b, unsigned group) {
        return __fmul_rn(f16_at(b), static_cast<float>(six_bits(b + 4, group, 0)));
    }
    static RIDGE_INLINE float minimum(const unsigned char* b, unsigned group) {
        return __fmul_rn(f16_at(b + 2), static_cast<float>(six_bits(b + 4, group, 4)));
    }
};

struct Q4_K : SixBitScales<144, 16> {
    static RIDGE_INLINE unsigned quad(const unsigned char* b, unsigned sixteen, unsigned t) { return low(b, sixteen, t); }
};

struct Q5_K : SixBitScales<176, 48> {
    static RIDGE_INLINE unsigned quad(const unsigned char* b, unsigned sixteen, unsigned t) {
        const unsigned high = load_4(b + 16 + 16 * (sixteen % 2) + 4 * t) >> (sixteen / 2) & 0x01010101u;
        return low(b, sixteen, t) | high << 4;
    }
};

struct Q6_K : Block256<210, 16>, NoMinimum {
    static constexpr unsigned ZERO = 32;
    static constexpr bool WIDE = false;
    static RIDGE_INLINE unsigned quad(const unsigned char* b, unsigned sixteen, unsigned t) {
        const unsigned half = sixteen / 8, quarter = sixteen / 2 % 4, part = sixteen % 2;
        const unsigned low = nibbles(load_2(b + 64 * half + 32 * (quarter % 2) + 16 * part + 4 * t), quarter / 2);
        const unsigned high = load_2(b + 128 + 32 * half + 16 * part + 4 * t) >> (2 * quarter) & 0x03030303u;
        return low | high << 4;
    }
    static RIDGE_INLINE float scale(const unsigned char* b, unsigned group) {
        return __fmul_rn(f16_at(b + 208), static_cast<float>(static_cast<signed char>(b[192 + group])));
    }
};

// ---- quants as numbers

// Element `i` of a quad.
template <class Q>
RIDGE_INLINE float value(unsigned quad, unsigned i, float scale, float minimum) {
    const float quant = static_cast<float>(static_cast<int>(quad >> (8 * i) & 255u) - static_cast<int>(Q::ZERO));
    const float scaled = __fmul_rn(scale, quant);
    return Q::MINIMA ? __fsub_rn(scaled, minimum) : scaled;
}

// quant - ZERO of the four as two pairs of bf16, which is exact: none has more than eight significant bits.
template <class Q>
RIDGE_INLINE void to_bf16(unsigned quad, unsigned& first, unsigned& second) {
    if constexpr (Q::WIDE) {
        // 2^23 + q has q as its lowest byte; what is left after subtracting lies in the upper half of the f32.
        float f[4];
#pragma unroll
        for (unsigned i = 0; i < 4; ++i)
            f[i] = __uint_as_float(__byte_perm(quad, 0x4b000000u, 0x7650u | i)) - (8388608.0f + static_cast<float>(Q::ZERO));
        first = __byte_perm(__float_as_uint(f[0]), __float_as_uint(f[1]), 0x7632u);
        second = __byte_perm(__float_as_uint(f[2]), __float_as_uint(f[3]), 0x7632u);
    } else {
        // 0x4300 | q is 128 + q, and 0xc300 + z is -(128 + z).
        constexpr unsigned ONES = 0x3f803f80u, ZEROS = (0xc300u + Q::ZERO) * 0x10001u;
        first = bf16_pair_fma(__byte_perm(quad, 0x43434343u, 0x4140u), ONES, ZEROS);
        second = bf16_pair_fma(__byte_perm(quad, 0x43434343u, 0x4342u), ONES, ZEROS);
    }
}

}  // namespace quant
