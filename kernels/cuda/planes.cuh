// Quantised matrices as they lie on a device: GGML's blocks taken apart, so that every access is aligned and as wide as can be.
// `src/cuda/planes.rs` has the same layout in Rust, pack.cu makes it of a file's blocks.
//
// value = scale * (quant - ZERO) - minimum, where scales and minima are those of a group of elements and a quant is 0..127, or
// 0..255 if WIDE. Values are bit for bit those of `dequantize_row` in `src/quant/`.
//
// A row is cut into steps of a block of 256 elements, or of 128 as four blocks of 32 or two of 64; the last step is filled up with
// zeros. A matrix [n, k] is up to four planes, one behind the other; in each of them the rows follow each other, and in a row its
// steps:
//   low    LOW bits of each element's code: 8, 4 or 2
//   high   HIGH bits above those: 0, 1 or 2
//   head   HEAD bytes of scales per step
//   tail   TAIL more of them
// The codes of 128 elements are a unit, which four lanes share: lane t has elements 16 s + 4 t ... + 3 of every sixteen s. With B
// bits, a lane's codes are B words; word w holds sixteens 8 / B * w ... in turn, B bits of each in each of its four bytes. So a
// lane reads all of its unit at once, and shifting a word leaves four codes in four bytes. A lane's words lie together, four at
// most: of eight, the first four of every lane come before the last.
#pragma once
#include "common.cuh"

