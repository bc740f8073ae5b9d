//! Stored types to f32 and back. Decoding is bit for bit gguf-py's `gguf.quants.dequantize`; encoding is plain
//! round-to-nearest, good enough for synthetic weights and tests.
//!
//! The decoders are written so that the compiler vectorises them: each is `#[inline(always)]` over fixed-size arrays, and the
//! ISA modules instantiate [`decode_row`] under their target features. No expression is ever contracted into a fused
//! multiply-add, so every ISA gives the same bits.

mod decode_32;
mod decode_k;
mod encode_32;
mod encode_k;
mod float;

pub use decode_32::e2m1_to_f32;
#[cfg(not(loom))]
pub(crate) use decode_32::{IQ4_NL, MXFP4, e8m0_half};
#[cfg(not(loom))]
pub(crate) use decode_k::{q3_scales, scales_and_minima};
pub(crate) use float::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};

use crate::dtype::DType;

/// Decodes one row: `src` holds `dst.len()` elements of `dtype`.
///
/// Panics if the lengths do not agree: the caller has validated the shape with [`crate::Matrix::new`].
pub fn dequantize_row(dtype: DType, src: &[u8], dst: &mut [f32]) {
    decode_row(dtype, src, dst);
}

/// The body of [`dequantize_row`], inlined so that each ISA compiles its own copy.
#[inline(always)]
pub(crate) fn decode_row(dtype: DType, src: &[u8], dst: &mut [f32]) {
    assert_eq!(dtype.row_bytes(dst.len()), Some(src.len()), "row of {}", dtype.name());
    match dtype {
        DType::F32 => float::decode_f32(src, dst),
        DType::F16 => float::decode_f16(src, dst),
        DType::BF16 => float::decode_bf16(src, dst),
        DType::Q4_0 => blocks(src, dst, decode_32::q4_0),
        DType::Q4_1 => blocks(src, dst, decode_32::q4_1),
        DType::Q5_0 => blocks(src, dst, decode_32::q5_0),
        DType::Q5_1 => blocks(src, dst, decode_32::q5_1),
        DType::Q8_0 => blocks(src, dst, decode_32::q8_0),
        DType::IQ4NL => blocks(src, dst, decode_32::iq4_nl),
        DType::MXFP4 => blocks(src, dst, decode_32::mxfp4),
        DType::Q2K => blocks(src, dst, decode_k::q2_k),
        DType::Q3K => blocks(src, dst, decode_k::q3_k),
        DType::Q4K => blocks(src, dst, decode_k::q4_k),
        DType::Q5K => blocks(src, dst, decode_k::q5_k),
        DType::Q6K => blocks(src, dst, decode_k::q6_k),
    }
}

#[inline(always)]
fn blocks<const B: usize, const N: usize>(src: &[u8], dst: &mut [f32], decode: impl Fn(&[u8; B], &mut [f32; N])) {
    for (s, d) in src.as_chunks::<B>().0.iter().zip(dst.as_chunks_mut::<N>().0) {
        decode(s, d);
    }
}

/// Why a row could not be encoded.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum QuantizeError {
    /// The row is not a whole number of blocks.
    #[error("{len} elements are not a whole number of {} blocks", .dtype.name())]
    Length {
        /// Type asked for.
        dtype: DType,
        /// Elements given.
        len: usize,
    },
    /// The row holds a NaN or an infinity, which a quantised block cannot represent.
    #[error("element {index} is not finite")]
    NotFinite {
        /// Position of the first such element.
        index: usize,
    },
}

