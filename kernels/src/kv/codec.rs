//! How one element of a page is coded. Written without branches, so that a row vectorises under any ISA, to the same bits.

use crate::quant::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};

/// A stored type of `N` bytes.
pub(super) trait Code<const N: usize> {
    /// The scale stored with a vector; 1 where none is.
    #[inline(always)]
    fn scale(_vector: &[f32]) -> f32 {
        1.0
    }

    /// The same from the vector's largest magnitude, where NaN is above infinity.
    #[inline(always)]
    fn scale_of(_largest: f32) -> f32 {
        1.0
    }

    /// What `encode` multiplies by, given the stored scale.
    #[inline(always)]
    fn factor(_scale: f32) -> f32 {
        1.0
    }

    /// The bytes of an element.
    fn encode(v: f32, factor: f32) -> [u8; N];
}

/// A type of which every value is an f32.
pub(super) trait Float<const N: usize>: Code<N> {
    /// The value, exact.
    fn decode(bytes: [u8; N]) -> f32;
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;
pub(super) struct Fp8;
pub(super) struct Int8;

impl Code<4> for F32 {
    #[inline(always)]
    fn encode(v: f32, _: f32) -> [u8; 4] {
        v.to_le_bytes()
    }
}

impl Code<2> for F16 {
    #[inline(always)]
    fn encode(v: f32, _: f32) -> [u8; 2] {
        f32_to_f16(v).to_le_bytes()
    }
}

impl Code<2> for Bf16 {
    #[inline(always)]
    fn encode(v: f32, _: f32) -> [u8; 2] {
        f32_to_bf16(v).to_le_bytes()
    }
}

impl Float<4> for F32 {
    #[inline(always)]
    fn decode(bytes: [u8; 4]) -> f32 {
        f32::from_le_bytes(bytes)
    }
}

impl Float<2> for F16 {
    #[inline(always)]
    fn decode(bytes: [u8; 2]) -> f32 {
        f16_to_f32(u16::from_le_bytes(bytes))
    }
}

impl Float<2> for Bf16 {
    #[inline(always)]
    fn decode(bytes: [u8; 2]) -> f32 {
        bf16_to_f32(u16::from_le_bytes(bytes))
    }
}

impl Code<1> for Fp8 {
    #[inline(always)]
    fn encode(v: f32, _: f32) -> [u8; 1] {
        [f32_to_e4m3(v)]
    }
}

impl Code<1> for Int8 {
    #[inline(always)]
    fn scale(vector: &[f32]) -> f32 {
        // As integers, magnitudes sort as numbers do, infinity above all of them and NaN above infinity.
        let largest = vector.iter().fold(0, |largest, v| (v.to_bits() & 0x7fff_ffff).max(largest));
        Self::scale_of(f32::from_bits(largest))
    }

    /// The largest magnitude / 127; 0 for a vector too small for the quotients to be exact enough, NaN for one that is not
    /// finite.
    #[inline(always)]
    fn scale_of(largest: f32) -> f32 {
        if largest < 128.0 * f32::MIN_POSITIVE {
            0.0
        } else if largest.is_finite() {
            largest / 127.0
        } else {
            f32::NAN
        }
    }

    #[inline(always)]
    fn factor(scale: f32) -> f32 {
        if scale > 0.0 { 1.0 / scale } else { 0.0 }
    }

