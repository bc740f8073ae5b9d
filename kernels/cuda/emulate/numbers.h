// Small floats by their definition, rounded to nearest even, as the conversion instructions round.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulate {

inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline float f32_from_bf16(uint16_t value) {
    return float_of(static_cast<uint32_t>(value) << 16);
}
// NaN becomes the canonical 0x7fff.
inline uint16_t bf16_from_f32(float value) {
    if (std::isnan(value)) return 0x7fff;
    const uint32_t bits = bits_of(value);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float f32_from_f16(uint16_t value) {
    const uint32_t sign = (value & 0x8000u) << 16, exponent = value >> 10 & 31, mantissa = value & 1023;
    if (exponent == 31) return float_of(sign | 0x7f800000 | mantissa << 13);
    if (exponent) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
    const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -magnitude : magnitude;
}
// Overflow becomes infinity, NaN the canonical 0x7fff.
inline uint16_t f16_from_f32(float value) {
    if (std::isnan(value)) return 0x7fff;
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
    if (magnitude < 0x38800000) {
        // Subnormal: a multiple of 2^-24. `nearbyint` rounds to even, and 1024 of them are the least normal number.
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(std::ldexp(float_of(magnitude), 24))));
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | (rounded - 0x38000000) >> 13);
}

inline float f32_from_e4m3(uint8_t value) {
    const unsigned exponent = value >> 3 & 15, mantissa = value & 7;
    if ((value & 0x7f) == 0x7f) return float_of(0x7fc00000);
    const float magnitude = exponent ? std::ldexp(static_cast<float>(8 + mantissa), static_cast<int>(exponent) - 10)
                                     : std::ldexp(static_cast<float>(mantissa), -9);
    return value & 0x80 ? -magnitude : magnitude;
}
// Saturating (`satfinite`): larger magnitudes, infinity too, become 448; NaN stays NaN.
inline uint8_t e4m3_from_f32(float value) {
    if (std::isnan(value)) return 0x7f;
    const uint8_t sign = std::signbit(value) ? 0x80 : 0;
    const float magnitude = std::fabs(value);
    if (magnitude >= 448) return sign | 0x7e;
    if (magnitude < 0x1p-6f) return static_cast<uint8_t>(sign | static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, 9))));
    const uint32_t bits = bits_of(magnitude), rounded = bits + 0x7ffff + (bits >> 20 & 1);
    return static_cast<uint8_t>(sign | ((rounded >> 20) - (120 << 3)));
}

}  // namespace emulate