namespace quant {

constexpr unsigned UNIT = 128;

template <unsigned B, unsigned G, unsigned L, unsigned H, unsigned HEAD_BYTES, unsigned TAIL_BYTES>
struct Format {
    static constexpr unsigned BLOCK = B, GROUP = G, LOW = L, HIGH = H, HEAD = HEAD_BYTES, TAIL = TAIL_BYTES;
    static constexpr unsigned STEP = B > UNIT ? B : UNIT, PARTS = STEP / UNIT;
    static constexpr bool MINIMA = false, WIDE = false;
    static RIDGE_INLINE unsigned quants(unsigned codes) { return codes; }
};

// A format also has
//   ZERO                        see above
//   quants(codes)               of four codes
//   Factors, factors(head, tail, part)   what the scales of a step's unit are made of, read from memory
//   scale(factors, group), minimum(factors, group)   of a unit's group

RIDGE_INLINE unsigned word_at(const unsigned char* at) {
    return __ldg(reinterpret_cast<const unsigned*>(at));
}
RIDGE_INLINE uint2 pair_at(const unsigned char* at) {
    return __ldg(reinterpret_cast<const uint2*>(at));
}
RIDGE_INLINE uint4 four_at(const unsigned char* at) {
    return __ldg(reinterpret_cast<const uint4*>(at));
}
RIDGE_INLINE float low_half(unsigned word) {
    return f16_to_f32(static_cast<unsigned short>(word));
}
RIDGE_INLINE float high_half(unsigned word) {
    return f16_to_f32(static_cast<unsigned short>(word >> 16));
}
RIDGE_INLINE unsigned byte_of(uint2 words, unsigned i) {
    return (i < 4 ? words.x : words.y) >> (8 * (i % 4)) & 255u;
}

// For each of four nibbles (a byte each) the byte of a table of 16.
RIDGE_INLINE unsigned look_up(unsigned nibbles, uint4 table) {
    const unsigned selector = (nibbles & 7u) | (nibbles >> 4 & 0x70u) | (nibbles >> 8 & 0x700u) | (nibbles >> 12 & 0x7000u);
    const unsigned low = __byte_perm(table.x, table.y, selector), high = __byte_perm(table.z, table.w, selector);
    // Bit 3 of a nibble chooses the half, spread over its byte.
    const unsigned upper = (nibbles >> 3 & 0x01010101u) * 255u;
    return (low & ~upper) | (high & upper);
}
// The e2m1 values, doubled, plus 12: 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0.
RIDGE_INLINE unsigned e2m1(unsigned nibbles) {
    return look_up(nibbles, make_uint4(0x0f0e0d0cu, 0x18141210u, 0x090a0b0cu, 0x00040608u));
}

struct NoMinimum {
    template <class Factors>
    static RIDGE_INLINE float minimum(const Factors&, unsigned) { return 0.0f; }
};

// An f16 scale for each 32 elements.
template <unsigned L, unsigned H, unsigned Z>
struct Halves : Format<32, 32, L, H, 8, 0>, NoMinimum {
    static constexpr unsigned ZERO = Z;
    typedef uint2 Factors;
    static RIDGE_INLINE Factors factors(const unsigned char* head, const unsigned char*, unsigned) { return pair_at(head); }
    static RIDGE_INLINE float scale(const Factors& f, unsigned group) {
        const unsigned both = group < 2 ? f.x : f.y;
        return group % 2 ? high_half(both) : low_half(both);
    }
};
struct Q4_0 : Halves<4, 0, 8> {};
struct Q5_0 : Halves<4, 1, 16> {};
struct Q8_0 : Halves<8, 0, 128> {
    static constexpr bool WIDE = true;
};
struct IQ4_NL : Halves<4, 0, 128> {
    static constexpr bool WIDE = true;
    static RIDGE_INLINE unsigned quants(unsigned codes) {
        // `kvalues_iq4nl` plus 128: 1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241.
        return look_up(codes, make_uint4(0x3f2d1801u, 0x766a5d4fu, 0xa6998d81u, 0xf1d9c5b5u));
    }
};

// An f16 scale and an f16 sum's negative minimum for each 32 elements.
template <unsigned H>
struct HalvesAndMinima : Format<32, 32, 4, H, 16, 0> {
    static constexpr unsigned ZERO = 0;
    static constexpr bool MINIMA = true;
    typedef uint4 Factors;
    static RIDGE_INLINE Factors factors(const unsigned char* head, const unsigned char*, unsigned) { return four_at(head); }
    static RIDGE_INLINE unsigned both(const Factors& f, unsigned group) {
        return group == 0 ? f.x : group == 1 ? f.y : group == 2 ? f.z : f.w;
    }
    static RIDGE_INLINE float scale(const Factors& f, unsigned group) { return low_half(both(f, group)); }
    static RIDGE_INLINE float minimum(const Factors& f, unsigned group) { return -high_half(both(f, group)); }
};
struct Q4_1 : HalvesAndMinima<0> {};
struct Q5_1 : HalvesAndMinima<1> {};

struct MXFP4 : Format<32, 32, 4, 0, 4, 0>, NoMinimum {
    static constexpr unsigned ZERO = 12;
    static RIDGE_INLINE unsigned quants(unsigned codes) { return e2m1(codes); }
    typedef unsigned Factors;
    static RIDGE_INLINE Factors factors(const unsigned char* head, const unsigned char*, unsigned) { return word_at(head); }
    // Half of 2^(e - 127), because the values are doubled; the two least are subnormal.
    static RIDGE_INLINE float scale(const Factors& f, unsigned group) {
        const unsigned e = f >> (8 * group) & 255u;
        return __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    }
};

// fp4 (e2m1) with an fp8 (e4m3) scale for each 16 elements; a factor per row goes with them.
struct NVFP4 : Format<64, 16, 4, 0, 8, 0>, NoMinimum {
    static constexpr unsigned ZERO = 12;
    static RIDGE_INLINE unsigned quants(unsigned codes) { return e2m1(codes); }
    typedef uint2 Factors;
    static RIDGE_INLINE Factors factors(const unsigned char* head, const unsigned char*, unsigned) { return pair_at(head); }
    // Half, because the values are doubled.
    static RIDGE_INLINE float scale(const Factors& f, unsigned group) {
        return 0.5f * e4m3_to_f32(static_cast<unsigned char>(byte_of(f, group)));
    }
};

// ---- blocks of 256 elements, two units each

struct Q2_K : Format<256, 16, 2, 0, 16, 4> {
    static constexpr unsigned ZERO = 0;
    static constexpr bool MINIMA = true;
    struct Factors {
        uint2 both;
        float d, dmin;
    };
    static RIDGE_INLINE Factors factors(const unsigned char* head, const unsigned char* tail, unsigned part) {
        const unsigned of_block = word_at(tail);
        return {pair_at(head + 8 * part), low_half(of_block), high_half(of_block)};
    }
    static RIDGE_INLINE float scale(const Factors& f, unsigned group) {
        return __fmul_rn(f.d, static_cast<float>(byte_of(f.both, group) & 15));
    }
    static RIDGE_INLINE float minimum(const Factors& f, unsigned group) {
        return __fmul_rn(f.dmin, static_cast<float>(byte_of(f.both, group) >> 4));
    }
};

struct Q3_K : Format<256, 16, 2, 1, 16, 0>, NoMinimum {
    static constexpr unsigned ZERO = 4;
    struct Factors {
        uint2 scales;
        float d;
    };
    static RIDGE_INLINE Factors factors(const unsigned char* head, const unsigned char*, unsigned part) {
        // Eight bytes of low halves, of the first unit's scales in their low nibbles; and four of two bits for every fourth.
        const uint4 h = four_at(head);
        const auto scales = [&](unsigned low, unsigned shift) {
            return (low >> (4 * part) & 0x0f0f0f0fu) | (h.z >> (4 * part + shift) & 0x03030303u) << 4;
        };
        return {make_uint2(scales(h.x, 0), scales(h.y, 2)), low_half(h.w)};
    }
    static RIDGE_INLINE float scale(const Factors& f, unsigned group) {
        return __fmul_rn(f.d, static_cast<float>(static_cast<int>(byte_of(f.scales, group)) - 32));
    }
};

// Six-bit scales and minima of a block's eight groups, packed in 12 bytes.
template <unsigned H>
struct SixBits : Format<256, 32, 4, H, 16, 0> {
    static constexpr unsigned ZERO = 0;
    static constexpr bool MINIMA = true;
    struct Factors {
        unsigned scales, minima;
        float d, dmin;
    };
    static RIDGE_INLINE Factors factors(const unsigned char* head, const unsigned char*, unsigned part) {
        const uint4 h = four_at(head);
        // The first four of both lie in the first bytes; of the last four the low halves are at the end, and the high bits above
        // the first four.
        const unsigned scales = part == 0 ? h.y & 0x3f3f3f3fu : (h.w & 0x0f0f0f0fu) | (h.y >> 2 & 0x30303030u);
        const unsigned minima = part == 0 ? h.z & 0x3f3f3f3fu : (h.w >> 4 & 0x0f0f0f0fu) | (h.z >> 2 & 0x30303030u);
        return {scales, minima, low_half(h.x), high_half(h.x)};
    }
    static RIDGE_INLINE float scale(const Factors& f, unsigned group) {
        return __fmul_rn(f.d, static_cast<float>(f.scales >> (8 * group) & 255u));
    }
    static RIDGE_INLINE float minimum(const Factors& f, unsigned group) {
        return __fmul_rn(f.dmin, static_cast<float>(f.minima >> (8 * group) & 255u));
    }
};
struct Q4_K : SixBits<0> {};
struct Q5_K : SixBits<1> {};

struct Q6_K : Format<256, 16, 4, 2, 16, 2>, NoMinimum {
    static constexpr unsigned ZERO = 32;
    struct Factors {
        uint2 scales;
        float d;
    };
    static RIDGE_INLINE Factors factors(const unsigned char* head, const unsigned char* tail, unsigned part) {
        return {pair_at(head + 8 * part), f16_to_f32(__ldg(reinterpret_cast<const unsigned short*>(tail)))};
    }
    static RIDGE_INLINE float scale(const Factors& f, unsigned group) {
        return __fmul_rn(f.d, static_cast<float>(static_cast<signed char>(byte_of(f.scales, group))));
    }
};

// ---- planes

// The bits of sixteen `s` of a unit, of a lane's words.
template <unsigned BITS>
RIDGE_INLINE unsigned field(unsigned word, unsigned s) {
    constexpr unsigned PER_WORD = 8 / BITS, MASK = 0xffu >> (8 - BITS);
    return word >> (s % PER_WORD * BITS) & MASK * 0x01010101u;
}

// A lane's part of a unit.
template <class Q>
struct Lane {
    unsigned low[Q::LOW], high[Q::HIGH == 0 ? 1 : Q::HIGH];
    typename Q::Factors factors;