    #[inline(always)]
    fn encode(v: f32, factor: f32) -> [u8; 1] {
        // A factor of 0 stands for a scale of 0 or NaN, whatever v is. Adding 1.5 * 2^23 rounds to nearest even and leaves
        // the integer in the low bits; |v| * factor is at most 127 and a rounding error.
        let v = if factor > 0.0 { v * factor } else { 0.0 };
        [(v + 12_582_912.0).to_bits() as u8]
    }
}

/// f32 to OCP E4M3, to nearest even: 4 bits of exponent with bias 7, no infinity, magnitudes above 448 become 448.
#[inline(always)]
pub fn f32_to_e4m3(v: f32) -> u8 {
    let sign = (v.to_bits() >> 24) as u8 & 0x80;
    let magnitude = v.to_bits() & 0x7fff_ffff;
    let rounded = magnitude.wrapping_add(0x7_ffff + ((magnitude >> 20) & 1)) >> 20;
    let normal = rounded.wrapping_sub((127 - 7) << 3).min(0x7e);
    // Below 2^-6 the codes are multiples of 2^-9, which adding 1.5 * 2^23 rounds to; 8 of them are the first normal code.
    let subnormal = (f32::from_bits(magnitude) * 512.0 + 12_582_912.0).to_bits() & 0xff;
    let code = if magnitude < (127 - 6) << 23 { subnormal } else { normal };
    let code = if magnitude > 0x7f80_0000 { 0x7f } else { code };
    sign | code as u8
}

/// E4M3 to f32, exact; the codes 0x7f and 0xff are NaN.
#[inline(always)]
pub fn e4m3_to_f32(code: u8) -> f32 {
    let (exponent, mantissa) = (code >> 3 & 15, f32::from(code & 7));
    let magnitude = match (exponent, code & 0x7f) {
        (_, 0x7f) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * f32::from_bits((u32::from(exponent) + 127 - 7) << 23),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::testing::Random;

    /// The nearest code by search, ties to the even one.
    fn nearest_e4m3(v: f32) -> u8 {
        let sign = if v.is_sign_negative() { 0x80 } else { 0 };
        // What is above the largest code is nearest to it, but that far away the distances are equal in f64.
        let distance = |code: u8| (f64::from(v.abs().min(448.0)) - f64::from(e4m3_to_f32(code))).abs();
        let best = (0..0x7f).min_by(|a, b| distance(*a).total_cmp(&distance(*b)).then((a & 1).cmp(&(b & 1))));
        sign | best.unwrap()
    }

    #[test]
    fn every_fp8_code_is_what_the_format_says() {
        assert_eq!(e4m3_to_f32(0x01), 2f32.powi(-9));
        assert_eq!(e4m3_to_f32(0x07), 7.0 * 2f32.powi(-9));
        assert_eq!(e4m3_to_f32(0x08), 2f32.powi(-6));
        assert_eq!(e4m3_to_f32(0x38), 1.0);
        assert_eq!(e4m3_to_f32(0xb9), -1.125);
        assert_eq!(e4m3_to_f32(0x7e), 448.0);
        for code in 0..=u8::MAX {
            let v = e4m3_to_f32(code);
            assert_eq!(v.is_nan(), code & 0x7f == 0x7f);
            assert_eq!(f32_to_e4m3(v), code, "{v}");
            assert_eq!(v.is_sign_negative(), code >= 0x80, "{code:#x}");
            if code & 0x7f < 0x7e {
                // Between two codes: the middle goes to the even one, its neighbours to the nearer one.
                let next = e4m3_to_f32(code + 1);
                let middle = (v + next) / 2.0;
                for v in [middle, middle.next_up(), middle.next_down()] {
                    assert_eq!(f32_to_e4m3(v), nearest_e4m3(v), "{v}");
                }
            }
        }
    }

    #[test]
    fn fp8_saturates_and_keeps_nan() {
        for (v, code) in [(448.0, 0x7e), (464.0, 0x7e), (465.0, 0x7e), (1e30, 0x7e), (f32::INFINITY, 0x7e), (0.0, 0)] {
            assert_eq!(f32_to_e4m3(v), code, "{v}");
            assert_eq!(f32_to_e4m3(-v), code | 0x80, "-{v}");
        }
        assert_eq!(f32_to_e4m3(f32::NAN), 0x7f);
        assert_eq!(f32_to_e4m3(-f32::NAN), 0xff);
        assert_eq!(f32_to_e4m3(f32::MIN_POSITIVE / 8.0), 0);
        let mut random = Random::new(1);
        for _ in 0..100_000 {
            let v = f32::from_bits(random.bits() as u32);
            if v.is_finite() {
                assert_eq!(f32_to_e4m3(v), nearest_e4m3(v), "{v:e}");
            }
        }
    }

    #[test]
    fn int8_rounds_to_even_and_scales_by_the_largest() {
        let scale = <Int8 as Code<1>>::scale;
        let code = |v: &[f32]| -> Vec<i8> {
            let factor = Int8::factor(scale(v));
            v.iter().map(|v| Int8::encode(*v, factor)[0] as i8).collect()
        };
        assert_eq!(scale(&[1.0, -127.0, 3.0]), 1.0);
        assert_eq!(code(&[127.0, -127.0, 0.5, 1.5, -2.5, -0.49, 2.51]), [127, -127, 0, 2, -2, 0, 3]);
        assert_eq!(code(&[0.001, -0.002, 0.0]), [64, -127, 0]);
        assert_eq!((scale(&[0.0, -0.0]), code(&[0.0, 1e-40])), (0.0, vec![0, 0]));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(scale(&[1.0, bad]).is_nan());
            assert_eq!(code(&[1.0, bad]), [0, 0]);
        }
        let mut random = Random::new(2);
        for exponent in -30..30 {
            let v: Vec<f32> = random.vector(64).iter().map(|v| v * 2f32.powi(4 * exponent)).collect();
            let scale = scale(&v);
            for (v, code) in v.iter().zip(code(&v)) {
                assert!((f32::from(code) * scale - v).abs() <= scale * 0.500_1, "{v} {code}");
            }
        }
    }
}
