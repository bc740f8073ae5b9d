//! The unquantised types and the scalar conversions everything else uses.

/// binary16 to f32, exact, without branches so that it vectorises (Maratyszcza's FP16, `fp16_ieee_to_fp32_value`). Block scales
/// are often subnormal in f16, so the subnormal path must not be slow: it subtracts a bias instead of multiplying subnormals.
#[inline(always)]
pub(crate) fn f16_to_f32(h: u16) -> f32 {
    let w = u32::from(h) << 16;
    let sign = w & 0x8000_0000;
    let two_w = w.wrapping_add(w);
    let normal = f32::from_bits((two_w >> 4).wrapping_add(0xE0 << 23)) * f32::from_bits(0x0780_0000);
    let subnormal = f32::from_bits((two_w >> 17) | (126 << 23)) - 0.5;
    let magnitude = if two_w < (1 << 27) { subnormal.to_bits() } else { normal.to_bits() };
    f32::from_bits(sign | magnitude)
}

/// bfloat16 to f32, exact.
#[inline(always)]
pub(crate) fn bf16_to_f32(h: u16) -> f32 {
    f32::from_bits(u32::from(h) << 16)
}

/// f32 to binary16, to nearest even, without branches so that it vectorises (Maratyszcza's FP16, `fp16_ieee_from_fp32_value`):
/// adding a power of two makes the f32 unit do the rounding. Too large becomes infinity.
#[inline(always)]
pub(crate) fn f32_to_f16(v: f32) -> u16 {
    let w = v.to_bits();
    let two_w = w.wrapping_add(w);
    // 2^112 sends what is too large for f16 to infinity, 2^-110 brings the rest back to 4 |v|.
    let base = (v.abs() * f32::from_bits((127 + 112) << 23)) * f32::from_bits((127 - 110) << 23);
    let bias = (two_w & 0xFF00_0000).max(0x7100_0000);
    let bits = (f32::from_bits((bias >> 1) + 0x0780_0000) + base).to_bits();
    let finite = ((bits >> 13) & 0x7C00) + (bits & 0x0FFF);
    let magnitude = if two_w > 0xFF00_0000 { 0x7E00 } else { finite };
    ((w & 0x8000_0000) >> 16 | magnitude) as u16
}

/// f32 to bfloat16, to nearest even; NaN stays NaN (ggml's `ggml_compute_fp32_to_bf16`).
#[inline(always)]
pub(crate) fn f32_to_bf16(v: f32) -> u16 {
    let bits = v.to_bits();
    let quiet = (bits >> 16) | 64;
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if bits & 0x7fff_ffff > 0x7f80_0000 { quiet as u16 } else { rounded as u16 }
}

#[inline(always)]
pub(super) fn decode_f32(src: &[u8], dst: &mut [f32]) {
    for (s, d) in src.as_chunks::<4>().0.iter().zip(dst) {
        *d = f32::from_le_bytes(*s);
    }
}

#[inline(always)]
pub(super) fn decode_f16(src: &[u8], dst: &mut [f32]) {
    for (s, d) in src.as_chunks::<2>().0.iter().zip(dst) {
        *d = f16_to_f32(u16::from_le_bytes(*s));
    }
}

#[inline(always)]
pub(super) fn decode_bf16(src: &[u8], dst: &mut [f32]) {
    for (s, d) in src.as_chunks::<2>().0.iter().zip(dst) {
        *d = bf16_to_f32(u16::from_le_bytes(*s));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_half_on_every_pattern() {
        for bits in 0..=u16::MAX {
            let expected = half::f16::from_bits(bits).to_f32_const();
            let got = f16_to_f32(bits);
            assert!(got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan()), "{bits:#x}");
            let wide = half::bf16::from_bits(bits).to_f32();
            assert!(bf16_to_f32(bits) == wide || wide.is_nan());
            // A pattern between two bfloat16 values rounds as `half` rounds it.
            for low in [0u32, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let v = f32::from_bits(u32::from(bits) << 16 | low);
                assert_eq!(f32_to_bf16(v), half::bf16::from_f32(v).to_bits());
                let narrow = half::f16::from_f32_const(v);
                assert!(f32_to_f16(v) == narrow.to_bits() || narrow.is_nan() && f32_to_f16(v) & 0x7fff > 0x7c00);
            }
            // Around a binary16 value and around the middle to the next one.
            for low in [0u32, 1, 0xfff, 0x1000, 0x1001, 0x1fff] {
                let v = f32::from_bits(expected.to_bits() | low);
                assert!(v.is_nan() || f32_to_f16(v) == half::f16::from_f32_const(v).to_bits(), "{v:e}");
            }
        }
    }
}