    // Quants of the four elements of sixteen `s`, a byte each.
    RIDGE_INLINE unsigned quad(unsigned s) const {
        unsigned codes = field<Q::LOW>(low[s * Q::LOW / 8], s);
        if constexpr (Q::HIGH != 0) codes |= field<Q::HIGH>(high[s * Q::HIGH / 8], s) << Q::LOW;
        return Q::quants(codes);
    }
    RIDGE_INLINE float scale(unsigned group) const { return Q::scale(factors, group); }
    RIDGE_INLINE float minimum(unsigned group) const { return Q::minimum(factors, group); }
};

// Where word `w` of lane t lies in a unit's `bits` words per lane, in bytes.
RIDGE_INLINE unsigned place(unsigned bits, unsigned t, unsigned w) {
    const unsigned together = bits < 4 ? bits : 4;
    return w / together * 64 + t * 4 * together + w % together * 4;
}

// A matrix [n, k].
template <class Q>
struct Planes {
    // Units of a row, and where the planes begin.
    unsigned units;
    size_t high, head, tail;

    RIDGE_INLINE Planes(unsigned n, unsigned k) : units((k + Q::STEP - 1) / Q::STEP * Q::PARTS) {
        const size_t all = static_cast<size_t>(n) * units;
        high = all * 16 * Q::LOW;
        head = high + all * 16 * Q::HIGH;
        tail = head + all / Q::PARTS * Q::HEAD;
    }
    // Unit `at` of a row, of the matrix at `w`.
    RIDGE_INLINE typename Q::Factors factors(const unsigned char* w, unsigned row, unsigned at) const {
        const size_t unit = static_cast<size_t>(row) * units + at, step = unit / Q::PARTS;
        return Q::factors(w + head + step * Q::HEAD, w + tail + step * Q::TAIL, at % Q::PARTS);
    }
    // What lane t reads of it.
    RIDGE_INLINE void load(const unsigned char* w, unsigned row, unsigned at, unsigned t, Lane<Q>& lane) const {
        const size_t unit = static_cast<size_t>(row) * units + at;
        load_words<Q::LOW>(w + unit * 16 * Q::LOW, t, lane.low);
        if constexpr (Q::HIGH != 0) load_words<Q::HIGH>(w + high + unit * 16 * Q::HIGH, t, lane.high);
        lane.factors = factors(w, row, at);
    }
    // The quants of the four elements of sixteen `s` that are lane t's.
    RIDGE_INLINE unsigned quad(const unsigned char* w, unsigned row, unsigned at, unsigned s, unsigned t) const {
        const size_t unit = static_cast<size_t>(row) * units + at;
        unsigned codes = field<Q::LOW>(word_at(w + unit * 16 * Q::LOW + place(Q::LOW, t, s * Q::LOW / 8)), s);
        if constexpr (Q::HIGH != 0)
            codes |= field<Q::HIGH>(word_at(w + high + unit * 16 * Q::HIGH + place(Q::HIGH, t, s * Q::HIGH / 8)), s) << Q::LOW;
        return Q::quants(codes);
    }

private:
    template <unsigned WORDS, int N>
    static RIDGE_INLINE void load_words(const unsigned char* unit, unsigned t, unsigned (&words)[N]) {
        if constexpr (WORDS == 1) {
            words[0] = word_at(unit + 4 * t);
        } else if constexpr (WORDS == 2) {
            const uint2 both = pair_at(unit + 8 * t);
            words[0] = both.x, words[1] = both.y;
        } else {
#pragma unroll
            for (unsigned i = 0; i < WORDS / 4; ++i) {
                const uint4 four = four_at(unit + 64 * i + 16 * t);
                words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
            }
        }
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
