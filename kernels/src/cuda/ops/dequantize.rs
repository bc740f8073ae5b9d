//! Quantised matrices to plain ones.

use crate::DType;
use crate::cuda::device::{Arg, CudaError, Device, Kernel, Launch};

/// Decodes `elements` of a quantised matrix to F32 (exactly what [`crate::dequantize_row`] gives) or BF16 (that, rounded).
///
/// # Safety
///
/// `from` and `to` are memory of the device, as large as `elements` take in the two types.
///
/// # Panics
///
/// If the type is not quantised, `as_type` is another, or `elements` are not whole blocks.
pub unsafe fn dequantize(
    device: &dyn Device,
    dtype: DType,
    elements: usize,
    from: u64,
    as_type: DType,
    to: u64,
) -> Result<(), CudaError> {
    assert!(elements.is_multiple_of(dtype.block_len()), "{elements} elements of {}", dtype.name());
    let [bf16, f32] = match dtype {
        DType::Q4_0 => ["dequant_q4_0_bf16", "dequant_q4_0_f32"],
        DType::Q4_1 => ["dequant_q4_1_bf16", "dequant_q4_1_f32"],
        DType::Q5_0 => ["dequant_q5_0_bf16", "dequant_q5_0_f32"],
        DType::Q5_1 => ["dequant_q5_1_bf16", "dequant_q5_1_f32"],
        DType::Q8_0 => ["dequant_q8_0_bf16", "dequant_q8_0_f32"],
        DType::Q2K => ["dequant_q2_k_bf16", "dequant_q2_k_f32"],
        DType::Q3K => ["dequant_q3_k_bf16", "dequant_q3_k_f32"],
        DType::Q4K => ["dequant_q4_k_bf16", "dequant_q4_k_f32"],
        DType::Q5K => ["dequant_q5_k_bf16", "dequant_q5_k_f32"],
        DType::Q6K => ["dequant_q6_k_bf16", "dequant_q6_k_f32"],
        DType::IQ4NL => ["dequant_iq4_nl_bf16", "dequant_iq4_nl_f32"],
        DType::MXFP4 => ["dequant_mxfp4_bf16", "dequant_mxfp4_f32"],
        DType::F32 | DType::F16 | DType::BF16 => panic!("{} is not quantised", dtype.name()),
    };
    let name = match as_type {
        DType::BF16 => bf16,
        DType::F32 => f32,
        other => panic!("quantised weights are not decoded to {}", other.name()),
    };
    let quads = elements / 4;
    if quads == 0 {
        return Ok(());
    }
    // Enough blocks for any device; each goes on by the whole grid.
    let blocks = quads.div_ceil(256).min(1 << 16);
    let launch = Launch { grid: [blocks as u32, 1, 1], block: [256, 1, 1], shared_bytes: 0 };
    let args = [Arg::Ptr(from), Arg::Ptr(to), Arg::U64(quads as u64)];
    // SAFETY: passed on; these are the kernel's parameters.
    unsafe { device.launch(Kernel { source: "dequant.cu", name }, &launch, &args) }
}
