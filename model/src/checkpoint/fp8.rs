//! fp8 (e4m3) weights as Hugging Face checkpoints have them: codes, and beside them the factors that they are multiplied by.
//!
//! Two spellings are read: `compressed-tensors` (`float-quantized`), whose factors are called `weight_scale`, one for a matrix or one
//! for each of its rows; and `fp8`, with one `weight_scale_inv` for each block of `weight_block_size`, or one for the whole matrix.
//! Despite its name that one multiplies, too. Factors of activations are left alone: activations keep 16 bits on the CPU, and a device
//! rounds each row by its own largest element.
//!
//! A matrix becomes bf16, as transformers makes it when it dequantises; the codes are kept beside it for devices that multiply them.
//! Read [`check`] and [`read`].

use super::safetensors::Located;
use super::tensors::bf16_rows;
use super::{LoadError, Tensor, nvfp4};
use ::safetensors::Dtype;

use ridge_kernels::cuda::ops::scaled::SCALED_BLOCK;
use ridge_kernels::{DType, e4m3_to_f32};
use serde_json::Value;
use std::collections::BTreeMap;

const FILE: &str = "config.json";

/// What a row of factors covers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Blocks {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
}

/// The blocks of factors that devices know.
const DEVICE_BLOCKS: Blocks = Blocks { rows: SCALED_BLOCK, cols: SCALED_BLOCK };

/// Codes and factors as devices multiply them.
#[derive(Clone, Debug)]
pub struct Fp8 {
    /// `[rows, cols]`, e4m3.
    pub codes: super::tensors::Storage,
    /// `[rows]`, or `[rows / 128, cols / 128]`, rounded up.
    pub factors: Vec<f32>,
    /// Whether it is the second.
    pub by_block: bool,
}

/// Whether a configuration's quantisation is one that can be read: nothing, fp8 weights, or NVFP4 ones.
pub fn check(config: &Value) -> Result<(), LoadError> {
    let quantisation = &config["quantization_config"];
    let Some(method) = quantisation["quant_method"].as_str() else { return Ok(()) };
    let refuse = |what: String| {
        let hint = "use a bf16, f16, f32, fp8 or NVFP4 checkpoint, or GGUF for other quantised weights";
        Err(LoadError::Unsupported { file: FILE.into(), what: format!("{what} ({hint})") })
    };
    match method {
        "fp8" => block_size(config).map(|_| ()),
        "compressed-tensors" => {
            let format = quantisation["format"].as_str().unwrap_or("none");
            let groups = quantisation["config_groups"].as_object();
            let groups = groups.into_iter().flat_map(|groups| groups.values()).map(|group| &group["weights"]);
            if format == nvfp4::FORMAT {
                return match groups.clone().find(|weights| !nvfp4::check(weights)) {
                    Some(weights) => refuse(format!("weights of {format} as {weights}")),
                    None => Ok(()),
                };
            }
            if format != "float-quantized" {
                return refuse(format!("format '{format}' of compressed-tensors"));
            }
            for weights in groups {
                let (bits, kind) = (weights["num_bits"].as_u64(), weights["type"].as_str());
                let strategy = weights["strategy"].as_str().unwrap_or("tensor");
                let known = matches!(strategy, "tensor" | "channel" | "block");
                if (bits, kind) != (Some(8), Some("float")) || weights["symmetric"] == false || !known {
                    return refuse(format!("weights of compressed-tensors as {weights}"));
                }
            }
            block_size(config).map(|_| ())
        }
        method => refuse(format!("quantization '{method}' of safetensors")),
    }
}

/// Rows and columns of a block, where factors have blocks.
fn block_size(config: &Value) -> Result<Option<Blocks>, LoadError> {
    let quantisation = &config["quantization_config"];
    let groups = quantisation["config_groups"].as_object();
    let of_groups =
        groups.into_iter().flat_map(|groups| groups.values()).map(|group| &group["weights"]["block_structure"]);
    let sizes = std::iter::once(&quantisation["weight_block_size"]).chain(of_groups).find(|size| !size.is_null());
    let Some(sizes) = sizes else { return Ok(None) };
    let size = |at: usize| sizes[at].as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0);
    match (sizes.as_array().map(Vec::len), size(0), size(1)) {
        (Some(2), Some(rows), Some(cols)) => Ok(Some(Blocks { rows, cols })),
        _ => Err(LoadError::config(FILE, format!("a weight_block_size of {sizes}"))),
    }
}