/// Encodes one row and appends it to `dst`. F32, F16, BF16, the 32-element types and MXFP4 round as gguf-py does; the K types use
/// one plain scale (and minimum) per sub-block, without ggml's search for better ones.
pub fn quantize_row(dtype: DType, src: &[f32], dst: &mut Vec<u8>) -> Result<(), QuantizeError> {
    if dtype.row_bytes(src.len()).is_none() {
        return Err(QuantizeError::Length { dtype, len: src.len() });
    }
    if dtype.block_len() > 1
        && let Some(index) = src.iter().position(|v| !v.is_finite())
    {
        return Err(QuantizeError::NotFinite { index });
    }
    match dtype {
        DType::F32 => src.iter().for_each(|v| dst.extend(v.to_le_bytes())),
        DType::F16 => src.iter().for_each(|&v| dst.extend(f32_to_f16(v).to_le_bytes())),
        DType::BF16 => src.iter().for_each(|&v| dst.extend(f32_to_bf16(v).to_le_bytes())),
        DType::Q4_0 => each(src, dst, encode_32::q4_0),
        DType::Q4_1 => each(src, dst, encode_32::q4_1),
        DType::Q5_0 => each(src, dst, encode_32::q5_0),
        DType::Q5_1 => each(src, dst, encode_32::q5_1),
        DType::Q8_0 => each(src, dst, encode_32::q8_0),
        DType::IQ4NL => each(src, dst, encode_32::iq4_nl),
        DType::MXFP4 => each(src, dst, encode_32::mxfp4),
        DType::Q2K => each(src, dst, encode_k::q2_k),
        DType::Q3K => each(src, dst, encode_k::q3_k),
        DType::Q4K => each(src, dst, encode_k::q4_k),
        DType::Q5K => each(src, dst, encode_k::q5_k),
        DType::Q6K => each(src, dst, encode_k::q6_k),
    }
    Ok(())
}

fn each<const N: usize>(src: &[f32], dst: &mut Vec<u8>, encode: impl Fn(&[f32; N], &mut Vec<u8>)) {
    for block in src.as_chunks::<N>().0 {
        encode(block, dst);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn every_fp4_code_is_what_the_format_says() {
        let magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0f32];
        for code in 0..16u8 {
            let want = magnitudes[usize::from(code & 7)].copysign(if code < 8 { 1.0 } else { -1.0 });
            // As bits: 8 is minus zero. What lies above the four bits is another element's.
            assert_eq!([code, code | 0xf0].map(|code| e2m1_to_f32(code).to_bits()), [want.to_bits(); 2], "{code}");
        }
    }

    /// Encoding then decoding stays within `limit` times the row's largest magnitude.
    fn check(dtype: DType, limit: f32) {
        let mut random = Random::new(7);
        let row: Vec<f32> = (0..1024).map(|_| random.normal()).collect();
        let mut bytes = Vec::new();
        quantize_row(dtype, &row, &mut bytes).unwrap();
        let mut back = vec![0.0; row.len()];
        dequantize_row(dtype, &bytes, &mut back);
        let largest = row.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        for (a, b) in row.iter().zip(&back) {
            assert!((a - b).abs() <= limit * largest, "{dtype:?}: {a} became {b}");
        }
        // Zeros survive, and so does a constant row's sign.
        bytes.clear();
        quantize_row(dtype, &[0.0; 256], &mut bytes).unwrap();
        let mut zeros = [1.0f32; 256];
        dequantize_row(dtype, &bytes, &mut zeros);
        assert!(zeros.iter().all(|v| *v == 0.0), "{dtype:?}");
    }

    #[test]
    fn round_trips_are_close() {
        check(DType::F32, 0.0);
        check(DType::F16, 1.0 / 2048.0);
        check(DType::BF16, 1.0 / 256.0);
        check(DType::Q8_0, 0.6 / 127.0);
        check(DType::Q4_0, 1.05 / 8.0);
        check(DType::Q4_1, 1.1 / 15.0);
        check(DType::Q5_0, 1.05 / 16.0);
        check(DType::Q5_1, 1.1 / 31.0);
        check(DType::IQ4NL, 0.15);
        check(DType::MXFP4, 0.26);
        check(DType::Q2K, 0.4);
        check(DType::Q3K, 0.3);
        check(DType::Q4K, 0.11);
        check(DType::Q5K, 0.06);
        check(DType::Q6K, 0.04);
    }

    #[test]
    fn bad_rows_are_refused() {
        let mut out = Vec::new();
        let short = quantize_row(DType::Q8_0, &[0.0; 31], &mut out);
        assert_eq!(short, Err(QuantizeError::Length { dtype: DType::Q8_0, len: 31 }));
        let mut row = [0.0; 32];
        row[3] = f32::NAN;
        assert_eq!(quantize_row(DType::Q8_0, &row, &mut out), Err(QuantizeError::NotFinite { index: 3 }));
        assert!(out.is_empty());
    }
}
