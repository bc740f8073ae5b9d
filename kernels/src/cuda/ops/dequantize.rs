//! Quantised matrices to plain ones.

use crate::DType;
use crate::cuda::device::{Arg, CudaError, Device, Kernel, Launch};

/// Decodes a quantised matrix `[n, k]`, which lies in planes, to F32 (exactly what [`crate::dequantize_row`] gives) or BF16 (that,
/// rounded).
///
/// # Safety
///
/// `from` and `to` are memory of the device, as large as the matrix takes in planes and in the other type.
///
/// # Panics
///
/// If the type is not quantised, `as_type` is another, or rows are not whole blocks.
pub unsafe fn dequantize(
    device: &dyn Device,
    dtype: DType,
    (n, k): (usize, usize),
    from: u64,
    as_type: DType,
    to: u64,
) -> Result<(), CudaError> {
    assert!(k.is_multiple_of(dtype.block_len()), "rows of {k} elements of {}", dtype.name());
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
    if n == 0 || k == 0 {
        return Ok(());
    }
    let launch = Launch { grid: [n as u32, 1, 1], block: [256, 1, 1], shared_bytes: 0 };
    let args = [Arg::Ptr(from), Arg::Ptr(to), Arg::U32(n as u32), Arg::U32(k as u32)];
    // SAFETY: passed on; these are the kernel's parameters.
    unsafe { device.launch(Kernel { source: "dequant.cu", name }, &launch, &args) }
}
