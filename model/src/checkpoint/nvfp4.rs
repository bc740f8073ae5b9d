//! NVFP4 weights as Hugging Face checkpoints have them (`compressed-tensors`, `nvfp4-pack-quantized`): fp4 (e2m1) elements, two in a
//! byte, the first in its low half (`weight_packed`); an e4m3 scale for each 16 (`weight_scale`); and one number for the whole matrix
//! that scales were multiplied by (`weight_global_scale`), so that an element is its fp4 value times its scale over that.
//!
//! A matrix becomes bf16; the codes are kept beside it, scales and elements of 64 together, for devices that multiply them. Scales of
//! activations are left alone: activations keep 16 bits. Read [`check`] and [`read`].

use super::fp8::numbers;
use super::safetensors::Located;
use super::tensors::bf16_rows;
use super::{LoadError, Tensor};
use ::safetensors::Dtype;
use ridge_kernels::{DType, e2m1_to_f32, e4m3_to_f32};
use serde_json::Value;
use std::collections::BTreeMap;

/// The name that `compressed-tensors` has for it.
pub const FORMAT: &str = "nvfp4-pack-quantized";
/// Elements of a scale.
const GROUP: usize = 16;
/// Elements of a block of [`NvFp4::blocks`].
const BLOCK: usize = 64;

/// Codes and scales as devices take them apart.
#[derive(Clone, Debug)]
pub struct NvFp4 {
    /// Row by row, for each 64 elements four e4m3 scales and then 32 bytes of elements.
    pub blocks: Vec<u8>,
    /// What all of it is multiplied by.
    pub factor: f32,
}

/// Whether a group of a configuration's weights is NVFP4's.
pub fn check(weights: &Value) -> bool {
    let (bits, kind) = (weights["num_bits"].as_u64(), weights["type"].as_str());
    let strategy = weights["strategy"].as_str().unwrap_or("tensor_group");
    let whole = matches!(strategy, "tensor_group" | "group") && weights["symmetric"] != false;
    whole && (bits, kind) == (Some(4), Some("float")) && weights["group_size"].as_u64() == Some(GROUP as u64)
}

/// The name under which the elements of a matrix called `source` are stored.
pub(super) fn packed_name(source: &str) -> String {
    format!("{source}_packed")
}

/// The matrix called `source`, whose elements are `located`, by the scales beside it.
pub(super) fn read(
    source: &str,
    located: &Located,
    [rows, cols]: [usize; 2],
    found: &BTreeMap<String, Located>,
) -> Result<Tensor, LoadError> {
    let damaged = |what: String| LoadError::damaged(source, what);
    if located.dtype != Dtype::U8 || located.dims != [rows, cols / 2] || !cols.is_multiple_of(GROUP) {
        let (dtype, dims) = (located.dtype, &located.dims);
        return Err(damaged(format!("{dtype:?} {dims:?} are not the packed elements of [{rows}, {cols}]")));
    }
    let beside = |end: &str| {
        let name = format!("{source}_{end}");
        found.get(&name).map(|located| (name.clone(), located)).ok_or_else(|| damaged(format!("'{name}' is not there")))
    };
    let (name, scales) = beside("scale")?;
    if scales.dtype != Dtype::F8_E4M3 || scales.dims != [rows, cols / GROUP] {
        return Err(LoadError::damaged(&name, format!("{:?} {:?} of [{rows}, {cols}]", scales.dtype, scales.dims)));
    }
    let (name, global) = beside("global_scale")?;
    let global = match numbers(&name, global)?[..] {
        [global] if global.is_finite() && global > 0.0 => global,
        ref other => return Err(LoadError::damaged(&name, format!("{other:?} is not one positive number"))),
    };
    let (codes, scales) = (located.storage(), scales.storage());
    let (codes, scales) = (codes.bytes(), scales.bytes());
    if codes.len() != rows * cols / 2 || scales.len() != rows * cols / GROUP {
        return Err(damaged("its bytes are not where its shape says".into()));
    }
    let factor = 1.0 / global;
    let bytes = dequantize(codes, scales, cols, factor);
    let tensor = Tensor::owned(DType::BF16, rows, cols, bytes).ok_or_else(|| damaged("its shape is odd".into()))?;
    Ok(match cols.is_multiple_of(BLOCK) {
        true => tensor.with_nvfp4(NvFp4 { blocks: interleave(codes, scales), factor }),
        false => tensor,
    })
}

/// Scales and elements of each 64 together. A row is whole blocks.
fn interleave(codes: &[u8], scales: &[u8]) -> Vec<u8> {
    let blocks = codes.chunks_exact(BLOCK / 2).zip(scales.chunks_exact(BLOCK / GROUP));
    blocks.flat_map(|(codes, scales)| scales.iter().chain(codes).copied()).collect()
}

/// In bf16.
fn dequantize(codes: &[u8], scales: &[u8], cols: usize, factor: f32) -> Vec<u8> {
    let elements: [f32; 16] = std::array::from_fn(|code| e2m1_to_f32(code as u8));
    let values: Vec<f32> = (0..=u8::MAX).map(e4m3_to_f32).collect();
    let (row_codes, row_scales) = (cols / 2, cols / GROUP);
    bf16_rows(codes.len() / row_codes.max(1), cols, |row, out| {
        let (codes, scales) = (&codes[row * row_codes..], &scales[row * row_scales..]);
        for (at, value) in out.iter_mut().enumerate() {
            let code = codes[at / 2] >> (4 * (at % 2)) & 15;
            *value = elements[usize::from(code)] * values[usize::from(scales[at / GROUP])] * factor;
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn elements_are_what_their_codes_scales_and_the_factor_say() {
        // Two rows of 32: codes count up in the one and down in the other; scales are 1, 2, -0.5 and 0 in e4m3.
        let codes: Vec<u8> =
            (0..16u8).map(|i| ((2 * i) % 16) | (((2 * i + 1) % 16) << 4)).chain((0..16).map(|_| 0x9f)).collect();
        let scales = [0x38, 0x40, 0xb0, 0x00];
        let mut out = vec![0.0; 64];
        ridge_kernels::quant::dequantize_row(DType::BF16, &dequantize(&codes, &scales, 32, 0.25), &mut out);
        assert_eq!(out[..8], [0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5]);
        assert_eq!(out[9..16], [-0.125, -0.25, -0.375, -0.5, -0.75, -1.0, -1.5]);
        assert_eq!(out[16..19], [0.0, 0.25, 0.5]);
        assert_eq!((out[32], out[33], out[48]), (0.75, 0.0625, 0.0));
        let blocks = interleave(&(0..64).collect::<Vec<u8>>(), &[201, 202, 203, 204, 205, 206, 207, 208]);
        assert_eq!((&blocks[..5], &blocks[35..41]), (&[201, 202, 203, 204, 0][..], &[31, 205, 206, 207, 208, 32][..]));
    }

    #[test]
    fn only_its_own_groups_are_taken() {
        let group = |bits: u32, size: u32| json!({"num_bits": bits, "type": "float", "strategy": "tensor_group", "group_size": size});
        assert!(check(&group(4, 16)) && !check(&group(4, 32)) && !check(&group(8, 16)));
        assert!(!check(&json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16})));
    }
}