/// The matrix whose codes are `located`, under the name `source`, by the factors beside it.
pub(super) fn read(
    config: &Value,
    source: &str,
    located: &Located,
    [rows, cols]: [usize; 2],
    found: &BTreeMap<String, Located>,
) -> Result<Tensor, LoadError> {
    let damaged = |what: String| LoadError::damaged(source, what);
    let codes = located.storage();
    if codes.bytes().len() != rows * cols {
        return Err(damaged("its bytes are not where its shape says".into()));
    }
    let names = ["_scale", "_scale_inv"].map(|end| format!("{source}{end}"));
    let Some((name, stored)) = names.iter().find_map(|name| Some((name, found.get(name)?))) else {
        return Err(damaged(format!("fp8 without factors: neither '{}' nor '{}' is there", names[0], names[1])));
    };
    let factors = numbers(name, stored)?;
    let across = |blocks: Blocks| (rows.div_ceil(blocks.rows), cols.div_ceil(blocks.cols));
    let blocks = match (factors.len(), block_size(config)?) {
        (count, Some(blocks)) if count == across(blocks).0 * across(blocks).1 => blocks,
        (1, None) => Blocks { rows, cols },
        (count, None) if count == rows => Blocks { rows: 1, cols },
        (count, blocks) => {
            return Err(damaged(format!("{count} factors for [{rows}, {cols}] and blocks of {blocks:?}")));
        }
    };
    let bytes = dequantize(codes.bytes(), cols, &factors, blocks);
    let tensor = Tensor::owned(DType::BF16, rows, cols, bytes).ok_or_else(|| damaged("its shape is odd".into()))?;
    Ok(if across(blocks).1 == 1 {
        let factors = (0..rows).map(|row| factors[row / blocks.rows]).collect();
        tensor.with_fp8(Fp8 { codes, factors, by_block: false })
    } else if blocks == DEVICE_BLOCKS {
        tensor.with_fp8(Fp8 { codes, factors, by_block: true })
    } else {
        tensor
    })
}

/// A small tensor's elements.
pub(super) fn numbers(name: &str, located: &Located) -> Result<Vec<f32>, LoadError> {
    let dtype = match located.dtype {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        other => {
            let (dtype, supported) = (format!("{other:?}"), "F32, F16, BF16".into());
            return Err(LoadError::TensorType { name: name.into(), dtype, supported });
        }
    };
    let count: usize = located.dims.iter().product();
    let storage = located.storage();
    if Some(storage.bytes().len()) != dtype.row_bytes(count) {
        return Err(LoadError::damaged(name, "its bytes are not where its shape says"));
    }
    let mut out = vec![0.0; count];
    ridge_kernels::quant::dequantize_row(dtype, storage.bytes(), &mut out);
    Ok(out)
}

/// Codes times factors, in bf16.
fn dequantize(codes: &[u8], cols: usize, factors: &[f32], blocks: Blocks) -> Vec<u8> {
    let values: Vec<f32> = (0..=u8::MAX).map(e4m3_to_f32).collect();
    let across = cols.div_ceil(blocks.cols);
    bf16_rows(codes.len() / cols.max(1), cols, |row, out| {
        let factors = &factors[row / blocks.rows * across..][..across];
        for (at, (value, code)) in out.iter_mut().zip(&codes[row * cols..]).enumerate() {
            *value = values[usize::from(*code)] * factors[at / blocks.cols];
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn blocks_have_their_own_factors() {
        // 1, 2 and -0.5 in e4m3; NaN stays NaN.
        let codes = [0x38, 0x40, 0xb0, 0x38, 0x38, 0x40, 0xb0, 0x7f, 0x00];
        let read = |blocks, factors: &[f32]| {
            let mut out = vec![0.0; codes.len()];
            let bytes = dequantize(&codes, 3, factors, blocks);
            ridge_kernels::quant::dequantize_row(DType::BF16, &bytes, &mut out);
            out
        };
        let whole = read(Blocks { rows: 3, cols: 3 }, &[4.0]);
        assert_eq!(whole[..7], [4.0, 8.0, -2.0, 4.0, 4.0, 8.0, -2.0]);
        assert!(whole[7].is_nan() && whole[8] == 0.0);
        assert_eq!(read(Blocks { rows: 1, cols: 3 }, &[1.0, 2.0, 4.0])[..7], [1.0, 2.0, -0.5, 2.0, 2.0, 4.0, -2.0]);
        // Blocks of two by two, cut short at both edges.
        assert_eq!(
            read(Blocks { rows: 2, cols: 2 }, &[1.0, 10.0, 2.0, 20.0])[..7],
            [1.0, 2.0, -5.0, 1.0, 1.0, 20.0, -1.0]
        );
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        let of = |quantisation: Value| check(&json!({ "quantization_config": quantisation }));
        let group = |weights: Value| {
            json!({
                "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {"weights": weights}},
            })
        };
        assert_eq!(check(&json!({})), Ok(()));
        assert_eq!(of(json!({"quant_method": "fp8", "weight_block_size": [128, 128]})), Ok(()));
        assert_eq!(of(json!({"quant_method": "fp8"})), Ok(()));
        assert_eq!(
            of(group(json!({"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": true}))),
            Ok(())
        );
        for bad in [
            json!({"quant_method": "gptq"}),
            json!({"quant_method": "fp8", "weight_block_size": [128]}),
            json!({"quant_method": "fp8", "weight_block_size": [0, 128]}),
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized"}),
            group(json!({"num_bits": 4, "type": "float", "strategy": "channel"})),
            group(json!({"num_bits": 8, "type": "int", "strategy": "channel"})),
            group(json!({"num_bits": 8, "type": "float", "strategy": "group"})),
        ] {
            assert!(of(bad.clone()).is_err(), "{bad}");
        }
        let error = of(json!({"quant_method": "awq"})).unwrap_err();
        assert!(error.to_string().contains("quantization 'awq'") && error.to_string().contains("GGUF"), "{error}");
    }
}
